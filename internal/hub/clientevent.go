package hub

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"strconv"
	"unicode"
	"unicode/utf16"
	"unicode/utf8"

	"github.com/chat-broadcast/caddy-chat-broadcast/internal/ws"
)

// A clientEvent is a decoded frame of a client that speaks events. It has the fields that belong to its type; absent
// fields are nil. All bytes in it are valid until the frame's buffer is used again.
type clientEvent struct {
	kind                           string // kindSend, kindWho, kindPing, or "" for an unknown type
	id, token, data, data64, after []byte
	limit                          int
}

// The types of a clientEvent.
const (
	kindSend = "send"
	kindWho  = "who"
	kindPing = "ping"
)

// byteOrderMark is U+FEFF in UTF-8, which some editors and libraries put before a text.
var byteOrderMark = []byte("\xef\xbb\xbf")

// decode decodes a frame, which must be UTF-8, into e. It overwrites the frame. It takes three passes and, for a valid
// frame, no memory, however many fields the frame has; a map of them would cost ten times as much. Field names compare
// with case. Of several fields with one name the last counts. decode ignores fields that do not belong to the type.
func (e *clientEvent) decode(frame []byte) error {
	if bytes.HasPrefix(frame, byteOrderMark) {
		return errors.New("must be a JSON object, but begins with a byte order mark (U+FEFF)")
	}
	if tooDeep(frame) {
		return fmt.Errorf("has more than %d levels", maxLevels)
	}
	if !json.Valid(frame) {
		return fmt.Errorf("must be a JSON object: %w", json.Unmarshal(frame, new(json.RawMessage)))
	}
	if frame = skip(frame, ' '); frame[0] != '{' {
		return errors.New("must be a JSON object")
	}
	var f clientFields
	f.find(frame)
	var kind []byte
	err := text(&kind, "type", f.kind)
	switch {
	case err != nil:
		return err
	case kind == nil:
		return errors.New("type: is missing")
	case string(kind) == kindSend:
		e.kind = kindSend
		return firstOf(
			text(&e.id, "id", f.id), // first, so that the answer to an error has the id
			text(&e.token, "token", f.token),
			text(&e.data, "data", f.data),
			text(&e.data64, "data64", f.data64),
		)
	case string(kind) == kindWho:
		e.kind = kindWho
		return firstOf(text(&e.after, "after", f.after), e.readLimit(f.limit))
	case string(kind) == kindPing:
		e.kind = kindPing
		return text(&e.id, "id", f.id)
	}
	return nil
}

// firstOf returns the first error that is not nil.
func firstOf(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

// text sets *into to the text of a JSON string. It does nothing if value is nil.
func text(into *[]byte, name string, value []byte) error {
	if value == nil {
		return nil
	}
	if value[0] != '"' {
		return fmt.Errorf("%s: must be a string", name)
	}
	inner := value[1 : len(value)-1]
	decoded, ok := appendUnescaped(inner[:0], inner)
	if !ok {
		return fmt.Errorf(`%s: has a \u escape of half a surrogate pair, which is no character`, name)
	}
	*into = decoded
	return nil
}

// defaultPage and maxPage are how many users a page of the roster has, without a limit and at most.
const (
	defaultPage = 100
	maxPage     = 1000
)

// readLimit sets e.limit from a JSON number, or to defaultPage if value is nil.
func (e *clientEvent) readLimit(value []byte) error {
	e.limit = defaultPage
	if value == nil {
		return nil
	}
	n, ok := wholeNumber(value)
	if !ok || n < 1 || n > maxPage {
		return fmt.Errorf("limit: must be a whole number from 1 to %d", maxPage)
	}
	e.limit = n
	return nil
}

// message returns the opcode and the payload of the message in a send. It returns an error if a field of the send is
// wrong or missing.
func (e *clientEvent) message() (opcode int, payload []byte, err error) {
	if err := e.checkID(); err != nil {
		return 0, nil, err
	}
	switch {
	case e.token != nil && !validToken(string(e.token)):
		return 0, nil, fmt.Errorf("token: must be 1 to %d letters, digits, - and _", maxToken)
	case e.token != nil && e.id == nil:
		return 0, nil, errors.New("id: is missing beside token")
	case e.data == nil && e.data64 == nil:
		return 0, nil, errors.New("data: there must be data or data64")
	case e.data != nil && e.data64 != nil:
		return 0, nil, errors.New("data64: there must be either data or data64")
	case e.data != nil:
		return ws.TextMessage, e.data, nil
	}
	payload, err = decodeBase64(e.data64)
	if err != nil {
		return 0, nil, fmt.Errorf("data64: must be Base64 (RFC 4648 §4): %w", err)
	}
	return ws.BinaryMessage, payload, nil
}

// checkID returns an error for an id that is too short or too long.
func (e *clientEvent) checkID() error {
	if e.id != nil && (len(e.id) == 0 || len(e.id) > maxSendID) {
		return fmt.Errorf("id: must be 1 to %d bytes", maxSendID)
	}
	return nil
}

// payloadText returns how many bytes the payload of a send has in the frame, without escapes.
func (e *clientEvent) payloadText() int { return len(e.data) + len(e.data64) }

// strictBase64 demands padding, and zeros for the bits that belong to no byte.
var strictBase64 = base64.StdEncoding.Strict()

func decodeBase64(text []byte) ([]byte, error) {
	if i := bytes.IndexAny(text, "\r\n"); i >= 0 { // the decoder would skip them
		return nil, base64.CorruptInputError(i)
	}
	return strictBase64.AppendDecode(nil, text)
}

// ---- JSON ----

// maxLevels is how many levels of objects and arrays a frame may have, which is far more than a client needs.
// encoding/json allocates memory for each level of a malformed frame, and for levels beyond a thousand in every frame:
// 80 ns a byte.
const maxLevels = 100

// tooDeep reports whether a frame has more than maxLevels. The frame need not be valid JSON.
func tooDeep(frame []byte) bool {
	depth := 0
	for i := 0; i < len(frame); i++ {
		switch frame[i] {
		case '"':
			for i++; i < len(frame) && frame[i] != '"'; i++ {
				if frame[i] == '\\' {
					i++
				}
			}
		case '{', '[':
			depth++
			if depth > maxLevels {
				return true
			}
		case '}', ']':
			depth--
		}
	}
	return false
}

// clientFields has the values of the known fields, as JSON. Absent fields are nil.
type clientFields struct {
	kind, id, token, data, data64, after, limit []byte
}

// of returns where the value of the named field goes, or nil for an unknown field.
func (f *clientFields) of(name []byte) *[]byte {
	switch string(name) {
	case "type":
		return &f.kind
	case "id":
		return &f.id
	case "token":
		return &f.token
	case "data":
		return &f.data
	case "data64":
		return &f.data64
	case "after":
		return &f.after
	case "limit":
		return &f.limit
	}
	return nil
}

// find fills f with the fields of an object, which must be valid JSON.
func (f *clientFields) find(object []byte) {
	const longestName = 6 * len("data64") // each character as \u0064
	var unescaped [longestName]byte
	rest := skip(object[1:], ' ')
	for rest[0] != '}' {
		end := valueEnd(rest)
		name := rest[1 : end-1]
		if len(name) <= longestName && bytes.IndexByte(name, '\\') >= 0 {
			name, _ = appendUnescaped(unescaped[:0], name)
		}
		rest = skip(rest[end:], ':')
		end = valueEnd(rest)
		if value := f.of(name); value != nil {
			*value = rest[:end:end]
		}
		rest = skip(rest[end:], ',')
	}
}

// valueEnd returns the length of the first value in b, which must be valid JSON.
func valueEnd(b []byte) int {
	depth := 0
	for i := 0; ; i++ {
		switch b[i] {
		case '"':
			for i++; b[i] != '"'; i++ {
				if b[i] == '\\' {
					i++
				}
			}
		case '{', '[':
			depth++
			continue
		case '}', ']':
			depth--
		default:
			if depth > 0 {
				continue
			}
			return scalarEnd(b)
		}
		if depth == 0 {
			return i + 1
		}
	}
}

// scalarEnd is valueEnd for a number, true, false or null.
func scalarEnd(b []byte) int {
	for i, c := range b {
		switch c {
		case ',', '}', ']', ' ', '\t', '\r', '\n':
			return i
		}
	}
	return len(b)
}

// skip returns b without leading white space and separators, or nil if nothing else is left.
func skip(b []byte, separator byte) []byte {
	for i, c := range b {
		switch c {
		case separator, ' ', '\t', '\r', '\n':
		default:
			return b[i:]
		}
	}
	return nil
}

// appendUnescaped appends to dst the text of a JSON string, given the bytes between its quotation marks. dst may be the
// beginning of the same memory. It returns false for a surrogate without its other half, which is no character.
// encoding/json would put U+FFFD in its place, which would make two different ids equal.
func appendUnescaped(dst, s []byte) (text []byte, ok bool) {
	for {
		i := bytes.IndexByte(s, '\\')
		if i < 0 {
			return append(dst, s...), true
		}
		dst = append(dst, s[:i]...)
		c := s[i+1]
		s = s[i+2:]
		if c != 'u' {
			dst = append(dst, unescapedByte(c))
			continue
		}
		r := hexRune(s)
		s = s[4:]
		if utf16.IsSurrogate(r) {
			if !bytes.HasPrefix(s, []byte(`\u`)) {
				return dst, false
			}
			if r = utf16.DecodeRune(r, hexRune(s[2:])); r == unicode.ReplacementChar {
				return dst, false
			}
			s = s[6:]
		}
		dst = utf8.AppendRune(dst, r)
	}
}

// unescapedByte returns the character of the escape \c.
func unescapedByte(c byte) byte {
	switch c {
	case 'b':
		return '\b'
	case 'f':
		return '\f'
	case 'n':
		return '\n'
	case 'r':
		return '\r'
	case 't':
		return '\t'
	}
	return c
}

// hexRune returns the value of the first four hexadecimal digits of s.
func hexRune(s []byte) (r rune) {
	for _, c := range s[:4] {
		switch {
		case c <= '9':
			c -= '0'
		default:
			c = c&^0x20 - 'A' + 10
		}
		r = r<<4 | rune(c)
	}
	return r
}

// wholeNumber returns the value of a JSON value if it is a whole number, however it is written: 100, 100.0 and 1e2 are
// the same number. It returns math.MaxInt, or its negative, for a number of more than nine digits.
func wholeNumber(value []byte) (n int, ok bool) {
	if c := value[0]; c != '-' && (c < '0' || c > '9') {
		return 0, false
	}
	mantissa, exponent := value, 0
	if i := bytes.IndexAny(value, "eE"); i >= 0 {
		mantissa = value[:i]
		exponent, _ = strconv.Atoi(string(value[i+1:])) // out of range it is the nearest int
		exponent = min(max(exponent, -1<<30), 1<<30)
	}
	whole, fraction, _ := bytes.Cut(mantissa, []byte("."))
	whole, negative := bytes.CutPrefix(whole, []byte("-"))
	digits := bytes.Join([][]byte{whole, fraction}, nil)
	point := len(whole) + exponent // where the decimal point is, which may be beyond either end
	before := digits[:min(max(point, 0), len(digits))]
	if len(bytes.TrimLeft(digits[len(before):], "0")) > 0 {
		return 0, false
	}
	before = bytes.TrimLeft(before, "0")
	zeros := point - len(digits)
	switch {
	case len(before) == 0:
		return 0, true
	case len(before)+max(zeros, 0) > 9:
		n = math.MaxInt
	default:
		n, _ = strconv.Atoi(string(before)) // nine digits
		for range max(zeros, 0) {
			n *= 10
		}
	}
	if negative {
		n = -n
	}
	return n, true
}
