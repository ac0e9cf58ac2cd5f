package chatbroadcast

import (
	"errors"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"
)

const appName = "chat_broadcast"

func init() {
	caddy.RegisterModule(new(App))
	httpcaddyfile.RegisterGlobalOption(appName, parseGlobalOption)
}

// maxProcessSize is the largest bound for the whole process, in bytes: 1 TiB.
const maxProcessSize = int64(1) << 40

// App bounds the memory that all hubs of the process keep together. Without the app the defaults hold. The zero value
// of every field is the default.
//
// Each bound is for data. Go collects garbage late, so the process may grow by twice as much.
type App struct {
	// The most memory that all histories take together, in bytes: 1 to 1 TiB. A value below four times the largest
	// `buffer` of a hub that has had a history counts as that. Beyond the bound hubs forget their histories, starting
	// with hubs of the address whose hubs take the most. Default: 64 MiB. A reload changes it at once.
	MaxHistory int64 `json:"max_history,omitempty"`

	// The most memory that all hubs keep together for clients that are behind, in bytes: 1 to 1 TiB. A value below four
	// times the largest `buffer` counts as that. Beyond the bound the server cuts clients with 1013 `lagged`, also
	// under `on_lag skip`, starting with clients of the address whose clients hold back the most. Default: 64 MiB. A
	// reload changes it at once.
	MaxBuffers int64 `json:"max_buffers,omitempty"`
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

// Start implements caddy.App. It does nothing: handlers apply the bounds, see newBounds.
func (*App) Start() error { return nil }

// Stop implements caddy.App. It does nothing.
func (*App) Stop() error { return nil }

// bounds are a configuration's bounds for the whole process, in bytes. Zero stands for the default.
type bounds struct{ history, buffers int64 }

// newBounds returns the bounds of the configuration that Caddy is provisioning.
func newBounds(ctx caddy.Context) (bounds, error) {
	app, err := ctx.AppIfConfigured(appName)
	if errors.Is(err, caddy.ErrNotConfigured) {
		return bounds{}, nil
	}
	if err != nil {
		return bounds{}, err
	}
	return bounds{app.(*App).MaxHistory, app.(*App).MaxBuffers}, nil
}

// parseGlobalOption parses the global option of a Caddyfile. Syntax:
//
//	chat_broadcast {
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
	if err := parseBlock(d, app, globalOptions, map[string]bool{}); err != nil {
		return nil, err
	}
	return httpcaddyfile.App{Name: appName, Value: caddyconfig.JSON(app, nil)}, nil
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
	_ caddy.App       = (*App)(nil)
	_ caddy.Validator = (*App)(nil)
)
