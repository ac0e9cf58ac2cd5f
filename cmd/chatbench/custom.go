package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net"
	"net/url"
	"os/exec"
	"slices"
	"strings"
)

// customFlags defines the flags that add servers of the user's to compare. Call the function after parsing.
func customFlags(f *flag.FlagSet) func() ([]contender, error) {
	var added []contender
	f.Func("server", "`name=command` of another server; may be repeated, and needs a -url after it", func(s string) error {
		name, command, ok := strings.Cut(s, "=")
		if !ok || name == "" || command == "" {
			return errors.New("not name=command")
		}
		added = append(added, contender{name: name, command: command})
		return nil
	})
	f.Func("url", "`URL` of the -server before it; {hub} in it stands for the hub's number", func(s string) error {
		if len(added) == 0 || added[len(added)-1].url != "" {
			return errors.New("there is no -server before it")
		}
		c := &added[len(added)-1]
		c.url, c.tls = s, strings.HasPrefix(s, "wss://")
		return nil
	})
	return func() ([]contender, error) {
		for i, c := range added {
			t := target{url: c.url}
			switch same := func(other contender) bool { return other.name == c.name }; {
			case c.url == "":
				return nil, fmt.Errorf("-server %s: it has no -url", c.name)
			case slices.ContainsFunc(contenders, same) || slices.ContainsFunc(added[:i], same):
				return nil, fmt.Errorf("-server %s: there is a server of this name", c.name)
			case c.tls != strings.HasSuffix(c.name, "-tls"):
				return nil, fmt.Errorf("-server %s: a name must end in -tls if the URL is wss://, and only then", c.name)
			}
			if err := t.check(2); err != nil { // scenarios have several hubs
				return nil, err
			}
		}
		return added, nil
	}
}

// startCustom starts a server of the user's and waits until it listens at its URL.
func (l *launcher) startCustom(ctx context.Context, c contender) (*exec.Cmd, error) {
	u, err := url.Parse(strings.ReplaceAll(c.url, "{hub}", "0"))
	if err != nil {
		return nil, err
	}
	address := hostPort(u)
	if conn, err := net.Dial("tcp", address); err == nil {
		return nil, errors.Join(fmt.Errorf("something listens on %s already", address), conn.Close())
	}
	server := exec.CommandContext(ctx, "sh", "-c", "exec "+c.command) // exec, so that the process is the server
	return server, l.start(ctx, server, address)
}
