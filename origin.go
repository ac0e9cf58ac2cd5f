package chatbroadcast

import (
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"strings"

	"github.com/caddyserver/caddy/v2"
)

// anyOrigin is the pattern that lets every page on the web connect.
const anyOrigin = "*"

// checkOrigin refuses a request that a browser makes for a page of another site (RFC 6455 §10.2): browsers do
// not keep pages from opening WebSockets to anywhere, with the visitor's cookies. A request without Origin is
// no browser's.
func (h *Handler) checkOrigin(r *http.Request, repl *caddy.Replacer) error {
	values := r.Header["Origin"]
	if len(values) == 0 || len(h.Origins) == 1 && h.Origins[0] == anyOrigin {
		return nil
	}
	origin, err := parseOrigin(values[0])
	if err != nil || len(values) > 1 {
		return fmt.Errorf("origin %q is not allowed", values)
	}
	own := originPattern{host: r.Host}
	if host, port, err := net.SplitHostPort(r.Host); err == nil {
		own = originPattern{host: host, port: port}
	}
	if own.matches(origin) {
		return nil
	}
	for _, s := range h.Origins {
		// One that is malformed once its placeholders are filled in allows nothing.
		if p, err := parseOriginPattern(repl.ReplaceAll(s, "")); err == nil && p.matches(origin) {
			return nil
		}
	}
	return fmt.Errorf("origin %q is neither the request's host nor listed in origins", values[0])
}

// An originPattern is `[scheme://]host[:port]`. An empty scheme matches any; an empty port stands for the
// default of the Origin's scheme. The host may begin with `*.` for one or more labels.
type originPattern struct{ scheme, host, port string }

// parseOriginPattern parses a pattern without placeholders.
func parseOriginPattern(s string) (originPattern, error) {
	scheme, rest, found := strings.Cut(s, "://")
	if !found {
		scheme, rest = "", s
	}
	// url.Parse knows what a host and a port are; the path and the like must be empty.
	u, err := url.Parse("//" + rest)
	switch {
	case err != nil:
		return originPattern{}, err
	case found && scheme == "":
		return originPattern{}, errors.New("the scheme is missing before ://")
	case u.Host != rest || strings.TrimPrefix(u.Hostname(), "*.") == "":
		return originPattern{}, errors.New("want [scheme://]host[:port]")
	case strings.Contains(strings.TrimPrefix(u.Hostname(), "*."), "*"):
		return originPattern{}, errors.New("* can only stand for the first labels of a host, as in *.example.com")
	}
	return originPattern{scheme: scheme, host: u.Hostname(), port: u.Port()}, nil
}

// parseOrigin parses the value of an Origin header (RFC 6454 §7): scheme, host and perhaps port. `null` is
// none of these, and matches no pattern.
func parseOrigin(s string) (originPattern, error) {
	o, err := parseOriginPattern(s)
	if err == nil && (o.scheme == "" || strings.Contains(o.host, "*")) {
		err = errors.New("not an origin")
	}
	return o, err
}

// defaultPorts are those of the schemes that pages come from.
var defaultPorts = map[string]string{"http": "80", "https": "443"}

// matches reports whether the Origin o is one that p allows.
func (p originPattern) matches(o originPattern) bool {
	if p.scheme != "" && !strings.EqualFold(p.scheme, o.scheme) {
		return false
	}
	defaultPort := defaultPorts[strings.ToLower(o.scheme)]
	if orDefault(p.port, defaultPort) != orDefault(o.port, defaultPort) {
		return false
	}
	// An IPv6 address stands in brackets where no port follows it: as the request's Host.
	host := strings.Trim(p.host, "[]")
	if parent, ok := strings.CutPrefix(host, "*."); ok {
		n := len(o.host) - len(parent) - 1
		return n > 0 && o.host[n] == '.' && strings.EqualFold(o.host[n+1:], parent)
	}
	return strings.EqualFold(host, o.host)
}

func orDefault[T comparable](v, def T) T {
	var zero T
	if v == zero {
		return def
	}
	return v
}

// checkOrigins validates the patterns of a configuration, as far as they have no placeholders.
func checkOrigins(patterns []string) error {
	for _, p := range patterns {
		switch {
		case p == anyOrigin && len(patterns) > 1:
			return errors.New("* allows every origin and stands alone")
		case p == anyOrigin || strings.Contains(p, "{"):
		default:
			if _, err := parseOriginPattern(p); err != nil {
				return fmt.Errorf("pattern %q: %w", p, err)
			}
		}
	}
	return nil
}
