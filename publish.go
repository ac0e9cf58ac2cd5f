package chatbroadcast

import (
	"errors"
	"fmt"
	"io"
	"math"
	"mime"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/chat-broadcast/caddy-chat-broadcast/internal/fair"
	"github.com/chat-broadcast/caddy-chat-broadcast/internal/feed"
	"github.com/chat-broadcast/caddy-chat-broadcast/internal/hub"
	"github.com/chat-broadcast/caddy-chat-broadcast/internal/ws"
	"golang.org/x/time/rate"
)

// publish publishes the body of r, a POST, in the hub that r is for, or refuses r. The routes before it decide whose requests
// come here. It answers 202 with how many clients the message is for and its sequence number; where no client is and no
// history, both are 0 and nothing is kept. A slow body holds up nothing but r.
func (h *Handler) publish(w http.ResponseWriter, r *http.Request) error {
	body := &postBody{ReadCloser: r.Body}
	if err := h.tryPublish(w, r, body); err != nil {
		body.discard(w, r)
		return h.refused(w, r, err, refusedMessage)
	}
	return nil
}

// tryPublish is publish, but returns an error for a request that it refuses.
func (h *Handler) tryPublish(w http.ResponseWriter, r *http.Request, body *postBody) error {
	repl := replacer(r)
	name, err := h.hubFor(r, repl)
	if err != nil {
		return err
	}
	user, err := h.userOf(repl)
	if err != nil {
		return err
	}
	_, address := clientIP(r)
	if h.Rate != nil && !address.IsValid() {
		h.warnWithoutAddress("rate")
	}
	key := h.lease.scope.key
	// Before the body is read, so that the rate holds for what is refused because of its body, too.
	if wait, err := hubs.admit(key, address, h.settings.Rate); err != nil {
		return refusePublish(w.Header(), err, wait)
	}
	body.address, body.ended = address, func() bool { return r.Context().Err() != nil }
	defer body.giveBack()
	opcode, payload, err := readMessage(w, r, body, h.settings.MaxMessageSize)
	if err != nil {
		return err
	}
	if err := hubs.checkOpen(key); err != nil { // the body may have taken its time
		return refusePublish(w.Header(), err, 0)
	}
	m := hub.Message{
		Message: feed.Message{User: user, Opcode: opcode, Payload: payload},
		Source:  hub.FromHTTP,
		Address: address,
	}
	published, _, err := hubs.publishOpening(r.Context(), name, m, key, h.settings, h.limits)
	if err != nil {
		return refusePublish(w.Header(), err, 0)
	}
	work := fair.RequestWork + time.Duration(published.Members)*fair.DeliveryWork
	hubs.process.Processors.PayRequest(r.Context(), address, work)
	return answerJSON(w, http.StatusAccepted, publication{published.Members, published.Seq})
}

// A publication answers to whoever published a message: how many clients the hub had, and the message's number.
type publication struct {
	Clients int    `json:"clients"`
	Seq     uint64 `json:"seq"`
}

func answerJSON(w http.ResponseWriter, status int, v any) error {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = encodeJSON(w, v) // fails only when nobody reads the answer any more
	return nil
}

// readMessage reads the body of r as a message of at most limit bytes, and says whether it is text or binary. Memory
// grows with what arrives, not with what is announced.
func readMessage(w http.ResponseWriter, r *http.Request, body *postBody, limit int) (opcode int, payload []byte, err error) {
	if err := checkEncoding(w.Header(), r.Header); err != nil {
		return 0, nil, caddyhttp.Error(http.StatusUnsupportedMediaType, err)
	}
	tooLarge := func(limit int64) error {
		return caddyhttp.Error(http.StatusRequestEntityTooLarge, fmt.Errorf("the message is longer than %d bytes", limit))
	}
	if r.ContentLength > int64(limit) {
		return 0, nil, tooLarge(int64(limit)) // before a client that expects 100 sends it
	}
	payload, err = io.ReadAll(http.MaxBytesReader(nil, body, int64(limit)))
	// Caddy's request_body may have a bound of its own, with the same error.
	if e, ok := errors.AsType[*http.MaxBytesError](err); ok {
		return 0, nil, tooLarge(e.Limit)
	}
	if errors.Is(err, errBusy) {
		return 0, nil, refuseJoin(w.Header(), errBusy)
	}
	if err != nil {
		return 0, nil, caddyhttp.Error(http.StatusBadRequest, fmt.Errorf("reading the message: %w", err))
	}
	if opcode, err = opcodeOf(payload, r.Header.Get("Content-Type")); err != nil {
		return 0, nil, caddyhttp.Error(http.StatusBadRequest, err)
	}
	return opcode, payload, nil
}

// A postBody is the body of a POST. While it is read as a message it takes what it needs from the memory that all messages
// which are being received share, and waits while its address has its share of that.
type postBody struct {
	io.ReadCloser
	asked bool // a client that expects 100 has been asked for it

	address     netip.Prefix
	ended       func() bool // whether nobody waits for the answer any more; nil: nothing is kept of what is read
	read, taken int         // bytes
}

// Read implements io.Reader.
func (b *postBody) Read(p []byte) (int, error) {
	b.asked = true
	n, err := b.ReadCloser.Read(p)
	b.read += n
	if b.ended != nil && b.read > hub.FreeMessage && b.read > b.taken {
		more := max(b.read, 2*b.taken) - b.taken // as the buffer of io.ReadAll grows, about
		if !hubs.process.Incoming.Await(b.address, more, b.ended) {
			return n, errBusy
		}
		b.taken += more
	}
	return n, err
}

// giveBack gives back what the message has taken, which is kept no longer.
func (b *postBody) giveBack() {
	if b.taken > 0 {
		hubs.process.Incoming.Give(b.address, b.taken)
	}
	b.ended, b.taken = nil, 0
}

// maxDiscardedBody and discardTimeout bound the rest of a refused body that discard reads.
const (
	maxDiscardedBody = 16 << 20
	discardTimeout   = 5 * time.Second
)

// discard reads the rest of the body of r, which is refused, before the answer. A connection that is closed with unread
// bytes in it is reset, and a client that is still sending then loses the answer. As with a client that is closed, discard
// reads at most maxDiscardedBody bytes and for discardTimeout, and nothing of a body that is announced as longer. It does not
// read from a client that waits for 100, nor over HTTP/2 and HTTP/3, where the answer ends a stream and not the connection.
func (b *postBody) discard(w http.ResponseWriter, r *http.Request) {
	if r.ProtoMajor > 1 {
		return
	}
	atEnd := false
	waits := !b.asked && r.Header.Get("Expect") != ""
	conn := http.NewResponseController(w)
	if !waits && r.ContentLength <= maxDiscardedBody && conn.SetReadDeadline(time.Now().Add(discardTimeout)) == nil {
		_, err := io.CopyN(io.Discard, b, maxDiscardedBody)
		atEnd = errors.Is(err, io.EOF)
		_ = conn.SetReadDeadline(time.Time{}) // net/http sets the one of the next request
	}
	if !atEnd {
		w.Header().Set("Connection", "close")
	}
}

// checkEncoding refuses a body that would be nonsense as a message: one that is compressed, or text in another charset than
// UTF-8 and its subset US-ASCII. It may set a header that belongs to the refusal. A Content-Type that is malformed names no
// charset.
func checkEncoding(response, request http.Header) error {
	for _, v := range request["Content-Encoding"] {
		for coding := range strings.SplitSeq(v, ",") {
			if coding = strings.TrimSpace(coding); coding != "" && !strings.EqualFold(coding, "identity") {
				response.Set("Accept-Encoding", "identity") // RFC 9110 §15.5.16
				return fmt.Errorf("the message has the Content-Encoding %.100q: send it as it is", coding)
			}
		}
	}
	mediaType, params, err := mime.ParseMediaType(request.Get("Content-Type"))
	if err != nil || mediaType == mediaTypeBinary {
		return nil
	}
	switch charset := params["charset"]; strings.ToLower(charset) {
	case "", "utf-8", "utf8", "us-ascii", "ascii":
		return nil
	default:
		return fmt.Errorf("the message has the charset %.100q: text must be UTF-8", charset)
	}
}

// mediaTypeBinary is the type of a body that is a binary message.
const mediaTypeBinary = "application/octet-stream"

// opcodeOf returns the opcode of a message that comes over HTTP: it is text, and must be, unless its type says that it
// is binary.
func opcodeOf(payload []byte, contentType string) (int, error) {
	// What is malformed is no application/octet-stream, either.
	if mediaType, _, _ := mime.ParseMediaType(contentType); mediaType == mediaTypeBinary {
		return ws.BinaryMessage, nil
	}
	if !utf8.Valid(payload) {
		return 0, errors.New("the message is not valid UTF-8: binary ones have Content-Type application/octet-stream")
	}
	return ws.TextMessage, nil
}

// refusePublish maps a refusal of the registry to its status; wait is how long an errRate lasts.
func refusePublish(header http.Header, err error, wait time.Duration) error {
	if !errors.Is(err, errRate) {
		return refuseJoin(header, err)
	}
	header.Set("Retry-After", strconv.Itoa(int(math.Ceil(wait.Seconds()))))
	return caddyhttp.Error(http.StatusTooManyRequests, err)
}

// maxBuckets bounds how many buckets a scope keeps of either age: together 3 MiB, and more addresses than honest
// publishers have.
const maxBuckets = 8192

// buckets are those of `rate` for the addresses that publish over HTTP. One that nobody has taken from for its window
// is full again: it says nothing, and is forgotten. That needs no clock of its own: from time to time all buckets
// grow old at once, those that were old until then are dropped, and one that is used becomes recent again. With more
// than maxBuckets new ones that happens early. A dropped bucket is then full too soon, for an address that was quiet
// while thousands of others were not; refusing these instead would let an attacker silence everybody.
type buckets struct {
	recent, old map[bucketKey]*rate.Limiter
	// The longest windows among them. What is old was last used before aged.
	recentWindow, oldWindow time.Duration
	aged                    time.Time
}

// A bucketKey is whose bucket it is. A bucket goes with its rate: directives of one hub value may have different ones,
// and after a reload that changes it everybody has a full bucket of the new kind.
type bucketKey struct {
	address netip.Prefix
	rate    hub.Rate
}

// take takes one message from the bucket of an address, or returns how long it takes until there is one.
func (b *buckets) take(now time.Time, address netip.Prefix, r hub.Rate) (wait time.Duration, ok bool) {
	if len(b.recent) >= maxBuckets || now.Sub(b.aged) >= b.oldWindow {
		b.old, b.oldWindow, b.aged = b.recent, b.recentWindow, now
		b.recent, b.recentWindow = map[bucketKey]*rate.Limiter{}, 0
	}
	key := bucketKey{address, r}
	bucket := b.recent[key]
	if bucket == nil {
		bucket = b.old[key]
		if bucket == nil {
			bucket = r.Limiter()
		}
		delete(b.old, key)
		b.recent[key] = bucket
		b.recentWindow = max(b.recentWindow, r.Window)
	}
	if bucket.AllowN(now, 1) {
		return 0, true
	}
	missing := 1 - bucket.TokensAt(now)
	return time.Duration(missing / float64(bucket.Limit()) * float64(time.Second)), false
}
