package chatbroadcast

import (
	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
)

func init() { caddy.RegisterModule(new(Memory)) }

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
	if d.NextBlock(d.Nesting()) {
		return d.Err("engine memory: takes no block")
	}
	return nil
}

// Interface guards
var (
	_ caddy.Module          = (*Memory)(nil)
	_ caddyfile.Unmarshaler = (*Memory)(nil)
)
