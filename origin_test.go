package chatbroadcast

import (
	"net/http"
	"testing"

	"github.com/caddyserver/caddy/v2"
)

func TestOrigin_Allowed(t *testing.T) {
	repl := caddy.NewEmptyReplacer()
	repl.Set("site", "app.example.com")
	for _, tc := range []struct {
		name     string
		host     string // of the request
		patterns []string
		origin   string // "-": none
		want     bool
	}{
		{"no origin is no browser", "example.com", nil, "-", true},
		{"the own host", "example.com", nil, "https://example.com", true},
		{"the own host, in capitals", "example.com", nil, "https://EXAMPLE.com", true},
		{"the own host and port", "example.com:8080", nil, "http://example.com:8080", true},
		{"the own host, default port written out", "example.com:443", nil, "https://example.com", true},
		{"the own host, default port in the origin", "example.com", nil, "http://example.com:80", true},
		{"the own host, other port", "example.com", nil, "https://example.com:8443", false},
		{"the own host, other port of the request", "example.com:8443", nil, "https://example.com", false},
		{"the own IPv6 address", "[::1]:8080", nil, "http://[::1]:8080", true},
		{"the own IPv6 address, default port", "[::1]", nil, "http://[::1]", true},
		{"a longer host", "example.com", nil, "https://example.com.evil.example", false},
		{"a subdomain", "example.com", nil, "https://sub.example.com", false},
		{"null", "example.com", nil, "null", false},
		{"null with a pattern", "example.com", []string{"example.org"}, "null", false},
		{"null with *", "example.com", []string{"*"}, "null", true},
		{"anything with *", "example.com", []string{"*"}, "https://other.example", true},
		{"empty", "example.com", nil, "", false},
		{"no scheme", "example.com", nil, "example.com", false},
		{"a slash at the end", "example.com", nil, "https://example.com/", true},
		{"a slash at the end, listed", "example.com", []string{"http://localhost:3000"}, "http://localhost:3000/", true},
		{"two slashes at the end", "example.com", nil, "https://example.com//", false},
		{"a path", "example.com", nil, "https://example.com/chat", false},
		{"a wildcard as origin", "example.com", []string{"*.example.org"}, "https://*.example.org", false},
		{"listed", "example.com", []string{"app.example.org"}, "https://app.example.org", true},
		{"listed, any scheme", "example.com", []string{"app.example.org"}, "http://app.example.org", true},
		{"listed with scheme", "example.com", []string{"https://app.example.org"}, "https://app.example.org", true},
		{"listed with another scheme", "example.com", []string{"https://app.example.org"}, "http://app.example.org", false},
		{"listed with port", "example.com", []string{"localhost:3000"}, "http://localhost:3000", true},
		{"listed with another port", "example.com", []string{"localhost:3000"}, "http://localhost:3001", false},
		{"listed without port", "example.com", []string{"localhost"}, "http://localhost:3000", false},
		{"listed after another", "example.com", []string{"a.example", "b.example"}, "https://b.example", true},
		{"not listed", "example.com", []string{"a.example", "b.example"}, "https://c.example", false},
		{"the own host beside a list", "example.com", []string{"a.example"}, "https://example.com", true},
		{"one label", "example.com", []string{"*.example.org"}, "https://a.example.org", true},
		{"two labels", "example.com", []string{"*.example.org"}, "https://a.b.example.org", true},
		{"no label", "example.com", []string{"*.example.org"}, "https://example.org", false},
		{"an empty label", "example.com", []string{"*.example.org"}, "https://.example.org", false},
		{"a suffix that is no label", "example.com", []string{"*.example.org"}, "https://evilexample.org", false},
		{"a wildcard for nothing", "example.com", []string{"*.{nothing}"}, "https://evil.example.", false},
		{"an app's scheme", "example.com", []string{"capacitor://localhost"}, "capacitor://localhost", true},
		{"another host with an app's scheme", "example.com", []string{"capacitor://localhost"}, "capacitor://elsewhere", false},
		{"a scheme in capitals", "example.com", []string{"APP://localhost"}, "app://localhost", true},
		{"files", "example.com", []string{"file://"}, "file://", true},
		{"files, not listed", "example.com", []string{"localhost"}, "file://", false},
		{"a file with a host", "example.com", []string{"file://"}, "file://localhost", false},
		{"an internationalized host", "example.com", []string{"https://Bücher.example"}, "https://xn--bcher-kva.example", true},
		{"below an internationalized host", "example.com", []string{"*.bücher.example:8080"}, "http://a.xn--bcher-kva.example:8080", true},
		{"an IPv6 address", "example.com", []string{"[0:0::1]:3000"}, "http://[::1]:3000", true},
		{"a placeholder", "example.com", []string{"https://{site}"}, "https://app.example.com", true},
		{"a placeholder that is unset", "example.com", []string{"https://{nothing}"}, "https://app.example.com", false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if err := checkOrigins(tc.patterns); err != nil {
				t.Fatal(err)
			}
			r := &http.Request{Host: tc.host, Header: http.Header{}}
			if tc.origin != "-" {
				r.Header.Set("Origin", tc.origin)
			}
			err := (&Handler{Origins: tc.patterns}).checkOrigin(r, repl)
			if got := err == nil; got != tc.want {
				t.Errorf("origin %q, host %q, patterns %q: got %v, want %v", tc.origin, tc.host, tc.patterns, got, tc.want)
			}
		})
	}
}

func TestOrigin_TwoOriginsAreRefused(t *testing.T) {
	r := &http.Request{Host: "example.com", Header: http.Header{"Origin": {"https://example.com", "https://evil.example"}}}
	if err := new(Handler).checkOrigin(r, caddy.NewEmptyReplacer()); err == nil {
		t.Error("got no error")
	}
}

func TestOrigin_AppWithTheRequestsHostMustBeListed(t *testing.T) {
	r := &http.Request{Host: "localhost", Header: http.Header{"Origin": {"capacitor://localhost"}}}
	if err := new(Handler).checkOrigin(r, caddy.NewEmptyReplacer()); err == nil {
		t.Error("got no error")
	}
}

func TestOrigin_PageWithoutTLSMustBeListedBySiteWithTLS(t *testing.T) {
	startCaddy(t, `https://localhost:9443 {
	chat_broadcast /chat/* {
		http_publish
	}
	chat_broadcast /listed/* {
		origins http://localhost:9443
		http_publish
	}
}
http://localhost:9080 {
	chat_broadcast {
		http_publish
	}
}`)
	joinTLS(t, "/chat/a", "Origin: https://localhost:9443\r\n")
	joinTLS(t, "/listed/a", "Origin: http://localhost:9443\r\n")
	// TLS may have ended before the request came to Caddy.
	join(t, "/chat/a", "Origin: https://localhost:9080\r\n")
	_, resp := handshakeOn(t, dialTLS(t), handshakeRequest(httpsAddr, "/chat/a", "Origin: http://localhost:9443\r\n"))
	if resp.StatusCode != http.StatusForbidden {
		t.Errorf("a handshake: got %s, want 403", resp.Status)
	}
	for origin, want := range map[string]int{"https://localhost:9443": 202, "http://localhost:9443": 403} {
		got := requestBy(t, transportTLS(), http.MethodPost, "https://"+httpsAddr+"/chat/a", nil, "Origin", origin)
		if got.status != want {
			t.Errorf("a POST with origin %s: got %d, want %d", origin, got.status, want)
		}
	}
}

func TestOrigin_SecFetchSiteCountsWhereThereIsNoOrigin(t *testing.T) {
	startCaddy(t, `http://localhost:9080 {
	chat_broadcast /chat/* {
		origins friend.example
		http_publish
	}
	chat_broadcast /all/* {
		origins *
		http_publish
	}
}`)
	for _, tc := range []struct {
		path, site, origin string
		want               int // of a POST
	}{
		{"/chat/a", "same-origin", "", 202},
		{"/chat/a", "none", "", 202},
		{"/chat/a", "cross-site", "", 403},
		{"/chat/a", "same-site", "", 403},
		{"/chat/a", "", "", 403},
		{"/chat/a", "cross-site", "https://friend.example", 202},
		{"/chat/a", "cross-site", "https://evil.example", 403},
		{"/all/a", "cross-site", "", 202},
	} {
		header := "Sec-Fetch-Site: " + tc.site + "\r\n"
		post := []string{"Sec-Fetch-Site", tc.site}
		if tc.origin != "" {
			header += "Origin: " + tc.origin + "\r\n"
			post = append(post, "Origin", tc.origin)
		}
		if got := publish(t, tc.path, "x", post...); got.status != tc.want {
			t.Errorf("a POST to %s, Sec-Fetch-Site %q, origin %q: got %d, want %d", tc.path, tc.site, tc.origin, got.status, tc.want)
		}
		if tc.want == http.StatusForbidden {
			refused(t, http.StatusForbidden, tc.path, header)
		} else {
			join(t, tc.path, header)
		}
	}
}
