package chatbroadcast

import (
	"fmt"
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"
	"github.com/dustin/go-humanize"
	"go.uber.org/zap"
)

// parseCaddyfile sets up the handler from its directive. It does what httpcaddyfile.RegisterHandlerDirective does. It
// also logs a warning if the name of the hub was probably meant as a path.
func parseCaddyfile(helper httpcaddyfile.Helper) ([]httpcaddyfile.ConfigValue, error) {
	if !helper.Next() {
		return nil, helper.ArgErr()
	}
	matcherSet, hasMatcher, err := helper.MatcherToken()
	if err != nil {
		return nil, err
	}
	if hasMatcher {
		helper.Delete()
	}
	helper.Reset()
	helper.Next()
	inline := helper.CountRemainingArgs() > 0
	file, line := helper.File(), helper.Line()
	helper.Reset()
	h := new(Handler)
	if err := h.UnmarshalCaddyfile(helper.Dispenser); err != nil {
		return nil, err
	}
	if inline && !hasMatcher && !strings.Contains(h.Hub, "{") {
		caddy.Log().Named("caddyfile").Warn("chat_broadcast without a matcher joins every WebSocket request that reaches it to one hub; "+
			"for a path write it with slashes, as in /chat/*; to mean one hub, put * before its name",
			zap.String("hub", h.Hub), zap.String("file", file), zap.Int("line", line))
	}
	return helper.NewRoute(matcherSet, h), nil
}

// UnmarshalCaddyfile implements caddyfile.Unmarshaler. Syntax:
//
//	chat_broadcast [<matcher>] [<hub>] {
//	    hub                 <name>
//	    user                <value>
//	    origins             <pattern...> | *
//	    read_only
//	    echo                on|off
//	    max_message_size    <size>
//	    rate                <messages> <window>
//	    max_clients         <n>
//	    max_clients_per_hub <n>
//	    max_clients_per_ip  <n>
//	    max_hubs            <n>
//	    buffer              <messages> [<size>]
//	    on_lag              close|skip
//	    ping                <interval> [<timeout>] | off
//	    write_timeout       <duration>
//	    max_age             <duration>
//	    drain               <duration>
//	    history             <messages> [<age>]
//	    presence            [join_leave]
//	    http_publish
//	}
//
// Counts, sizes and durations are at least 1 and have an upper bound. A field that is left out is off or has its
// default. Every error names its line.
func (h *Handler) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next() // the directive
	seen := map[string]bool{}
	if inline := d.RemainingArgs(); len(inline) > 0 {
		seen["hub"] = true
		args := &arguments{name: "hub", values: inline}
		subdirectives["hub"](h, args)
		if err := args.done(); err != nil {
			return d.WrapErr(err)
		}
	}
	return parseBlock(d, h, subdirectives, nil, seen)
}

// parseBlock parses the block of d into target. known has the parser of each line by its name, and modules those of the lines
// that belong to a guest module, with their blocks. seen has the names of the lines that came before the block, and gets
// those in the block.
func parseBlock[T any](
	d *caddyfile.Dispenser, target T,
	known map[string]func(T, *arguments), modules map[string]func(T, *caddyfile.Dispenser) error, seen map[string]bool,
) error {
	for nesting := d.Nesting(); d.NextBlock(nesting); {
		name := d.Val()
		parse, module := known[name], modules[name]
		if parse == nil && module == nil {
			names := slices.Concat(slices.Collect(maps.Keys(known)), slices.Collect(maps.Keys(modules)))
			if near := nearest(name, slices.Sorted(slices.Values(names))); near != "" {
				return d.Errf("unrecognized subdirective %q: did you mean %s?", name, near)
			}
			return d.Errf("unrecognized subdirective %q", name)
		}
		if seen[name] {
			return d.Errf("%s: given more than once", name)
		}
		seen[name] = true
		if module != nil {
			if err := module(target, d); err != nil {
				return err
			}
			continue
		}
		args := &arguments{name: name, values: d.RemainingArgs()}
		parse(target, args)
		if err := args.done(); err != nil {
			return d.WrapErr(err)
		}
		if d.NextBlock(d.Nesting()) {
			return d.Errf("%s: takes no block", name)
		}
	}
	return nil
}

// subdirectives has, for each subdirective, the function that parses its arguments.
var subdirectives = map[string]func(h *Handler, args *arguments){
	"hub": func(h *Handler, args *arguments) {
		h.Hub = args.text("<name>")
		args.check(checkHub(h.Hub))
	},
	"user": func(h *Handler, args *arguments) {
		h.User = args.text("<value>")
	},
	"origins": func(h *Handler, args *arguments) {
		h.Origins = append(h.Origins, args.text("<pattern...> or *"))
		for args.more() {
			h.Origins = append(h.Origins, args.text("<pattern>"))
		}
		args.check(named("origins", checkOrigins(h.Origins)))
	},
	"read_only": func(h *Handler, args *arguments) {
		h.ReadOnly = true
		args.none()
	},
	"echo": func(h *Handler, args *arguments) {
		echo := args.oneOf("on", "off") == "on"
		h.Echo = &echo
	},
	"max_message_size": func(h *Handler, args *arguments) {
		h.MaxMessageSize = args.size("<size>", maxMessageSize)
	},
	"rate": func(h *Handler, args *arguments) {
		h.Rate = &Rate{Messages: args.count("<messages>"), Window: args.duration("<window>", maxDuration)}
	},
	"max_clients": func(h *Handler, args *arguments) {
		h.MaxClients = args.count("<n>")
	},
	"max_clients_per_hub": func(h *Handler, args *arguments) {
		h.MaxClientsPerHub = args.count("<n>")
	},
	"max_clients_per_ip": func(h *Handler, args *arguments) {
		h.MaxClientsPerIP = args.count("<n>")
	},
	"max_hubs": func(h *Handler, args *arguments) {
		h.MaxHubs = args.count("<n>")
	},
	"buffer": func(h *Handler, args *arguments) {
		h.Buffer = &Buffer{Messages: args.count("<messages>")}
		if args.more() {
			h.Buffer.Size = args.size("<size>", maxBufferSize)
		}
	},
	"on_lag": func(h *Handler, args *arguments) {
		h.OnLag = args.oneOf(onLagClose, onLagSkip)
	},
	"ping": func(h *Handler, args *arguments) {
		h.Ping = new(Ping)
		if args.peek() == "off" {
			h.Ping.Off = args.text("off") == "off"
			return
		}
		h.Ping.Interval = args.duration("<interval> or off", maxDuration)
		if args.more() {
			h.Ping.Timeout = args.duration("<timeout>", maxDuration)
		}
	},
	"write_timeout": func(h *Handler, args *arguments) {
		h.WriteTimeout = args.duration("<duration>", maxDuration)
	},
	"max_age": func(h *Handler, args *arguments) {
		h.MaxAge = args.duration("<duration>", maxDuration)
	},
	"drain": func(h *Handler, args *arguments) {
		h.Drain = args.duration("<duration>", maxDrain)
	},
	"history": func(h *Handler, args *arguments) {
		h.History = &History{Messages: args.count("<messages>")}
		if args.more() {
			h.History.Age = args.duration("<age>", maxDuration)
		}
	},
	"presence": func(h *Handler, args *arguments) {
		h.Presence = new(Presence)
		if args.more() {
			word := args.text("join_leave")
			if h.Presence.JoinLeave = word == "join_leave"; args.err == nil && !h.Presence.JoinLeave {
				args.fail("want join_leave or nothing, got %q", word)
			}
		}
	},
	"http_publish": func(h *Handler, args *arguments) {
		h.HTTPPublish = true
		args.none()
	},
}

// nearest returns the word that name is probably meant to be: the one with the fewest wrong characters. It returns ""
// if every word differs from name in more than a third of name's length, and in more than one character.
func nearest(name string, words []string) (word string) {
	least := max(1, len(name)/3) + 1
	for _, w := range words {
		if d := editDistance(name, w); d < least {
			word, least = w, d
		}
	}
	return word
}

// editDistance returns the Levenshtein distance: how many bytes to insert, delete or replace to turn a into b.
func editDistance(a, b string) int {
	row := make([]int, len(b)+1) // the distances from the part of a so far to each beginning of b
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			replaced := diagonal
			if a[i] != b[j] {
				replaced++
			}
			diagonal = row[j+1]
			row[j+1] = min(replaced, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}

// arguments are the arguments of one subdirective, taken from the left. They keep the first error for done. After an
// error every further argument is taken as zero.
type arguments struct {
	name   string
	values []string
	err    error
}

// done returns the first error. An argument that was not taken is an error, too.
func (a *arguments) done() error {
	if a.more() {
		a.fail("unexpected argument %q", a.values[0])
	}
	return a.err
}

func (a *arguments) fail(format string, v ...any) {
	a.check(fmt.Errorf("%s: "+format, append([]any{a.name}, v...)...))
}

// check keeps err if it is the first error. err must name the subdirective.
func (a *arguments) check(err error) {
	if a.err == nil {
		a.err = err
	}
}

// none fails if there is an argument.
func (a *arguments) none() {
	if a.more() {
		a.fail("takes no value, got %q; leave the line out to turn it off", a.values[0])
	}
}

// more reports whether there is another argument to take.
func (a *arguments) more() bool { return a.err == nil && len(a.values) > 0 }

// peek returns the next argument without taking it, or "".
func (a *arguments) peek() string {
	if !a.more() {
		return ""
	}
	return a.values[0]
}

// text takes a non-empty argument. Errors describe it as what.
func (a *arguments) text(what string) string {
	switch {
	case a.err != nil:
		return ""
	case len(a.values) == 0:
		a.fail("missing %s", what)
		return ""
	case a.values[0] == "":
		a.fail("%s must not be empty", what)
		return ""
	}
	v := a.values[0]
	a.values = a.values[1:]
	return v
}

func (a *arguments) oneOf(words ...string) string {
	v := a.text(strings.Join(words, " or "))
	if a.err == nil && !slices.Contains(words, v) {
		a.fail("want %s, got %q", strings.Join(words, " or "), v)
	}
	return v
}

func (a *arguments) count(what string) int {
	v := a.text(what)
	if a.err != nil {
		return 0
	}
	n, err := strconv.Atoi(v)
	if err != nil {
		a.fail("%s must be a whole number from 1 to %d, got %q", what, maxCount, v)
	}
	a.check(checkRange(a.name+": "+what, n, 1, maxCount))
	return n
}

func (a *arguments) size(what string, most int64) int64 {
	v := a.text(what)
	if a.err != nil {
		return 0
	}
	n, err := humanize.ParseBytes(v)
	if err != nil {
		a.fail("%s must be a size such as 64KiB, got %q", what, v)
	}
	// A size that does not fit is far over the bound.
	size := int64(min(n, math.MaxInt64))
	a.check(checkRange(a.name+": "+what, size, 1, most))
	return size
}

func (a *arguments) duration(what string, most caddy.Duration) caddy.Duration {
	v := a.text(what)
	if a.err != nil {
		return 0
	}
	d, err := caddy.ParseDuration(v)
	if err != nil {
		a.fail("%s must be a duration such as 10s, got %q", what, v)
	}
	a.check(checkDuration(a.name+": "+what, caddy.Duration(d), 1, most))
	return caddy.Duration(d)
}
