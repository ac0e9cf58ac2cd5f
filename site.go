package chatbroadcast

import (
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

// The patterns of sites that no host matcher selects.
const (
	patternAny     = "*" // requests for every host reach the Handler
	patternUnknown = "?" // a handler of another plugin contains the Handler and hides the host matchers before it
)

// The prefixes of the names of default hubs. Names that an operator configures must not begin with them.
var defaultHubPrefixes = [...]string{"http://", "https://"}

// errDefaultHubName explains why a configured name must not begin with one of defaultHubPrefixes.
var errDefaultHubName = errors.New("names that begin with http:// or https:// belong to default hubs; leave hub out to join those")

// isDefaultHubName reports whether name is reserved for default hubs.
func isDefaultHubName(name string) bool {
	return slices.ContainsFunc(defaultHubPrefixes[:], func(prefix string) bool { return strings.HasPrefix(name, prefix) })
}

// A placement describes where a Handler stands in the routes of its server. It does not change once the server is
// provisioned.
type placement struct {
	server *caddyhttp.Server
	chains []chain // in the order of the routes
	bind   string  // the first address on which the server listens, "" for all interfaces
	port   uint    // 0 where the network has no ports

	comparesHost bool // a matcher other than host may look at the request's host
}

// A chain is one sequence of nested routes from the server to the Handler.
type chain struct {
	hosts  []caddyhttp.MatchHost // a request passes only if all of them match
	errors []caddyhttp.RouteList // the routes for errors of the server and of the subroutes in the chain
}

// newPlacement finds h in the routes of server, which is nil if h does not belong to one.
func newPlacement(h *Handler, server *caddyhttp.Server) *placement {
	p := &placement{server: server}
	if server == nil {
		return p
	}
	s := search{handler: h, placement: p, invoked: map[string]bool{}}
	var top chain
	if server.Errors != nil {
		s.follow(server.Errors.Routes, top)
		top.errors = append(top.errors, server.Errors.Routes)
	}
	s.follow(server.Routes, top)
	p.comparesHost = p.anyMatcher(mayCompareHost)
	if len(server.Listen) == 0 {
		return p
	}
	// Caddy refuses two servers with a common address, so any address of a server names it.
	first := slices.Min(server.Listen)
	address, err := caddy.ParseNetworkAddress(first)
	if err != nil { // Caddy has parsed it before
		address = caddy.NetworkAddress{Network: "tcp", Host: first}
	}
	p.bind, p.port = address.Host, address.StartPort
	p.bind, _, _ = strings.Cut(p.bind, "|") // the permissions of a Unix socket
	switch {
	case address.Network != "tcp":
		p.bind = address.Network + "/" + p.bind
	case strings.Contains(p.bind, ":"):
		p.bind = "[" + p.bind + "]"
	}
	p.bind = strings.ReplaceAll(p.bind, "/", "%2F") // such as unix%2F%2Frun%2Fcaddy.sock
	return p
}

// A search finds the chains that lead to handler.
type search struct {
	handler   *Handler
	placement *placement
	invoked   map[string]bool // the named routes that the current chain is in
}

// follow searches routes. soFar is the chain that leads to them.
func (s search) follow(routes caddyhttp.RouteList, soFar chain) {
	for _, route := range routes {
		for _, hosts := range hostAlternatives(route.MatcherSets) {
			c := chain{hosts: slices.Concat(soFar.hosts, hosts), errors: soFar.errors}
			for _, handler := range route.Handlers {
				s.enter(handler, c)
			}
		}
	}
}

// enter searches one handler. c is the chain that leads to it.
func (s search) enter(handler caddyhttp.MiddlewareHandler, c chain) {
	switch handler := handler.(type) {
	case *Handler:
		if handler == s.handler {
			s.placement.chains = append(s.placement.chains, c)
		}
	case *caddyhttp.Subroute:
		if handler.Errors != nil {
			s.follow(handler.Errors.Routes, c)
			c.errors = slices.Concat(c.errors, []caddyhttp.RouteList{handler.Errors.Routes})
		}
		s.follow(handler.Routes, c)
	case *caddyhttp.Invoke:
		route := s.placement.server.NamedRoutes[handler.Name]
		if route == nil || s.invoked[handler.Name] {
			return
		}
		s.invoked[handler.Name] = true
		s.follow(caddyhttp.RouteList{*route}, c)
		delete(s.invoked, handler.Name)
	}
}

// hostAlternatives returns the host matchers of each matcher set. A request must pass one of the sets. All sets without
// host matchers are one alternative, so that they do not multiply the chains.
func hostAlternatives(sets caddyhttp.MatcherSets) (alternatives [][]caddyhttp.MatchHost) {
	withoutHosts := len(sets) == 0
	for _, set := range sets {
		if hosts := hostMatchers(set); len(hosts) > 0 {
			alternatives = append(alternatives, hosts)
		} else {
			withoutHosts = true
		}
	}
	if withoutHosts {
		alternatives = append(alternatives, nil)
	}
	return alternatives
}

func hostMatchers(set caddyhttp.MatcherSet) (hosts []caddyhttp.MatchHost) {
	for _, matcher := range set {
		if m, ok := matcher.(*caddyhttp.MatchHost); ok {
			hosts = append(hosts, *m)
		}
	}
	return hosts
}

// A site is the part of the configuration through which a request has come. A client cannot choose it without passing
// the routes of that site.
type site struct {
	// The pattern of the host matcher that let the request through, the most specific one if several did, or one of
	// patternAny and patternUnknown.
	pattern string

	// Whether pattern is a host's name and therefore the request's host.
	literal bool

	// Whether the configuration has routes for errors (`handle_errors`) that apply to the site's host.
	errorRoutes bool
}

// site returns the site through which r has come.
func (p *placement) site(r *http.Request) site {
	for _, c := range p.chains {
		s := site{pattern: patternAny}
		if c.admits(r, &s) {
			s.errorRoutes = slices.ContainsFunc(c.errors, func(routes caddyhttp.RouteList) bool { return applies(routes, r) })
			return s
		}
	}
	return site{
		pattern:     patternUnknown,
		errorRoutes: p.server != nil && p.server.Errors != nil && len(p.server.Errors.Routes) > 0,
	}
}

// admits reports whether all host matchers of c match r. It stores the most specific pattern in s; of patterns with
// wildcards or placeholders, the innermost one.
func (c chain) admits(r *http.Request, s *site) bool {
	for _, m := range c.hosts {
		pattern, literal, ok := matchingPattern(m, r)
		if !ok {
			return false
		}
		if !s.literal {
			s.pattern, s.literal = pattern, literal
		}
	}
	return true
}

// matchingPattern returns the pattern of m that matches r, and whether it is a host's name. It compares as Caddy does.
// Caddy has converted the patterns to Punycode.
func matchingPattern(m caddyhttp.MatchHost, r *http.Request) (pattern string, literal, ok bool) {
	host := requestHost(r)
	fuzzy := func(pattern string) bool { return strings.ContainsAny(pattern, "*{") }
	for _, pattern := range m {
		if !fuzzy(pattern) && strings.EqualFold(pattern, host) {
			return strings.ToLower(pattern), true, true
		}
	}
	for _, pattern := range m {
		if fuzzy(pattern) && (caddyhttp.MatchHost{pattern}).Match(r) {
			return pattern, false, true
		}
	}
	return "", false, false
}

// applies reports whether one of routes applies to the host of r.
func applies(routes caddyhttp.RouteList, r *http.Request) bool {
	return slices.ContainsFunc(routes, func(route caddyhttp.Route) bool {
		return slices.ContainsFunc(hostAlternatives(route.MatcherSets), func(hosts []caddyhttp.MatchHost) bool {
			return !slices.ContainsFunc(hosts, func(m caddyhttp.MatchHost) bool { return !m.Match(r) })
		})
	})
}

// requestHost returns the host that r asks for, without its port and without brackets, as Caddy's host matcher sees it.
func requestHost(r *http.Request) string {
	if host, _, err := net.SplitHostPort(r.Host); err == nil {
		return host
	}
	return strings.TrimSuffix(strings.TrimPrefix(r.Host, "["), "]")
}

// hubName returns the name of the default hub that r asks for: the scheme, the site, and the path as the client sent
// it. In a site that serves many hosts, the host follows the site. The client chooses only the part after the site, so
// no request to one site gets a name of another site.
func (p *placement) hubName(r *http.Request) (string, error) {
	s := p.site(r)
	scheme, defaultPort := "http", uint(caddyhttp.DefaultHTTPPort)
	if r.TLS != nil {
		scheme, defaultPort = "https", caddyhttp.DefaultHTTPSPort
	}
	name := scheme + "://" + bracketed(s.pattern)
	if p.bind != "" {
		name += "@" + p.bind
	}
	if p.port != 0 && p.port != defaultPort {
		name += ":" + strconv.FormatUint(uint64(p.port), 10)
	}
	if !s.literal {
		host, err := p.hubHost(r, s)
		if err != nil {
			return "", err
		}
		name += "/" + host
	}
	path, _ := replacer(r).GetString("http.request.orig_uri.path")
	if !strings.HasPrefix(path, "/") {
		return "", fmt.Errorf("a default hub needs a path that begins with /, got %q", path)
	}
	return name + path, nil
}

// hubHost returns the host that r asks for, as it stands in the name of a default hub of s, a site that serves many
// hosts. That is the host's canonical form, so that all spellings of a host share a hub. There are two exceptions.
//
// If a host matcher of the server would match the canonical form, hubHost keeps the spelling that the client sent. With
// its spelling the client may have gone past that matcher, and past the authentication behind it. If another matcher
// may compare hosts in its own way, hubHost returns the host exactly as the client sent it, with its case and port.
func (p *placement) hubHost(r *http.Request, s site) (string, error) {
	sent := strings.ToLower(requestHost(r))
	canonical := strings.TrimSuffix(sent, ".")
	if address, err := netip.ParseAddr(sent); err == nil && address.Zone() == "" {
		canonical = address.String()
	} else if strings.IndexFunc(sent, notInHostName) >= 0 || slices.Contains(strings.Split(canonical, "."), "") {
		return "", fmt.Errorf("a default hub needs a host that is a name or an address, got %q", r.Host)
	}
	if p.comparesHost {
		return r.Host, nil
	}
	if canonical != sent && (s.pattern == patternUnknown || p.matchesHost(r, canonical)) {
		canonical = sent
	}
	return bracketed(canonical), nil
}

// notInHostName reports whether c cannot be in a host's name in lower case. Browsers convert other characters to
// Punycode.
func notInHostName(c rune) bool {
	return (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' && c != '.' && c != '_'
}

// bracketed returns host as it stands in a URL, which puts an IPv6 address in brackets.
func bracketed(host string) string {
	if strings.Contains(host, ":") {
		return "[" + host + "]"
	}
	return host
}

// matchesHost reports whether a host matcher anywhere in the server's routes would match r if it asked for host.
func (p *placement) matchesHost(r *http.Request, host string) bool {
	r = r.WithContext(r.Context()) // a copy
	r.Host = bracketed(host)
	return p.anyMatcher(func(matcher any) bool {
		m, ok := matcher.(*caddyhttp.MatchHost)
		return ok && m.Match(r)
	})
}

// anyMatcher reports whether is returns true for any matcher in the server's routes, negated ones included.
func (p *placement) anyMatcher(is func(matcher any) bool) bool {
	if anyMatcherOf(p.server.Routes, is) || p.server.Errors != nil && anyMatcherOf(p.server.Errors.Routes, is) {
		return true
	}
	for _, route := range p.server.NamedRoutes {
		if anyMatcherOf(caddyhttp.RouteList{*route}, is) {
			return true
		}
	}
	return false
}

func anyMatcherOf(routes caddyhttp.RouteList, is func(matcher any) bool) bool {
	for _, route := range routes {
		if anyMatcherIn(route.MatcherSets, is) {
			return true
		}
		for _, handler := range route.Handlers {
			subroute, ok := handler.(*caddyhttp.Subroute)
			if ok && (anyMatcherOf(subroute.Routes, is) || subroute.Errors != nil && anyMatcherOf(subroute.Errors.Routes, is)) {
				return true
			}
		}
	}
	return false
}

func anyMatcherIn(sets caddyhttp.MatcherSets, is func(matcher any) bool) bool {
	for _, set := range sets {
		for _, matcher := range set {
			if not, ok := matcher.(*caddyhttp.MatchNot); ok && anyMatcherIn(not.MatcherSets, is) || is(matcher) {
				return true
			}
		}
	}
	return false
}

// mayCompareHost reports whether matcher may compare the request's host in its own way, in which two spellings of a
// host differ. Expressions, variables, the header Host and matchers of other plugins may.
func mayCompareHost(matcher any) bool {
	switch m := matcher.(type) {
	case *caddyhttp.MatchHost, *caddyhttp.MatchNot, *caddyhttp.MatchPath, *caddyhttp.MatchPathRE, *caddyhttp.MatchMethod,
		*caddyhttp.MatchQuery, *caddyhttp.MatchProtocol, *caddyhttp.MatchTLS, *caddyhttp.MatchRemoteIP, *caddyhttp.MatchClientIP:
		return false
	case *caddyhttp.MatchExpression:
		return strings.Contains(strings.ToLower(m.Expr), "host")
	case *caddyhttp.MatchHeader:
		_, host := (*m)["Host"]
		return host
	case *caddyhttp.MatchHeaderRE:
		_, host := (*m)["Host"]
		return host
	}
	module, ok := matcher.(caddy.Module)
	return !ok || module.CaddyModule().ID != "http.matchers.file"
}
