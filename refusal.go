package chatbroadcast

import (
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/chat-broadcast/caddy-chat-broadcast/internal/fair"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// The reasons for which a handshake or a POST is refused, as metrics, events, the log and the placeholder give them.
const (
	refusedHandshake        = "handshake" // only a handshake, for what no other reason covers
	refusedMessage          = "message"   // only a POST, for what no other reason covers
	refusedRate             = "rate"      // only a POST
	refusedOrigin           = "origin"
	refusedHubName          = "hub_name"
	refusedMaxClients       = "max_clients"
	refusedMaxClientsPerHub = "max_clients_per_hub"
	refusedMaxClientsPerIP  = "max_clients_per_ip"
	refusedMaxHubs          = "max_hubs"
	refusedMaxHubsPerIP     = "max_hubs_per_ip"
	refusedShuttingDown     = "shutting_down"
	refusedBusy             = "busy" // only a POST
)

var refusalReasons = []string{
	refusedHandshake, refusedOrigin, refusedHubName, refusedMaxClients, refusedMaxClientsPerHub, refusedMaxClientsPerIP,
	refusedMaxHubs, refusedMaxHubsPerIP, refusedShuttingDown, refusedMessage, refusedRate, refusedBusy,
}

// limitReasons are those that the operator may want to do something about.
var limitReasons = []string{
	refusedMaxClients, refusedMaxClientsPerHub, refusedMaxClientsPerIP, refusedMaxHubs, refusedMaxHubsPerIP, refusedRate, refusedBusy,
}

// A refusal is an error with one of these reasons.
type refusal struct {
	error
	reason string
}

// refuse returns the error for Caddy to answer a request with.
func refuse(status int, reason string, err error) error {
	return caddyhttp.Error(status, &refusal{err, reason})
}

// Unwrap returns the error itself.
func (r *refusal) Unwrap() error { return r.error }

// refusalReason returns why a request was refused with err, or else otherwise.
func refusalReason(err error, otherwise string) string {
	if r, ok := errors.AsType[*refusal](err); ok {
		return r.reason
	}
	return otherwise
}

// refused tells everybody concerned that r is refused with err: the client, the log, the metrics and the rest of the
// handler chain. otherwise is the reason where err has none. The answer is one line of text; but if err is for error routes,
// or a fault of the server, refused returns it for Caddy to answer.
func (h *Handler) refused(w http.ResponseWriter, r *http.Request, err error, otherwise string) error {
	status := http.StatusInternalServerError
	why := err
	if e, ok := errors.AsType[caddyhttp.HandlerError](err); ok {
		status, why = e.StatusCode, e.Err
	}
	reason := refusalReason(err, otherwise)
	repl := replacer(r)
	repl.Set(placeholderRefused, reason)
	hubs.metrics.refusals.WithLabelValues(reason).Inc()
	line := refusalLine{
		scope:  h.lease.scope,
		reason: reason,
		status: status,
		error:  fmt.Sprintf("%.*s", maxRefusalText, why),
	}
	line.hub, _ = repl.GetString(placeholderHub)
	line.user, _ = h.userOf(repl) // none if that is what was refused
	var address netip.Prefix
	line.clientIP, address = clientIP(r)
	hubs.refusals.add(line)
	hubs.process.Processors.PayRequest(r.Context(), address, fair.RequestWork)
	if status == http.StatusInternalServerError || h.placement().site(r).errorRoutes {
		return err
	}
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.Header().Set("X-Content-Type-Options", "nosniff") // the text may quote the request
	w.WriteHeader(status)
	_, _ = fmt.Fprintln(w, line.error) // fails only when nobody reads the answer any more
	return nil
}

// maxRefusalText bounds the text of a refusal, in characters: it may quote the request.
const maxRefusalText = 300

// refusalPause is the least time between two lines of the log about refusals with the same reason.
const refusalPause = time.Second

// A refusalLog logs refusals, for each reason one line in refusalPause at most. A line says how many others it has left
// out since the line before; those at the end of a flood get a line, too.
type refusalLog struct {
	mu sync.Mutex
	// By reason, from a line until refusalPause has passed without a refusal.
	pauses map[string]*refusalBatch
}

// A refusalBatch is what was refused for one reason since its last line: the newest, and how many in all.
type refusalBatch struct {
	newest refusalLine
	count  int
}

// add logs a refusal, or leaves it for the line after the pause.
func (l *refusalLog) add(line refusalLine) {
	l.mu.Lock()
	p := l.pauses[line.reason]
	if p != nil {
		p.newest, p.count = line, p.count+1
		l.mu.Unlock()
		return
	}
	l.pauseLocked(line.reason)
	l.mu.Unlock()
	line.log(0)
}

// pauseLocked begins the pause after a line. Nobody waits for its end.
func (l *refusalLog) pauseLocked(reason string) {
	p := new(refusalBatch)
	l.pauses[reason] = p
	time.AfterFunc(refusalPause, func() { l.resume(reason, p) })
}

// resume ends the pause p: with a line and another pause, if something was refused meanwhile.
func (l *refusalLog) resume(reason string, p *refusalBatch) {
	l.mu.Lock()
	if l.pauses[reason] == p {
		delete(l.pauses, reason)
		if p.count > 0 {
			l.pauseLocked(reason)
		}
	}
	l.mu.Unlock()
	p.log() // nobody else has it any more
}

// flush logs what waits for the end of a pause. It is for the end of the process.
func (l *refusalLog) flush() {
	l.mu.Lock()
	all := make([]refusalBatch, 0, len(l.pauses))
	for _, p := range l.pauses {
		all = append(all, *p)
		*p = refusalBatch{}
	}
	l.mu.Unlock()
	for _, p := range all {
		p.log()
	}
}

func (p refusalBatch) log() {
	if p.count > 0 {
		p.newest.log(p.count - 1)
	}
}

// A refusalLine is what the log says of one refusal.
type refusalLine struct {
	scope                       *scope
	reason, hub, user, clientIP string
	status                      int
	error                       string
}

// log writes the line, and how many refusals with the same reason it leaves out.
func (l refusalLine) log(omitted int) {
	level := zapcore.InfoLevel
	if l.status == http.StatusInternalServerError || slices.Contains(limitReasons, l.reason) {
		level = zapcore.WarnLevel
	}
	l.scope.logger().Log(level, "request refused",
		zap.String("reason", l.reason),
		zap.Int("status", l.status),
		logName("hub", l.hub),
		logName("user", l.user),
		zap.String("client_ip", l.clientIP),
		zap.String("error", l.error),
		zap.Int("omitted", omitted))
}
