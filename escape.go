package chatbroadcast

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"unicode/utf16"
	"unicode/utf8"

	"go.uber.org/zap"
)

// Strangers choose names and messages. Some characters in them would control an operator's terminal, or show the text
// in another order than it has. So everything below escapes all characters that Unicode does not count as printable,
// control characters among them.

// printable returns s for people to read, with every character escaped that is neither visible nor a space.
func printable(s string) string {
	var b strings.Builder
	for _, r := range s {
		if strconv.IsPrint(r) {
			b.WriteRune(r)
		} else {
			b.WriteString(strings.Trim(strconv.QuoteRune(r), "'"))
		}
	}
	return b.String()
}

// escapedName returns the name of a hub or a user in a form that people can read and type: \\ is a backslash, and
// \u202e or \U000e0001 a character that is not printable.
func escapedName(name string) string {
	var b strings.Builder
	for _, r := range name {
		switch {
		case r == '\\':
			b.WriteString(`\\`)
		case strconv.IsPrint(r):
			b.WriteRune(r)
		case r <= 0xffff:
			fmt.Fprintf(&b, `\u%04x`, r)
		default:
			fmt.Fprintf(&b, `\U%08x`, r)
		}
	}
	return b.String()
}

// unescapedName returns the name from which escapedName has made s.
func unescapedName(s string) (string, error) {
	var b strings.Builder
	for {
		text, escape, found := strings.Cut(s, `\`)
		b.WriteString(text)
		if !found {
			return b.String(), nil
		}
		if strings.IndexAny(escape, `\uU`) != 0 { // strconv knows more escapes
			return "", errEscape
		}
		r, _, rest, err := strconv.UnquoteChar(`\`+escape, 0)
		if err != nil {
			return "", errEscape
		}
		b.WriteRune(r)
		s = rest
	}
}

var errEscape = errors.New(`a backslash must begin \\, \u and four hexadecimal digits, or \U and eight; ` +
	`write \\ for the backslash itself`)

// encodeJSON writes v as JSON and a line break. It escapes every character in strings that is not printable.
func encodeJSON(w io.Writer, v any) error {
	encoded, err := json.Marshal(v)
	if err != nil {
		return err
	}
	_, err = w.Write(append(escapeJSON(encoded), '\n'))
	return err
}

// escapeJSON returns JSON of the same value with only printable characters. In valid JSON all others stand in strings.
func escapeJSON(encoded []byte) []byte {
	if !bytes.ContainsFunc(encoded, unprintable) {
		return encoded
	}
	escaped := make([]byte, 0, 2*len(encoded))
	for len(encoded) > 0 {
		r, size := utf8.DecodeRune(encoded)
		switch {
		case !unprintable(r):
			escaped = append(escaped, encoded[:size]...)
		case r <= 0xffff:
			escaped = fmt.Appendf(escaped, `\u%04x`, r)
		default:
			high, low := utf16.EncodeRune(r)
			escaped = fmt.Appendf(escaped, `\u%04x\u%04x`, high, low)
		}
		encoded = encoded[size:]
	}
	return escaped
}

func unprintable(r rune) bool { return !strconv.IsPrint(r) }

// logName returns a log field with the name of a hub or a user. It escapes characters that are not printable, because
// zap's encoders write some of them as they are.
func logName(key, name string) zap.Field {
	if strings.ContainsFunc(name, unprintable) {
		return zap.Reflect(key, escapedString(name))
	}
	return zap.String(key, name)
}

// An escapedString encodes itself as JSON with every character escaped that is not printable.
type escapedString string

// MarshalJSON implements json.Marshaler.
func (s escapedString) MarshalJSON() ([]byte, error) {
	encoded, err := json.Marshal(string(s))
	return escapeJSON(encoded), err
}

// Interface guards
var _ json.Marshaler = escapedString("")
