package chatbroadcast

import (
	"net/http"
	"net/url"
	"strings"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/chat-broadcast/caddy-chat-broadcast/internal/fair"
)

// A check is a request that asks what a handshake would get. Browsers tell a page nothing about a handshake that was
// refused, but let it read the answer to a check.

// A GET with checkParameter in its query, or with checkHeader, is a check. Pages of other origins should use the parameter:
// before a request with such a header browsers ask the server for permission, and the server does not answer that.
const (
	checkParameter = "chat_broadcast_check"
	checkHeader    = "Chat-Broadcast-Check"
)

// isCheck reports whether r is a check.
func isCheck(r *http.Request) bool {
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		return false
	}
	if _, ok := r.Header[checkHeader]; ok {
		return true
	}
	// Most requests that come here are for pages. Parse the query only if it may have the parameter.
	return strings.Contains(r.URL.RawQuery, checkParameter) && r.URL.Query().Has(checkParameter)
}

// check answers r, a check: 204 if the server would now accept a client of the events protocol with the URL, the origin and
// the user of r, and otherwise the refusal. A page learns no more than from a handshake: the checks are the same, and only
// pages that may connect can read the answer. Others cannot even see whether it is an error, which could tell them whether
// the visitor has signed in here.
//
// A check is no client: it takes no place, opens no hub, counts in no metric and causes no event. Its log lines are its own.
// To its address it costs as much as a handshake, see fair.Processors.
func (h *Handler) check(w http.ResponseWriter, r *http.Request) error {
	w.Header().Set("Cache-Control", "no-store")
	w.Header().Add("Vary", "Origin")
	w.Header().Set("Cross-Origin-Resource-Policy", "same-origin") // for <script> and <img>, which need no permission to load
	if err := h.tryCheck(w.Header(), r); err != nil {
		line := h.newRefusalLine(r, err, refusedHandshake)
		line.check = true
		hubs.refusals.add(line)
		return h.answerRefusal(w, r, err, line)
	}
	_, address := clientIP(r)
	hubs.process.Processors.PayRequest(r.Context(), address, fair.RequestWork)
	w.WriteHeader(http.StatusNoContent)
	return nil
}

// tryCheck returns the error with which tryUpgrade would refuse a handshake in place of r, or nil. It may set headers that
// belong to the answer.
func (h *Handler) tryCheck(header http.Header, r *http.Request) error {
	repl := replacer(r)
	name, err := h.hubFor(withOrigin(r), repl)
	if refusalReason(err, "") != refusedOrigin {
		allowPage(header, r)
	}
	if err != nil {
		return err
	}
	if _, err := h.userOf(repl); err != nil {
		return err
	}
	if _, _, err := replayOf(r.URL.Query()); err != nil {
		return caddyhttp.Error(http.StatusBadRequest, err)
	}
	_, address := clientIP(r)
	if err := hubs.checkJoin(r.Context(), h.lease.scope.key, name, address, h.limits); err != nil {
		return refuseJoin(header, err)
	}
	return nil
}

// withOrigin returns r with the Origin that a handshake would have. A browser sends an Origin with each handshake, but none
// with a GET by a page of the same origin. There the page is in Referer, unless the page forbids that. The server may still
// know that origin under another name, because of a proxy in front.
func withOrigin(r *http.Request) *http.Request {
	page, err := url.Parse(r.Referer())
	if err != nil || page.Host == "" || len(r.Header["Origin"]) > 0 {
		return r
	}
	with := *r
	with.Header = r.Header.Clone()
	with.Header.Set("Origin", page.Scheme+"://"+page.Host)
	return &with
}

// allowPage lets the page of r, whose origin may connect, read the answer although the page may be of another origin.
func allowPage(header http.Header, r *http.Request) {
	origin := r.Header["Origin"]
	if len(origin) != 1 {
		return
	}
	header.Set("Access-Control-Allow-Origin", origin[0])
	header.Set("Access-Control-Allow-Credentials", "true")
	header.Set("Access-Control-Expose-Headers", "Retry-After")
}
