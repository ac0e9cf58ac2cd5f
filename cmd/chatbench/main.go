// Command chatbench loads a server that broadcasts WebSocket messages and measures what comes back: every delivery is
// counted and checked, latency, and the server's CPU and memory. It works with any server that sends what one client
// sends to all clients of a hub, the sender included, where a hub is a URL:
//
//	chatbench run     -url 'ws://localhost:8080/chat/{hub}' -clients 1000 -hubs 10 -rate 5 -pid "$(pgrep caddy)"
//	chatbench idle    -url ws://localhost:8080/chat/{hub} -clients 10000 -hubs 1000 -pid "$(pgrep caddy)"
//	chatbench compare # Caddy with chat_broadcast beside floors and gorilla's chat example
//	chatbench reload  # are messages lost while Caddy reloads its configuration?
//	chatbench slow    # do clients that do not read disturb the others?
//
// The first two want a server that runs. The others start theirs, and build Caddy, so they want the repository as
// their working directory (or -caddy). Each has -help. The exit status is 1 where anything was lost, doubled, out of
// order or disconnected.
package main

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"text/tabwriter"
)

// commands are the subcommands. The servers that compare starts are among them, so that all is one program.
var commands = map[string]func(name string, args []string) error{
	"run":           runCommand,
	"idle":          idleCommand,
	"compare":       compareCommand,
	"reload":        reloadCommand,
	"slow":          slowCommand,
	"serve-floor":   serveCommand,
	"serve-gorilla": serveCommand,
}

// errFaults is the end of a run whose table shows what went wrong.
var errFaults = errors.New("not everything was delivered once and in order")

func main() {
	if len(os.Args) < 2 || commands[os.Args[1]] == nil {
		fmt.Fprintln(os.Stderr, "usage: chatbench run|idle|compare|reload|slow [-help] [flags]")
		os.Exit(2)
	}
	err := commands[os.Args[1]](os.Args[1], os.Args[2:])
	switch {
	case errors.Is(err, flag.ErrHelp):
	case err != nil:
		fmt.Fprintln(os.Stderr, "chatbench:", err)
		os.Exit(1)
	}
}

// report prints v for programs, or rows of a name and a value for people. It is an error that there were faults.
func report(asJSON bool, v any, rows [][2]string, f faults) error {
	if asJSON {
		e := json.NewEncoder(os.Stdout)
		e.SetIndent("", "  ")
		if err := e.Encode(v); err != nil {
			return err
		}
	} else {
		w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
		for _, row := range rows {
			fmt.Fprintf(w, "%s\t%s\n", row[0], row[1])
		}
		if err := w.Flush(); err != nil {
			return err
		}
	}
	if f.any() {
		return errFaults
	}
	return nil
}
