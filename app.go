package chatbroadcast

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"
	"github.com/chat-broadcast/caddy-chat-broadcast/engine"
)

const appName = "chat_broadcast"

func init() {
	caddy.RegisterModule(new(App))
	httpcaddyfile.RegisterGlobalOption(appName, parseGlobalOption)
}

// maxProcessSize is the largest bound for the whole process, in bytes: 1 TiB.
const maxProcessSize = int64(1) << 40

// App has the settings of the whole process: the engine of its hubs, and the memory that they keep together. Without the
// app the defaults hold. The zero value of every field is the default.
//
// Each bound is for data. Go collects garbage late, so the process may grow by twice as much.
type App struct {
	// The engine, which gives the messages of hubs their numbers and keeps the history. Default: memory, in which each hub
	// does that itself, and which forgets everything when Caddy stops. A reload that configures another engine, or the same
	// one elsewhere, begins new hubs: it closes all clients with 1012 `hub_reset`, spread over 10 seconds. Any other reload
	// keeps the engine and its hubs.
	EngineRaw json.RawMessage `json:"engine,omitempty" caddy:"namespace=chat_broadcast.engines inline_key=engine"`

	// The most memory that all histories take together, in bytes: 1 to 1 TiB. A value below four times the largest
	// `buffer` of a hub that has had a history counts as that. Beyond the bound hubs forget their histories, starting
	// with hubs of the address whose hubs take the most. Default: 64 MiB. A reload changes it at once.
	MaxHistory int64 `json:"max_history,omitempty"`

	// The most memory that all hubs keep together for clients that are behind, in bytes: 1 to 1 TiB. A value below four
	// times the largest `buffer` counts as that. Beyond the bound the server cuts clients with 1013 `lagged`, also
	// under `on_lag skip`, starting with clients of the address whose clients hold back the most. Default: 64 MiB. A
	// reload changes it at once.
	MaxBuffers int64 `json:"max_buffers,omitempty"`

	engine     engine.Engine // nil: memory
	engineName string
}

// Provision implements caddy.Provisioner. It does not connect to the engine: Start does.
func (a *App) Provision(ctx caddy.Context) error {
	if a.EngineRaw == nil {
		return nil
	}
	module, err := ctx.LoadModule(a, "EngineRaw")
	if err != nil {
		return fmt.Errorf("loading the engine: %w", err)
	}
	if _, memory := module.(*Memory); memory {
		return nil
	}
	e, ok := module.(engine.Engine)
	if !ok {
		return fmt.Errorf("loading the engine: %T is not an engine", module)
	}
	a.engine, a.engineName = e, module.(caddy.Module).CaddyModule().ID.Name()
	return nil
}

// CaddyModule implements caddy.Module.
func (*App) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: appName, New: func() caddy.Module { return new(App) }}
}

// Validate implements caddy.Validator. The parser of Caddyfiles makes the same checks, in order to name the line.
func (a *App) Validate() error {
	return errors.Join(
		checkRange("max_history", a.MaxHistory, 0, maxProcessSize),
		checkRange("max_buffers", a.MaxBuffers, 0, maxProcessSize),
	)
}

// Start implements caddy.App. It connects to the engine. Handlers apply the other settings, see newProcessSettings.
func (a *App) Start() error {
	if a.engine == nil {
		return nil
	}
	return hubs.startLink(a.engineName, a.engine)
}

// Stop implements caddy.App. It does nothing.
func (*App) Stop() error { return nil }

// processSettings are a configuration's settings for the whole process. Zero bounds, in bytes, stand for the default. The
// link is nil for the engine memory.
type processSettings struct {
	history, buffers int64
	link             *link
}

// newProcessSettings returns the settings of the configuration that Caddy is provisioning, for a handler whose messages have at
// most the given size. The caller must release the link.
func newProcessSettings(ctx caddy.Context, maxMessageSize int) (processSettings, error) {
	app, err := ctx.AppIfConfigured(appName)
	if errors.Is(err, caddy.ErrNotConfigured) {
		return processSettings{}, nil
	}
	if err != nil {
		return processSettings{}, err
	}
	a := app.(*App)
	if l, ok := a.engine.(engine.Limiter); ok && maxMessageSize > l.MaxMessageSize() {
		return processSettings{}, fmt.Errorf("max_message_size: must be at most %d bytes with the engine %s, got %d",
			l.MaxMessageSize(), a.engineName, maxMessageSize)
	}
	return processSettings{a.MaxHistory, a.MaxBuffers, hubs.linkTo(a.engineName, a.engine)}, nil
}

// parseGlobalOption parses the global option of a Caddyfile. Syntax:
//
//	chat_broadcast {
//	    engine      memory | file [<folder>] | redis [<url>] | <name> ...
//	    max_history <size>
//	    max_buffers <size>
//	}
func parseGlobalOption(d *caddyfile.Dispenser, existing any) (any, error) {
	if existing != nil {
		return nil, d.Err("chat_broadcast: given more than once")
	}
	app := new(App)
	d.Next() // the option's name
	if d.NextArg() {
		return nil, d.ArgErr()
	}
	if err := parseBlock(d, app, globalOptions, globalModules, map[string]bool{}); err != nil {
		return nil, err
	}
	return httpcaddyfile.App{Name: appName, Value: caddyconfig.JSON(app, nil)}, nil
}

// engineNamespace is the namespace of the engines' modules.
const engineNamespace = "chat_broadcast.engines"

// globalModules has, for each line of the global option that configures a guest module, the function that parses it with its
// block.
var globalModules = map[string]func(app *App, d *caddyfile.Dispenser) error{
	"engine": parseEngine,
}

func parseEngine(app *App, d *caddyfile.Dispenser) error {
	if !d.NextArg() {
		return d.Err("engine: missing <name>")
	}
	name := d.Val()
	if _, err := caddy.GetModule(engineNamespace + "." + name); err != nil {
		var known []string
		for _, m := range caddy.GetModules(engineNamespace) {
			known = append(known, m.ID.Name())
		}
		return d.Errf("engine: unknown engine %q: there are %s", name, strings.Join(known, ", "))
	}
	module, err := caddyfile.UnmarshalModule(d, engineNamespace+"."+name)
	if err != nil {
		return err
	}
	app.EngineRaw = caddyconfig.JSONModuleObject(module, "engine", name, nil)
	return nil
}

// globalOptions has, for each line of the global option, the function that parses its arguments.
var globalOptions = map[string]func(app *App, args *arguments){
	"max_history": func(app *App, args *arguments) {
		app.MaxHistory = args.size("<size>", maxProcessSize)
	},
	"max_buffers": func(app *App, args *arguments) {
		app.MaxBuffers = args.size("<size>", maxProcessSize)
	},
}

// Interface guards
var (
	_ caddy.App         = (*App)(nil)
	_ caddy.Provisioner = (*App)(nil)
	_ caddy.Validator   = (*App)(nil)
)
