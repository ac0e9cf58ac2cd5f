//go:build unix

package redisengine

import (
	"reflect"
	"strings"
	"testing"
)

func TestParseURL_UnderstandsAllForms(t *testing.T) {
	tcp := func(addresses ...string) Options { return Options{network: "tcp", addresses: addresses} }
	with := func(o Options, change func(*Options)) Options {
		change(&o)
		return o
	}
	for text, want := range map[string]Options{
		"redis://localhost":         tcp("localhost:6379"),
		"redis://10.0.0.1:7000":     tcp("10.0.0.1:7000"),
		"redis://[::1]:7000":        tcp("[::1]:7000"),
		"redis://[::1]":             tcp("[::1]:6379"),
		"redis://localhost/":        tcp("localhost:6379"),
		"redis://localhost/3":       with(tcp("localhost:6379"), func(o *Options) { o.db = 3 }),
		"rediss://localhost":        with(tcp("localhost:6379"), func(o *Options) { o.tls = true }),
		"redis://:secret@localhost": with(tcp("localhost:6379"), func(o *Options) { o.password = "secret" }),
		"redis://ann:secret@localhost": with(tcp("localhost:6379"), func(o *Options) {
			o.username, o.password = "ann", "secret"
		}),
		"redis://ann:a%40b%25%2f@localhost": with(tcp("localhost:6379"), func(o *Options) {
			o.username, o.password = "ann", "a@b%/"
		}),
		"redis://:a/b?c#d@e:f%zz@localhost/1": with(tcp("localhost:6379"), func(o *Options) {
			o.password, o.db = "a/b?c#d@e:f%zz", 1
		}),
		"unix:///run/redis.sock":      {network: "unix", addresses: []string{"/run/redis.sock"}},
		"unix:///run/redis.sock?db=2": {network: "unix", addresses: []string{"/run/redis.sock"}, db: 2},
		"unix://ann:secret@/run/redis.sock": {
			network: "unix", addresses: []string{"/run/redis.sock"}, credentials: credentials{username: "ann", password: "secret"},
		},
		"redis+sentinel://one/main": with(tcp("one:26379"), func(o *Options) { o.master = "main" }),
		"redis+sentinel://:secret@one,two:7000,[::1]/main/4": with(tcp("one:26379", "two:7000", "[::1]:26379"), func(o *Options) {
			o.master, o.db, o.password = "main", 4, "secret"
		}),
		"rediss+sentinel://one/main?sentinel_user=s&sentinel_password=t": with(tcp("one:26379"), func(o *Options) {
			o.master, o.tls, o.sentinelUsername, o.sentinelPassword = "main", true, "s", "t"
		}),
	} {
		got, err := ParseURL(text)
		if err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("ParseURL(%q) = %+v, %v; want %+v", text, got, err, want)
		}
	}
}

func TestParseURL_ErrorSaysWhatIsWrong(t *testing.T) {
	for text, want := range map[string]string{
		"":                                    "must begin with redis://",
		"localhost:6379":                      "must begin with redis://",
		"http://localhost":                    "begins with http://",
		"redis://":                            "no host",
		"redis://:secret@":                    "no host",
		"redis://:secret@:6379":               "no host",
		"redis://:secret@localhost:x":         `port "x"`,
		"redis://:secret@localhost:0":         `port "0"`,
		"redis://:secret@localhost:65536":     `port "65536"`,
		"redis://:secret@::1":                 "IPv6",
		"redis://:secret@localhost/x":         `database "x"`,
		"redis://:secret@localhost/-1":        `database "-1"`,
		"redis://:secret@localhost/1/2":       `database "1/2"`,
		"redis://:secret@one,two":             "redis+sentinel://",
		"redis://:secret@localhost?pool=3":    `parameter "pool"`,
		"redis://:secret@localhost?a=%zz":     "question mark",
		"redis+sentinel://:secret@one":        "name of the master",
		"redis+sentinel://:secret@one,/main":  "no host",
		"redis+sentinel://:secret@one/main/x": `database "x"`,
		"unix://:secret@redis.sock":           "path of a socket",
		"unix:///":                            "path of a socket",
		"unix://:secret@/redis.sock?db=x":     `database "x"`,
	} {
		_, err := ParseURL(text)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("ParseURL(%q) returned %v, want an error with %q", text, err, want)
		}
		if err != nil && strings.Contains(err.Error(), "secret") {
			t.Errorf("the error of ParseURL(%q) has the password: %v", text, err)
		}
	}
}

func TestOptionsKey_IdentifiesTheDataWithoutSecrets(t *testing.T) {
	key := func(url, prefix string) string {
		t.Helper()
		o, err := ParseURL(url)
		if err != nil {
			t.Fatal(err)
		}
		return o.Key(prefix)
	}
	const url = "redis://ann:secret@localhost/1"
	if got := key(url, "p:"); strings.Contains(got, "secret") || strings.Contains(got, "ann") {
		t.Errorf("the key %q has a secret", got)
	}
	if got, want := key("redis://ben:other@localhost:6379/1", "p:"), key(url, "p:"); got != want {
		t.Errorf("with other credentials the key is %q, want %q", got, want)
	}
	keys := map[string]string{}
	for _, other := range []string{
		url, "redis://localhost/2", "redis://localhost:7000/1", "redis://otherhost/1", "unix:///localhost?db=1",
		"redis+sentinel://localhost:6379/main/1", "redis+sentinel://localhost:6379/other/1",
	} {
		got := key(other, "p:")
		if before, found := keys[got]; found {
			t.Errorf("%s and %s have the same key %q", before, other, got)
		}
		keys[got] = other
	}
	if key(url, "p:") == key(url, "q:") {
		t.Error("two prefixes have the same key")
	}
}
