// Command chatbench loads a server that broadcasts WebSocket messages. It counts and checks every delivery, and measures
// latency and the server's CPU and memory. It works with any server that sends each client's messages to all clients of
// its hub, including the sender, if each hub is a URL:
//
//	chatbench run     -url 'ws://localhost:8080/chat/{hub}' -clients 1000 -hubs 10 -rate 5 -pid "$(pgrep caddy)"
//	chatbench idle    -url ws://localhost:8080/chat/{hub} -clients 10000 -hubs 1000 -pid "$(pgrep caddy)"
//	chatbench join    -url ws://localhost:8080/chat/{hub} -clients 1000 -history 100 -pid "$(pgrep caddy)"
//	chatbench compare # compares Caddy with chat_broadcast, floors, gorilla's chat example, and any other server
//	chatbench reload  # checks that no message is lost while Caddy reloads its configuration
//	chatbench slow    # checks whether clients that do not read disturb the others
//
// The first three need a running server. The others start their servers and build Caddy, so run them in the repository's
// folder or give them -caddy. Each has -help. The exit status is 1 if any message was lost, doubled or out of order, or
// any client was disconnected.
package main

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"text/tabwriter"
)

// commands are the subcommands. They include the servers that compare starts, so that one program is enough.
var commands = map[string]func(name string, args []string) error{
	"run":           runCommand,
	"idle":          idleCommand,
	"join":          joinCommand,
	"compare":       compareCommand,
	"reload":        reloadCommand,
	"slow":          slowCommand,
	"serve-floor":   serveCommand,
	"serve-gorilla": serveCommand,
}

// errFaults ends a run that had faults. Its table shows them.
var errFaults = errors.New("not everything was delivered once and in order")

func main() {
	if len(os.Args) < 2 || commands[os.Args[1]] == nil {
		fmt.Fprintln(os.Stderr, "usage: chatbench run|idle|join|compare|reload|slow [-help] [flags]")
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

// report prints v as JSON for programs, or rows of a name and a value for people. It returns errFaults if f has any.
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
