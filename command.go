package chatbroadcast

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
	"unicode/utf8"

	caddycmd "github.com/caddyserver/caddy/v2/cmd"
	"github.com/dustin/go-humanize/english"
	"github.com/spf13/cobra"
)

func init() {
	caddycmd.RegisterCommand(caddycmd.Command{
		Name:  "chat",
		Usage: "<command>",
		Short: "Watches and steers the chat_broadcast hubs of a running Caddy",
		Long: `
Shows the hubs and clients of a running Caddy, publishes messages, follows hubs
and closes clients, by way of Caddy's admin endpoint. With an engine that many
nodes share, it covers all of them, whichever node has that endpoint.

The command finds the endpoint by --address, or in the configuration that
--config names. Without both it uses Caddy's default.

Names of hubs and users, in arguments and in the output, have \\ for a backslash
and, for instance, \u202e for a character that cannot be shown.

With --json each line of the output is one object, the same as in the admin API.`,
		CobraFunc: chatCommands,
	})
}

// chatCommands makes cmd the command `caddy chat` and adds its subcommands.
func chatCommands(cmd *cobra.Command) {
	cmd.Args = cobra.NoArgs // otherwise a misspelled command would print the help and succeed
	cmd.RunE = func(cmd *cobra.Command, _ []string) error { return cmd.Help() }
	flags := cmd.PersistentFlags()
	flags.String("address", "", "The address of the admin endpoint")
	flags.StringP("config", "c", "", "The configuration file to take that address from")
	flags.StringP("adapter", "a", "", "The name of the adapter for that file")
	flags.Bool("json", false, "Print JSON, one object a line")

	list := &cobra.Command{
		Use:   "hubs",
		Short: "Lists the hubs",
		Args:  cobra.NoArgs,
		RunE:  runHubs,
	}
	list.Flags().String("prefix", "", "Only hubs whose names begin with this")
	kick := &cobra.Command{
		Use:     "kick --client <id> | --user <user> | --hub <hub>",
		Short:   "Closes a client, or all clients of a user or of a hub, with 1008 kicked",
		Example: "  caddy chat kick --user ada",
		Args:    cobra.NoArgs,
		RunE:    runKick,
	}
	for _, k := range kickable {
		kick.Flags().String(k.flag, "", k.usage)
	}
	send := &cobra.Command{
		Use:     "send <hub> [<text>|-]",
		Short:   "Publishes a message; without a text, or with -, it reads one from the standard input",
		Example: `  caddy chat send https://example.com/chat/lobby "Maintenance at noon"`,
		Args:    sendArgs,
		RunE:    runSend,
	}
	send.Flags().Bool("binary", false, "Publish a binary message")
	send.Flags().Bool("allow-empty", false, "Publish an empty message, too")
	cmd.AddCommand(list, kick, send,
		&cobra.Command{
			Use:   "clients <hub>",
			Short: "Lists the clients of a hub, in the order in which they joined",
			Args:  hubArgs,
			RunE:  runClients,
		},
		&cobra.Command{
			Use:   "tail <hub>",
			Short: "Shows the messages of a hub from now on",
			Long: `
Shows each message of a hub from now on: its number, the client that sent it
(- for none) and its text. The hub need not exist yet. Where messages came faster than they
could be shown, a line says how many were left out. The command goes on after
a reload of Caddy, and ends when Caddy does.`,
			Args: hubArgs,
			RunE: runTail,
		},
		&cobra.Command{
			Use:   "nodes",
			Short: "Lists the nodes that share the hubs, and says how the engine does",
			Args:  cobra.NoArgs,
			RunE:  runNodes,
		},
	)
	escapeErrors(cmd)
}

// hubArgs accepts the name of a hub and nothing else.
func hubArgs(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		return errors.New("name the hub: caddy chat hubs lists them")
	}
	if err := cobra.MaximumNArgs(1)(cmd, args); err != nil {
		return err
	}
	_, err := hubArg(args)
	return err
}

// sendArgs accepts the name of a hub and a text.
func sendArgs(cmd *cobra.Command, args []string) error {
	if len(args) > 2 {
		return fmt.Errorf("quote the message: it is one argument, and there are %d after the hub", len(args)-1)
	}
	return hubArgs(cmd, args[:min(len(args), 1)])
}

// hubArg returns the name of the hub in the first of args. It returns an error for an invalid name, because the empty
// name would lead to another path.
func hubArg(args []string) (string, error) {
	name, err := unescapedName(args[0])
	if err == nil {
		err = checkHubName(name)
	}
	return name, named("hub", err)
}

// escapeErrors makes cmd and its subcommands escape their errors, which repeat arguments and answers.
func escapeErrors(cmd *cobra.Command) {
	cmd.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return printableError(err) })
	for _, c := range append(cmd.Commands(), cmd) {
		args, run := c.Args, c.RunE
		c.Args = func(cmd *cobra.Command, a []string) error { return printableError(args(cmd, a)) }
		c.RunE = func(cmd *cobra.Command, a []string) error { return printableError(run(cmd, a)) }
	}
}

func printableError(err error) error {
	if err == nil {
		return nil
	}
	return errors.New(printable(err.Error()))
}

// runHubs is `caddy chat hubs`.
func runHubs(cmd *cobra.Command, _ []string) error {
	escaped, _ := cmd.Flags().GetString("prefix") // fails only for a flag that is not defined
	prefix, err := unescapedName(escaped)
	if err != nil {
		return named("--prefix", err)
	}
	t := newTable(cmd, "HUB", "CLIENTS", "MESSAGES", "RETAINED", "SINCE")
	query := url.Values{"prefix": {prefix}, "limit": {strconv.Itoa(maxPage)}}
	var silent []string
	for {
		var page hubsPage
		if err := call(cmd, http.MethodGet, "/chat_broadcast/hubs?"+query.Encode(), "", nil, &page); err != nil {
			return err
		}
		for _, b := range page.Hubs {
			t.row(b, b.Name, b.Clients, b.Head, b.RetainedMessages, since(b.Since))
		}
		silent = append(silent, page.Silent...)
		if page.Next == "" {
			reportSilent(cmd, silent)
			return t.out.Flush()
		}
		query.Set("after", page.Next)
	}
}

// runClients is `caddy chat clients`.
func runClients(cmd *cobra.Command, args []string) error {
	hub, err := hubArg(args)
	if err != nil {
		return err
	}
	several := false
	if !isJSON(cmd) {
		if several, err = hasSeveralNodes(cmd); err != nil {
			return err
		}
	}
	header := []string{"CLIENT", "USER", "ADDRESS", "SINCE", "LAG", "MESSAGES IN", "OUT", "BYTES IN", "OUT"}
	if several {
		header = append(header, "NODE")
	}
	t := newTable(cmd, header...)
	query := url.Values{"limit": {strconv.Itoa(maxPage)}}
	var silent []string
	for {
		var page clientsPage
		if err := call(cmd, http.MethodGet, hubPath(hub)+"?"+query.Encode(), "", nil, &page); err != nil {
			return err
		}
		for _, c := range page.Clients {
			row := []any{c.ID, c.User, c.ClientIP, since(c.Since), c.Lag, c.MessagesIn, c.MessagesOut, c.BytesIn, c.BytesOut}
			if several {
				row = append(row, c.Node)
			}
			t.row(c, row...)
		}
		silent = append(silent, page.Silent...)
		if page.Next == "" {
			reportSilent(cmd, silent)
			return t.out.Flush()
		}
		query.Set("after", page.Next)
	}
}

// hasSeveralNodes reports whether several nodes share the hubs.
func hasSeveralNodes(cmd *cobra.Command) (bool, error) {
	var all nodesAnswer
	err := call(cmd, http.MethodGet, nodesPath, "", nil, &all)
	return len(all.Nodes) > 1, err
}

// reportSilent says on the standard error which nodes did not answer. Their part is missing in the output.
func reportSilent(cmd *cobra.Command, silent []string) {
	if len(silent) == 0 {
		return
	}
	slices.Sort(silent)
	fmt.Fprintf(cmd.ErrOrStderr(), "these nodes did not answer: %s\n", printable(strings.Join(slices.Compact(silent), ", ")))
}

// runNodes is `caddy chat nodes`.
func runNodes(cmd *cobra.Command, _ []string) error {
	var all nodesAnswer
	if err := call(cmd, http.MethodGet, nodesPath, "", nil, &all); err != nil {
		return err
	}
	state := "is up"
	if !all.Engine.Up {
		state = "is down: " + all.Engine.Error
	}
	if err := report(cmd, all, "The engine %s %s\n\n", printable(all.Engine.Name), printable(state)); err != nil || isJSON(cmd) {
		return err
	}
	t := newTable(cmd, "NODE", "NAME", "SINCE", "RENEWED", "HUBS", "CLIENTS", "BEHIND")
	for _, n := range all.Nodes {
		name, renewed := n.Name, "-"
		if n.Self {
			name += " (asked)"
		}
		if !n.Renewed.IsZero() {
			renewed = since(n.Renewed)
		}
		t.row(n, n.Number, name, since(n.Since), renewed, n.Hubs, n.Clients, n.Behind)
	}
	return t.out.Flush()
}

// runSend is `caddy chat send`.
func runSend(cmd *cobra.Command, args []string) error {
	hub, err := hubArg(args)
	if err != nil {
		return err
	}
	body := cmd.InOrStdin()
	if len(args) == 2 && args[1] != "-" {
		body = strings.NewReader(args[1])
	}
	message, err := io.ReadAll(body) // in whole, because the endpoint waits for 10 s at most
	if err != nil {
		return fmt.Errorf("reading the message: %w", err)
	}
	// An empty message may come from a command that failed in a pipe, or from a variable that is not set.
	if allowed, _ := cmd.Flags().GetBool("allow-empty"); len(message) == 0 && !allowed {
		return errors.New("the message is empty: publish it with --allow-empty")
	}
	contentType := "text/plain; charset=utf-8"
	if binary, _ := cmd.Flags().GetBool("binary"); binary {
		contentType = "application/octet-stream"
	} else if !utf8.Valid(message) {
		return errors.New("the message is not valid UTF-8: publish it with --binary")
	}
	var done publication
	err = call(cmd, http.MethodPost, hubPath(hub)+"/messages", contentType, bytes.NewReader(message), &done)
	if err != nil {
		return err
	}
	return report(cmd, done, "published message %d for %s\n", done.Seq, english.Plural(done.Clients, "client", ""))
}

// kickable has the flags of `caddy chat kick`, with their help and the path of the API.
var kickable = []struct{ flag, usage, path string }{
	{"client", "The id of a client, as shown by caddy chat clients", "/chat_broadcast/clients/"},
	{"user", "A user, in all hubs", "/chat_broadcast/users/"},
	{"hub", "A hub", hubsPath},
}

// runKick is `caddy chat kick`.
func runKick(cmd *cobra.Command, _ []string) error {
	var paths []string
	for _, k := range kickable {
		if !cmd.Flags().Changed(k.flag) {
			continue
		}
		name, _ := cmd.Flags().GetString(k.flag) // fails only for a flag that is not defined
		if name == "" {
			return fmt.Errorf("--%s must not be empty", k.flag) // a variable that is not set would kick more clients than was meant
		}
		name, err := unescapedName(name)
		if err != nil {
			return named("--"+k.flag, err)
		}
		paths = append(paths, k.path+escaped(name))
	}
	if len(paths) != 1 {
		return errors.New("say whom to kick, with one of --client, --user and --hub")
	}
	var done kicking
	if err := call(cmd, http.MethodDelete, paths[0], "", nil, &done); err != nil {
		return err
	}
	reportSilent(cmd, done.Silent)
	return report(cmd, done, "kicked %s\n", english.Plural(done.Kicked, "client", ""))
}

// tailPause is the pause of `caddy chat tail` between two attempts to follow a hub, if the first lasted no longer.
const tailPause = time.Second

// runTail is `caddy chat tail`. A reload ends the endpoint's answer. Then runTail asks again, until it cannot reach the
// endpoint.
func runTail(cmd *cobra.Command, args []string) error {
	hub, err := hubArg(args)
	if err != nil {
		return err
	}
	last := uint64(0)
	for again := false; ; again = true {
		began := time.Now()
		resp, err := ask(cmd, http.MethodGet, hubPath(hub)+"/messages", "", nil)
		if err != nil {
			return err
		}
		if !again {
			fmt.Fprintln(cmd.ErrOrStderr(), "waiting for messages")
		}
		last, err = showTail(cmd, resp.Body, last)
		_ = resp.Body.Close() // read to its end, or given up
		if err != nil {
			return err
		}
		if time.Since(began) < tailPause {
			time.Sleep(tailPause)
		}
	}
}

// showTail prints the lines of a tail until they end. last is the number of the newest message that was shown or
// reported as left out, or 0. showTail takes it from the tail before, and returns it for the next one.
func showTail(cmd *cobra.Command, r io.Reader, last uint64) (uint64, error) {
	lines := json.NewDecoder(r)
	for first := true; ; first = false {
		var line tailLine
		if lines.Decode(&line) != nil {
			return last, nil // the next request will find out why
		}
		if first && last > 0 && line.Seq > last+1 { // a lower number comes from a new hub of that name
			if err := showLine(cmd, tailLine{Lagged: line.Seq - last - 1}); err != nil {
				return last, err
			}
		}
		if err := showLine(cmd, line); err != nil {
			return last, err
		}
		last += line.Lagged
		if line.Seq > 0 {
			last = line.Seq
		}
	}
}

func showLine(cmd *cobra.Command, line tailLine) error {
	sender := line.Client
	if sender == "" {
		sender = "-"
	}
	switch {
	case line.Lagged > 0:
		return report(cmd, line, "lagged: %d messages are left out here\n", line.Lagged)
	case line.Data != nil:
		return report(cmd, line, "%d\t%s\t%s\n", line.Seq, sender, printable(*line.Data))
	case line.Data64 != nil:
		return report(cmd, line, "%d\t%s\tbinary, %d bytes\n", line.Seq, sender, len(*line.Data64))
	}
	return nil // a line of a later version
}

// ask sends a request to the admin endpoint that the flags choose.
func ask(cmd *cobra.Command, method, uri, contentType string, body io.Reader) (*http.Response, error) {
	address, _ := cmd.Flags().GetString("address")
	config, _ := cmd.Flags().GetString("config")
	adapter, _ := cmd.Flags().GetString("adapter")
	endpoint, err := caddycmd.DetermineAdminAPIAddress(address, nil, config, adapter)
	if err != nil {
		return nil, fmt.Errorf("finding Caddy's admin endpoint in --config: %w", err)
	}
	header := http.Header{"Connection": {"close"}}
	if contentType != "" {
		header.Set("Content-Type", contentType)
	}
	resp, err := caddycmd.AdminAPIRequest(endpoint, method, uri, header, body)
	if err != nil {
		if status, answer, ok := apiError(err); ok {
			if status == http.StatusNotFound && strings.HasPrefix(uri, hubsPath) {
				return nil, fmt.Errorf("%w; caddy chat hubs lists those that are. Unless the configuration names a hub, its name "+
					"begins with the site", answer)
			}
			return nil, answer
		}
		return nil, fmt.Errorf("asking Caddy's admin endpoint at %s (--address or --config choose another): %w", endpoint, err)
	}
	return resp, nil
}

// apiError returns the status and the reason in err, if err is an answer of the admin API. Caddy returns such an answer
// only as text.
func apiError(err error) (status int, reason error, ok bool) {
	_, answer, found := strings.Cut(err.Error(), "caddy responded with error: HTTP ")
	if !found {
		return 0, nil, false
	}
	code, body, _ := strings.Cut(answer, ": ")
	status, _ = strconv.Atoi(code)
	var said struct {
		Error string `json:"error"`
	}
	if json.Unmarshal([]byte(body), &said) != nil || said.Error == "" {
		return 0, nil, false
	}
	return status, errors.New(said.Error), true
}

// call sends a request and decodes the answer, which is JSON.
func call(cmd *cobra.Command, method, uri, contentType string, body io.Reader, answer any) error {
	resp, err := ask(cmd, method, uri, contentType, body)
	if err != nil {
		return err
	}
	err = json.NewDecoder(resp.Body).Decode(answer)
	if err := errors.Join(err, resp.Body.Close()); err != nil {
		return fmt.Errorf("reading the answer of Caddy's admin endpoint: %w", err)
	}
	return nil
}

// isJSON reports whether --json is set.
func isJSON(cmd *cobra.Command) bool {
	asJSON, _ := cmd.Flags().GetBool("json") // fails only for a flag that is not defined
	return asJSON
}

// report prints v as JSON if --json is set, and otherwise the text.
func report(cmd *cobra.Command, v any, format string, args ...any) error {
	if isJSON(cmd) {
		return encodeJSON(cmd.OutOrStdout(), v)
	}
	_, err := fmt.Fprintf(cmd.OutOrStdout(), format, args...)
	return err
}

// A table prints rows: in columns for people, or as JSON objects for programs. out.Flush returns the error of a failed
// write.
type table struct {
	out interface {
		io.Writer
		Flush() error
	}
	asJSON bool
}

func newTable(cmd *cobra.Command, header ...string) table {
	if isJSON(cmd) {
		return table{bufio.NewWriter(cmd.OutOrStdout()), true}
	}
	t := table{tabwriter.NewWriter(cmd.OutOrStdout(), 0, 0, 2, ' ', 0), false}
	fmt.Fprintln(t.out, strings.Join(header, "\t"))
	return t
}

// row adds a row: v for programs, the given columns for people.
func (t table) row(v any, columns ...any) {
	if t.asJSON {
		_ = encodeJSON(t.out, v)
		return
	}
	cells := make([]string, len(columns))
	for i, column := range columns {
		cells[i] = escapedName(fmt.Sprint(column))
	}
	fmt.Fprintln(t.out, strings.Join(cells, "\t"))
}

func since(t time.Time) string { return t.Local().Format(time.DateTime) }
