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

// publish publishes the body of r, a POST, in the hub that r asks for, or refuses r. The routes before the handler
// decide which requests come here. The answer is 202 with the number of clients that receive the message, and its
// sequence number. In a hub without clients and without history both are 0, and the hub keeps nothing. A slow body
// holds up nothing but r.
func (h *Handler) publish(w http.ResponseWriter, r *http.Request) error {
	body := &postBody{ReadCloser: r.Body}
	if err := h.tryPublish(w, r, body); err != nil {
		body.discard(w, r)
		return h.refused(w, r, err, refusedMessage)
	}
	return nil
}

// tryPublish is publish, except that it returns an error for a request that it refuses.
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
	// The rate comes before the body, so that it also holds for requests that are refused because of their body.
	if wait, err := hubs.admit(key, address, h.settings.Rate); err != nil {
		return refusePublish(w.Header(), err, wait)
	}
	body.address, body.ended = address, func() bool { return r.Context().Err() != nil }
	defer body.giveBack()
	opcode, payload, err := readMessage(w, r, body, h.settings.MaxMessageSize)
	if err != nil {
		return err
	}
	if err := hubs.checkOpen(key); err != nil { // reading the body may have taken long
		return refusePublish(w.Header(), err, 0)
	}
	m := hub.Message{
		Message: feed.Message{User: user, Opcode: opcode, Payload: payload},
		Source:  hub.FromHTTP,
		Address: address,
	}
	if m.Key, err = idempotencyKey(r.Header, user); err != nil {
		return caddyhttp.Error(http.StatusBadRequest, err)
	}
	published, _, err := hubs.publishOpening(r.Context(), name, m, key, h.settings, h.limits)
	if err != nil {
		return refusePublish(w.Header(), err, 0)
	}
	work := fair.RequestWork + time.Duration(published.Members)*fair.DeliveryWork
	hubs.process.Processors.PayRequest(r.Context(), address, work)
	return answerJSON(w, http.StatusAccepted, publication{published.Members, published.Seq})
}

// maxIdempotencyKey is the longest Idempotency-Key, in bytes.
const maxIdempotencyKey = 255

// idempotencyKey returns the key of a message from the header Idempotency-Key, which makes a POST safe to repeat: a hub with
// history publishes a user's message once, and answers a repetition as it answered the first. Without the header the key is
// zero.
func idempotencyKey(header http.Header, user string) (hub.Key, error) {
	values := header.Values("Idempotency-Key")
	switch {
	case len(values) == 0:
		return hub.Key{}, nil
	case len(values) > 1:
		return hub.Key{}, errors.New("Idempotency-Key: must be there once")
	case values[0] == "" || len(values[0]) > maxIdempotencyKey:
		return hub.Key{}, fmt.Errorf("Idempotency-Key: must be 1 to %d bytes long", maxIdempotencyKey)
	}
	return hub.Key{User: user, ID: values[0]}, nil
}

// A publication is the answer to a request that has published a message: how many clients the hub had, and the number
// of the message.
type publication struct {
	Clients int    `json:"clients"`
	Seq     uint64 `json:"seq"`
}

// check returns an error for numbers that no hub has.
func (p *publication) check() error {
	if p.Clients < 0 {
		return errNegative
	}
	return nil
}

func answerJSON(w http.ResponseWriter, status int, v any) error {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = encodeJSON(w, v) // fails only when the connection is gone
	return nil
}

// readMessage reads the body of r as a message of at most limit bytes, and returns whether it is text or binary. The
// memory that it takes grows with the bytes that arrive, not with the announced length.
func readMessage(w http.ResponseWriter, r *http.Request, body *postBody, limit int) (opcode int, payload []byte, err error) {
	if err := checkEncoding(w.Header(), r.Header); err != nil {
		return 0, nil, caddyhttp.Error(http.StatusUnsupportedMediaType, err)
	}
	tooLarge := func(limit int64) error {
		return caddyhttp.Error(http.StatusRequestEntityTooLarge, fmt.Errorf("the message is longer than %d bytes", limit))
	}
	if r.ContentLength > int64(limit) {
		return 0, nil, tooLarge(int64(limit)) // before a client that waits for 100 (Continue) sends the body
	}
	payload, err = io.ReadAll(http.MaxBytesReader(nil, body, int64(limit)))
	// Caddy's request_body may have set a bound, which fails with the same error.
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

// A postBody is the body of a POST. While the server reads it as a message, it takes memory from the pool that all
// incoming messages share. It waits while its address has its share of that pool.
type postBody struct {
	io.ReadCloser
	asked bool // Read was called, so a client that waits for 100 (Continue) has been sent it

	address     netip.Prefix
	ended       func() bool // whether the request has ended; nil: the bytes are discarded and take no memory
	read, taken int         // bytes
}

// Read implements io.Reader.
func (b *postBody) Read(p []byte) (int, error) {
	b.asked = true
	n, err := b.ReadCloser.Read(p)
	b.read += n
	if b.ended != nil && b.read > hub.FreeMessage && b.read > b.taken {
		more := max(b.read, 2*b.taken) - b.taken // about as the buffer of io.ReadAll grows
		if !hubs.process.Incoming.Await(b.address, more, b.ended) {
			return n, errBusy
		}
		b.taken += more
	}
	return n, err
}

// giveBack gives back the memory that the message has taken. The caller keeps the message no longer.
func (b *postBody) giveBack() {
	if b.taken > 0 {
		hubs.process.Incoming.Give(b.address, b.taken)
	}
	b.ended, b.taken = nil, 0
}

// maxDiscardedBody, in bytes, and discardTimeout bound how much of a refused body discard reads.
const (
	maxDiscardedBody = 16 << 20
	discardTimeout   = 5 * time.Second
)

// discard reads the rest of the body of r, which the server refuses, before the answer. Otherwise the server would
// close a connection with unread bytes in it. TCP would reset it, and a client that is still sending would lose the
// answer.
//
// As for a client that is closed, discard reads at most maxDiscardedBody bytes, for discardTimeout at most. It reads
// nothing of a body whose announced length is larger, or from a client that waits for 100 (Continue). Nor does it read
// over HTTP/2 and HTTP/3, where the answer ends a stream and not the connection.
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
		_ = conn.SetReadDeadline(time.Time{}) // net/http sets a deadline for the next request
	}
	if !atEnd {
		w.Header().Set("Connection", "close")
	}
}

// checkEncoding refuses a body that would be nonsense as a message: a compressed one, or text in another charset than
// UTF-8 and its subset US-ASCII. It may set a header that belongs to the refusal. It takes a malformed Content-Type for
// one without a charset.
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

// mediaTypeBinary is the Content-Type of a binary message.
const mediaTypeBinary = "application/octet-stream"

// opcodeOf returns the opcode of a message that comes over HTTP. A message is binary if its Content-Type says so.
// Otherwise it is text, and opcodeOf returns an error if it is not valid UTF-8.
func opcodeOf(payload []byte, contentType string) (int, error) {
	// A malformed Content-Type counts as text.
	if mediaType, _, _ := mime.ParseMediaType(contentType); mediaType == mediaTypeBinary {
		return ws.BinaryMessage, nil
	}
	if !utf8.Valid(payload) {
		return 0, errors.New("the message is not valid UTF-8: binary ones have Content-Type application/octet-stream")
	}
	return ws.TextMessage, nil
}

// refusePublish maps a refusal of the registry to an HTTP status. wait is how long an errRate lasts.
func refusePublish(header http.Header, err error, wait time.Duration) error {
	switch {
	case errors.Is(err, hub.ErrUnknown):
		return refuse(http.StatusGatewayTimeout, refusedUnavailable, err)
	case errors.Is(err, hub.ErrUnavailable):
		header.Set("Retry-After", retryAfter)
		return refuse(http.StatusServiceUnavailable, refusedUnavailable, err)
	case !errors.Is(err, errRate):
		return refuseJoin(header, err)
	}
	header.Set("Retry-After", strconv.Itoa(int(math.Ceil(wait.Seconds()))))
	return caddyhttp.Error(http.StatusTooManyRequests, err)
}

// maxBuckets bounds how many recent and how many old buckets a scope keeps. Both together take 3 MiB, and honest
// publishers have fewer addresses.
const maxBuckets = 8192

// buckets are the buckets of `rate` for the addresses that publish over HTTP. A bucket that nobody has used for its
// window is full again, so it can be forgotten. That needs no timer. From time to time take drops all old buckets and
// makes the recent ones old; a bucket that is used becomes recent again.
//
// With maxBuckets recent buckets that happens early. Then a bucket may be dropped before it is full, and its address
// gets a full one too soon: an address that was quiet while thousands of others were not. To refuse new addresses
// instead would let an attacker silence everybody.
type buckets struct {
	recent, old map[bucketKey]*rate.Limiter
	// The longest windows of the recent and of the old buckets. Old buckets were last used before aged.
	recentWindow, oldWindow time.Duration
	aged                    time.Time
}

// A bucketKey names a bucket: one address and one rate. Handlers with the same hub value may have different rates.
// After a reload that changes the rate every address has a full bucket of the new rate.
type bucketKey struct {
	address netip.Prefix
	rate    hub.Rate
}

// take takes one message from the bucket of an address. If the bucket is empty, it returns how long the address must
// wait for room.
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
