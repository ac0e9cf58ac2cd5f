package chatbroadcast

import (
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"strings"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/chat-broadcast/caddy-chat-broadcast/engine"
	"github.com/chat-broadcast/caddy-chat-broadcast/internal/fileengine"
	"github.com/chat-broadcast/caddy-chat-broadcast/internal/redisengine"
)

func init() {
	caddy.RegisterModule(new(Memory))
	caddy.RegisterModule(new(File))
	caddy.RegisterModule(new(Redis))
}

// Memory is the default engine: each hub numbers its messages itself and keeps its history in memory. So there is one process
// with its hubs, and a restart begins anew.
type Memory struct{}

// CaddyModule implements caddy.Module.
func (*Memory) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: engineNamespace + ".memory", New: func() caddy.Module { return new(Memory) }}
}

// UnmarshalCaddyfile implements caddyfile.Unmarshaler. Syntax:
//
//	engine memory
func (*Memory) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next() // the engine's name
	if d.NextArg() {
		return d.Errf("engine memory: unexpected argument %q", d.Val())
	}
	return noBlock(d, "engine memory")
}

// File keeps the history of hubs in a file: messages, their numbers, and the ids of messages that were sent with one. They
// survive a restart, a crash and an upgrade of Caddy. A sender that has an answer, be it `sent` or 202, has its message on
// the disk. Hubs without `history` have nothing to keep and work as with the engine memory.
type File struct {
	// The folder of the file, which is made if it does not exist. One process at a time can use it. It may have
	// placeholders such as {env.*}. Default: the folder chat_broadcast in Caddy's data directory.
	Folder string `json:"folder,omitempty"`
}

// CaddyModule implements caddy.Module.
func (*File) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: engineNamespace + ".file", New: func() caddy.Module { return new(File) }}
}

// UnmarshalCaddyfile implements caddyfile.Unmarshaler. Syntax:
//
//	engine file [<folder>]
func (f *File) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next() // the engine's name
	if d.NextArg() {
		f.Folder = d.Val()
		if f.Folder == "" {
			return d.Err("engine file: <folder> must not be empty")
		}
	}
	if d.NextArg() {
		return d.Errf("engine file: unexpected argument %q", d.Val())
	}
	return noBlock(d, "engine file")
}

// Provision implements caddy.Provisioner.
func (f *File) Provision(caddy.Context) error {
	folder, err := caddy.NewReplacer().ReplaceOrErr(f.Folder, true, true)
	if err != nil {
		return fmt.Errorf("folder: %w", err)
	}
	if folder == "" {
		folder = filepath.Join(caddy.AppDataDir(), appName)
	}
	f.Folder, err = filepath.Abs(folder)
	return named("folder", err)
}

// Key implements engine.Engine.
func (f *File) Key() string { return f.Folder }

// Connect implements engine.Engine.
func (f *File) Connect(m engine.Monitor) (engine.Session, error) {
	return fileengine.Open(f.Folder, m)
}

// Redis shares hubs among all Caddys that use the same Redis or Valkey, from version 7 on, and the same prefix. Each client
// gets the messages of all of them, in one order. docs/operating.md says how to set up a cluster.
type Redis struct {
	// Where Redis is. These forms are possible; the database is a number, 0 by default:
	//
	//	redis://[[<user>]:<password>@]<host>[:<port>][/<database>]
	//	rediss://...   the same, over TLS
	//	unix://[[<user>]:<password>@]<path>[?db=<database>]
	//	redis+sentinel://[[<user>]:<password>@]<host>[:<port>][,<host>[:<port>]...]/<master>[/<database>]
	//
	// It may have placeholders such as {env.*} and {file.*}; what they stand for in front of the @ is taken as it is, and
	// needs no escapes. A reload that changes nothing but user and password keeps the connection. Default:
	// redis://127.0.0.1:6379
	URL string `json:"url,omitempty"`

	// What the names of all keys and channels in Redis begin with. Caddys with other prefixes do not see each other's
	// hubs. Default: chat_broadcast:
	Prefix string `json:"prefix,omitempty"`

	options redisengine.Options
}

// The defaults of Redis.
const (
	defaultRedisURL    = "redis://127.0.0.1:6379"
	defaultRedisPrefix = "chat_broadcast:"
)

// maxRedisMessage is the largest `max_message_size` with the engine redis, in bytes: each message is in a script's arguments, and
// Redis does nothing else meanwhile.
const maxRedisMessage = 1 << 20

// CaddyModule implements caddy.Module.
func (*Redis) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: engineNamespace + ".redis", New: func() caddy.Module { return new(Redis) }}
}

// UnmarshalCaddyfile implements caddyfile.Unmarshaler. Syntax:
//
//	engine redis [<url>] {
//	    prefix <text>
//	}
func (r *Redis) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next() // the engine's name
	if d.NextArg() {
		r.URL = d.Val()
		if r.URL == "" {
			return d.Err("engine redis: <url> must not be empty")
		}
		if !strings.Contains(r.URL, "{") {
			if _, err := redisengine.ParseURL(r.URL); err != nil {
				return d.Errf("engine redis: <url>: %w", err)
			}
		}
	}
	if d.NextArg() {
		return d.Errf("engine redis: unexpected argument %q", d.Val())
	}
	return parseBlock(d, r, redisOptions, nil, map[string]bool{})
}

// redisOptions has, for each line in the block of the engine redis, the function that parses its arguments.
var redisOptions = map[string]func(r *Redis, args *arguments){
	"prefix": func(r *Redis, args *arguments) {
		r.Prefix = args.text("<text>")
	},
}

// Provision implements caddy.Provisioner.
func (r *Redis) Provision(caddy.Context) error {
	text, err := replaceInURL(orDefault(r.URL, defaultRedisURL))
	if err == nil {
		r.options, err = redisengine.ParseURL(text)
	}
	if err != nil {
		return fmt.Errorf("url: %w", err)
	}
	r.Prefix, err = caddy.NewReplacer().ReplaceOrErr(orDefault(r.Prefix, defaultRedisPrefix), true, true)
	return named("prefix", err)
}

// replaceInURL replaces the placeholders of a URL. It escapes what they stand for in the user and the password.
func replaceInURL(text string) (string, error) {
	repl := caddy.NewReplacer()
	replaced, err := repl.ReplaceOrErr(text, true, true)
	scheme, rest, _ := strings.Cut(text, "://")
	at := strings.LastIndex(rest, "@")
	if at < 0 || err != nil {
		return replaced, err
	}
	login, err := repl.ReplaceFunc(rest[:at], func(_ string, value any) (any, error) {
		return strings.TrimPrefix(url.UserPassword("", caddy.ToString(value)).String(), ":"), nil
	})
	return scheme + "://" + login + repl.ReplaceAll(rest[at:], ""), err
}

// Key implements engine.Engine.
func (r *Redis) Key() string { return r.options.Key(r.Prefix) }

// Connect implements engine.Engine.
func (r *Redis) Connect(m engine.Monitor) (engine.Session, error) {
	return redisengine.Connect(r.options, r.Prefix, hostname(), m), nil
}

// Reconfigure implements engine.Reconfigurer.
func (r *Redis) Reconfigure(s engine.Session) { s.(*redisengine.Session).SetCredentials(r.options) }

// MaxMessageSize implements engine.Limiter.
func (*Redis) MaxMessageSize() int { return maxRedisMessage }

// hostname returns the name of this machine, by which operators tell nodes apart.
func hostname() string {
	name, err := os.Hostname()
	if err != nil {
		return "unknown"
	}
	return name
}

// noBlock returns an error if a line has a block.
func noBlock(d *caddyfile.Dispenser, name string) error {
	if d.NextBlock(d.Nesting()) {
		return d.Errf("%s: takes no block", name)
	}
	return nil
}

// Interface guards
var (
	_ caddy.Module          = (*Memory)(nil)
	_ caddyfile.Unmarshaler = (*Memory)(nil)

	_ caddy.Module          = (*File)(nil)
	_ caddy.Provisioner     = (*File)(nil)
	_ caddyfile.Unmarshaler = (*File)(nil)
	_ engine.Engine         = (*File)(nil)

	_ caddy.Module          = (*Redis)(nil)
	_ caddy.Provisioner     = (*Redis)(nil)
	_ caddyfile.Unmarshaler = (*Redis)(nil)
	_ engine.Engine         = (*Redis)(nil)
	_ engine.Reconfigurer   = (*Redis)(nil)
	_ engine.Limiter        = (*Redis)(nil)
)
