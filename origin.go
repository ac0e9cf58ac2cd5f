package chatbroadcast

import (
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/caddyserver/caddy/v2"
	"golang.org/x/net/idna"
)

// anyOrigin is the pattern that allows every page on the web to connect.
const anyOrigin = "*"

// fileOrigin is the Origin of pages that an app opens from files, and the pattern for it.
const fileOrigin = "file://"

// checkOrigin refuses a request that a browser makes for a page of another site (RFC 6455 §10.2). Browsers let any page
// open a WebSocket to any server, with the visitor's cookies.
//
// Browsers send Origin with each WebSocket handshake and with nearly each POST; other programs need not. A request
// without Origin passes, unless its Sec-Fetch-Site says that a page of another site made it. Then the site is unknown,
// and only * lets the request pass.
func (h *Handler) checkOrigin(r *http.Request, repl *caddy.Replacer) error {
	if len(h.Origins) == 1 && h.Origins[0] == anyOrigin {
		return nil
	}
	values := r.Header["Origin"]
	switch {
	case len(values) == 0:
		return checkFetchSite(r.Header["Sec-Fetch-Site"])
	case len(values) > 1:
		return fmt.Errorf("the request has %d Origin headers", len(values))
	case values[0] == "null":
		return errors.New("only origins * allows origin null, which sandboxed frames of any site have")
	}
	origin, err := parseOrigin(values[0])
	if err != nil {
		return fmt.Errorf("origin %.100q is malformed", values[0])
	}
	own := originPattern{host: r.Host}
	if host, port, err := net.SplitHostPort(r.Host); err == nil {
		own = originPattern{host: host, port: port}
	}
	ownHost := own.matches(origin)
	// Anybody on the visitor's network can forge a page without TLS, so such a page does not belong to a site with TLS.
	// A request without TLS may come from a page with TLS, because a proxy may have ended TLS before Caddy.
	if ownHost && (origin.scheme == "https" || origin.scheme == "http" && r.TLS == nil) {
		return nil
	}
	for _, s := range h.Origins {
		// If a pattern is malformed with its placeholders filled in, it allows nothing.
		if p, err := parseOriginPattern(repl.ReplaceAll(s, "")); err == nil && p.matches(origin) {
			return nil
		}
	}
	if ownHost {
		return fmt.Errorf("origin %.100q has another scheme than the request, and origins does not list it", values[0])
	}
	return fmt.Errorf("origin %.100q is not the request's host, and origins does not list it", values[0])
}

// checkFetchSite refuses a request if its Sec-Fetch-Site says that a page of another site made it (W3C Fetch Metadata
// Request Headers, §2.4). The value "none" means that the visitor made it, not a page.
func checkFetchSite(values []string) error {
	for _, v := range values {
		if v != "same-origin" && v != "none" {
			return fmt.Errorf("the request has no Origin, and its Sec-Fetch-Site is %.100q, not same-origin or none", v)
		}
	}
	return nil
}

// An originPattern is `[scheme://]host[:port]`. An empty scheme matches any; an empty port stands for the
// default of the Origin's scheme. The host may begin with `*.` for one or more labels. Only fileOrigin has no host.
type originPattern struct{ scheme, host, port string }

// parseOriginPattern parses a pattern without placeholders. It returns the scheme in lower case, and the host in ASCII,
// as browsers send it. It returns an error for a pattern that no Origin can match.
func parseOriginPattern(s string) (originPattern, error) {
	if s == fileOrigin {
		return originPattern{scheme: "file"}, nil
	}
	_, rest, found := strings.Cut(s, "://")
	full := s
	if !found {
		rest, full = s, "//"+s
	}
	// url.Parse finds the scheme, the host and the port. The path and everything after it must be empty.
	u, err := url.Parse(full)
	if err != nil {
		return originPattern{}, err
	}
	host, wildcard := strings.CutPrefix(u.Hostname(), "*.")
	switch {
	case u.Host != rest || host == "":
		return originPattern{}, errors.New("want [scheme://]host[:port]")
	case strings.Contains(host, "*"):
		return originPattern{}, errors.New("* can only stand for the first labels of a host, as in *.example.com")
	}
	if host, err = asciiHost(host); err != nil {
		return originPattern{}, err
	}
	if wildcard {
		host = "*." + host
	}
	port := u.Port()
	if n, err := strconv.ParseUint(port, 10, 16); port != "" && (err != nil || strconv.FormatUint(n, 10) != port) {
		return originPattern{}, fmt.Errorf("no Origin has the port %s", port)
	}
	return originPattern{scheme: u.Scheme, host: host, port: port}, nil
}

// asciiHost returns host as a browser writes it in an Origin, except that it keeps capitals in ASCII. host must have no
// brackets.
func asciiHost(host string) (string, error) {
	if addr, err := netip.ParseAddr(host); err == nil && addr.Zone() == "" {
		return addr.String(), nil
	}
	if strings.ContainsFunc(host, func(c rune) bool { return c >= utf8.RuneSelf }) {
		ascii, err := idna.Lookup.ToASCII(host)
		if err != nil {
			return "", fmt.Errorf("the host is not an internationalized domain name: %w", err)
		}
		host = ascii
	}
	isHost := func(c rune) bool {
		return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || strings.ContainsRune("-._", c)
	}
	if i := strings.IndexFunc(host, func(c rune) bool { return !isHost(c) }); i >= 0 {
		return "", fmt.Errorf("no host contains %q", host[i])
	}
	return host, nil
}

// parseOrigin parses the value of an Origin header (RFC 6454 §7): scheme, host and perhaps port. It ignores a slash at
// the end, which some clients send although it does not belong there. It returns an error for `null`.
func parseOrigin(s string) (originPattern, error) {
	if s != fileOrigin {
		s = strings.TrimSuffix(s, "/")
	}
	o, err := parseOriginPattern(s)
	if err == nil && (o.scheme == "" || strings.Contains(o.host, "*")) {
		err = errors.New("not an origin")
	}
	return o, err
}

// defaultPorts has the default ports of the schemes that pages have.
var defaultPorts = map[string]string{"http": "80", "https": "443"}

// matches reports whether p allows the Origin o.
func (p originPattern) matches(o originPattern) bool {
	if p.scheme != "" && p.scheme != o.scheme {
		return false
	}
	defaultPort := defaultPorts[o.scheme]
	if orDefault(p.port, defaultPort) != orDefault(o.port, defaultPort) {
		return false
	}
	// The host of p has brackets if it is an IPv6 address from a request's Host without a port.
	host := strings.Trim(p.host, "[]")
	if parent, ok := strings.CutPrefix(host, "*."); ok {
		n := len(o.host) - len(parent) - 1
		return n > 0 && o.host[n] == '.' && strings.EqualFold(o.host[n+1:], parent)
	}
	return strings.EqualFold(host, o.host)
}

// checkOrigins checks the patterns of a configuration. It does not check a pattern with placeholders.
func checkOrigins(patterns []string) error {
	for _, p := range patterns {
		switch {
		case p == anyOrigin && len(patterns) > 1:
			return errors.New("* allows every origin and stands alone")
		case p == anyOrigin || strings.Contains(p, "{"):
		case p == "null":
			return errors.New("pattern null: only * allows the origin null, which sandboxed frames of any site have; " +
				"the pages of an app can have the origin file://, or a scheme of their own as in app://localhost")
		case strings.Contains(p, ","):
			return fmt.Errorf("pattern %q: patterns are separated by spaces, not by commas", p)
		default:
			if _, err := parseOriginPattern(p); err != nil {
				return fmt.Errorf("pattern %q: %w", p, err)
			}
		}
	}
	return nil
}
