// Command caddy is Caddy with its standard modules and this plugin.
package main

import (
	caddycmd "github.com/caddyserver/caddy/v2/cmd"

	// The standard modules and this plugin.
	_ "github.com/caddyserver/caddy/v2/modules/standard"
	_ "github.com/chat-broadcast/caddy-chat-broadcast"
)

func main() { caddycmd.Main() }
