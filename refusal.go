package chatbroadcast

import (
	"errors"
	"fmt"
	"net/http"
	"slices"
	"sync"
	"time"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/chat-broadcast/caddy-chat-broadcast/internal/fair"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// The reasons for refusing a handshake or a POST, as metrics, events, the log and the placeholder name them.
const (
	refusedHandshake        = "handshake" // only a handshake: any reason without a name of its own
	refusedMessage          = "message"   // only a POST: any reason without a name of its own
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
	refusedUnavailable      = "unavailable"
)

var refusalReasons = []string{
	refusedHandshake, refusedOrigin, refusedHubName, refusedMaxClients, refusedMaxClientsPerHub, refusedMaxClientsPerIP,
	refusedMaxHubs, refusedMaxHubsPerIP, refusedShuttingDown, refusedMessage, refusedRate, refusedBusy, refusedUnavailable,
}

// limitReasons are the reasons that the operator may want to act on. The log has them as warnings.
var limitReasons = []string{
	refusedMaxClients, refusedMaxClientsPerHub, refusedMaxClientsPerIP, refusedMaxHubs, refusedMaxHubsPerIP, refusedRate, refusedBusy,
}

// A refusal is an error with one of these reasons.
type refusal struct {
	error
	reason string
}

// refuse returns the error with which Caddy answers a request.
func refuse(status int, reason string, err error) error {
	return caddyhttp.Error(status, &refusal{err, reason})
}

// Unwrap returns the error itself.
func (r *refusal) Unwrap() error { return r.error }

// refusalReason returns the reason in err, or otherwise if err has none.
func refusalReason(err error, otherwise string) string {
	if r, ok := errors.AsType[*refusal](err); ok {
		return r.reason
	}
	return otherwise
}

// refused reports that r is refused with err to the client, the log, the metrics and the rest of the handler chain.
// otherwise is the reason if err has none.
func (h *Handler) refused(w http.ResponseWriter, r *http.Request, err error, otherwise string) error {
	line := h.newRefusalLine(r, err, otherwise)
	hubs.metrics.refusals.WithLabelValues(line.reason).Inc()
	hubs.refusals.add(line)
	return h.answerRefusal(w, r, err, line)
}

// newRefusalLine returns the log line about r, which is refused with err, and tells the rest of the handler chain.
func (h *Handler) newRefusalLine(r *http.Request, err error, otherwise string) refusalLine {
	status := http.StatusInternalServerError
	why := err
	if e, ok := errors.AsType[caddyhttp.HandlerError](err); ok {
		status, why = e.StatusCode, e.Err
	}
	reason := refusalReason(err, otherwise)
	repl := replacer(r)
	repl.Set(placeholderRefused, reason)
	line := refusalLine{
		refusalKind: refusalKind{reason: reason},

		scope:  h.lease.scope,
		status: status,
		error:  fmt.Sprintf("%.*s", maxRefusalText, why),
	}
	line.hub, _ = repl.GetString(placeholderHub)
	line.user, _ = h.userOf(repl) // "" if the user is the reason
	line.clientIP, _ = clientIP(r)
	return line
}

// answerRefusal answers r, which is refused with err, with one line of text. If the site has error routes, or the server is
// at fault, it returns err instead, and Caddy answers.
func (h *Handler) answerRefusal(w http.ResponseWriter, r *http.Request, err error, line refusalLine) error {
	_, address := clientIP(r)
	hubs.process.Processors.PayRequest(r.Context(), address, fair.RequestWork)
	if line.status == http.StatusInternalServerError || h.placement().site(r).errorRoutes {
		return err
	}
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.Header().Set("X-Content-Type-Options", "nosniff") // the text may quote the request
	w.WriteHeader(line.status)
	_, _ = fmt.Fprintln(w, line.error) // fails only when the connection is gone
	return nil
}

// maxRefusalText bounds the text of a refusal, in characters, because the text may quote the request.
const maxRefusalText = 300

// refusalPause is the shortest time between two log lines about refusals with the same reason.
const refusalPause = time.Second

// A refusalLog logs refusals: for each kind one line in refusalPause at most. A line says how many refusals were omitted
// since the line before. The last refusals of a flood get a line, too.
type refusalLog struct {
	mu sync.Mutex
	// The pauses by kind. A pause begins with a line and ends when nothing was refused in refusalPause.
	pauses map[refusalKind]*refusalBatch
}

// A refusalKind is the reason of a refusal, and whether a check was refused rather than a handshake or a POST.
type refusalKind struct {
	reason string
	check  bool
}

// A refusalBatch has the refusals of one kind since its last line: the newest, and how many there were.
type refusalBatch struct {
	newest refusalLine
	count  int
}

// add logs a refusal at once, or in a pause leaves it for the line after the pause.
func (l *refusalLog) add(line refusalLine) {
	l.mu.Lock()
	p := l.pauses[line.refusalKind]
	if p != nil {
		p.newest, p.count = line, p.count+1
		l.mu.Unlock()
		return
	}
	l.pauseLocked(line.refusalKind)
	l.mu.Unlock()
	line.log(0)
}

// pauseLocked begins the pause after a line. Nobody waits for the timer.
func (l *refusalLog) pauseLocked(kind refusalKind) {
	p := new(refusalBatch)
	l.pauses[kind] = p
	time.AfterFunc(refusalPause, func() { l.resume(kind, p) })
}

// resume ends the pause p. If something was refused in it, resume logs a line and begins another pause.
func (l *refusalLog) resume(kind refusalKind, p *refusalBatch) {
	l.mu.Lock()
	if l.pauses[kind] == p {
		delete(l.pauses, kind)
		if p.count > 0 {
			l.pauseLocked(kind)
		}
	}
	l.mu.Unlock()
	p.log() // add no longer finds p
}

// flush logs the refusals that wait for the end of a pause. It is for the end of the process.
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

// A refusalLine has the fields of a log line about one refusal.
type refusalLine struct {
	refusalKind

	scope               *scope
	hub, user, clientIP string
	status              int
	error               string
}

// log writes the line. omitted is how many other refusals of the same kind it stands for.
func (l refusalLine) log(omitted int) {
	message, level := "request refused", zapcore.InfoLevel
	switch {
	case l.check: // the handshake before it has its own line
		message = "check refused"
	case l.status == http.StatusInternalServerError || slices.Contains(limitReasons, l.reason):
		level = zapcore.WarnLevel
	}
	l.scope.logger().Log(level, message,
		zap.String("reason", l.reason),
		zap.Int("status", l.status),
		logName("hub", l.hub),
		logName("user", l.user),
		zap.String("client_ip", l.clientIP),
		zap.String("error", l.error),
		zap.Int("omitted", omitted))
}
