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
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
	"unicode/utf8"

	caddycmd "github.com/caddyserver/caddy/v2/cmd"
	"github.com/spf13/cobra"
)

func init() {
	caddycmd.RegisterCommand(caddycmd.Command{
		Name:  "chat",
		Usage: "<command>",
		Short: "Watches and steers the chat_broadcast hubs of a running Caddy",
		Long: `
Shows the hubs and clients of a running Caddy, publishes messages, follows hubs
and closes clients, by way of Caddy's admin endpoint.

The endpoint is the one given with --address, or that of the configuration
given with --config, or else Caddy's default.

With --json each line of the output is one object, the same as in the admin API.`,
		CobraFunc: chatCommands,
	})
}

// chatCommands makes cmd what `caddy chat` is.
func chatCommands(cmd *cobra.Command) {
	cmd.Args = cobra.NoArgs // or a misspelt command would be shown the help and succeed
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
		Short:   "Publishes a message; without a text, or with -, what is read from the standard input",
		Example: `  caddy chat send https://example.com/chat/lobby "Maintenance at noon"`,
		Args:    hubArgs(1, 2),
		RunE:    runSend,
	}
	send.Flags().Bool("binary", false, "Publish a binary message")
	cmd.AddCommand(list, kick, send,
		&cobra.Command{
			Use:   "clients <hub>",
			Short: "Lists the clients of a hub, in the order in which they joined",
			Args:  hubArgs(1, 1),
			RunE:  runClients,
		},
		&cobra.Command{
			Use:   "tail <hub>",
			Short: "Shows the messages of a hub from now on",
			Long: `
Shows each message of a hub from now on: its number, the client that sent it
(- for none) and its text. The hub need not exist yet. Where messages came faster than they
could be shown, a line says how many were left out. A reload of Caddy is
survived; the command ends when Caddy does.`,
			Args: hubArgs(1, 1),
			RunE: runTail,
		},
	)
}

// hubArgs accepts a hub's name and further arguments, from least to most of all. The empty name would lead to another
// path.
func hubArgs(least, most int) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if err := cobra.RangeArgs(least, most)(cmd, args); err != nil {
			return err
		}
		return named("hub", checkHubName(args[0]))
	}
}

// runHubs is `caddy chat hubs`.
func runHubs(cmd *cobra.Command, _ []string) error {
	prefix, _ := cmd.Flags().GetString("prefix") // fails only for a flag that is not defined
	t := newTable(cmd, "HUB", "CLIENTS", "MESSAGES", "RETAINED", "SINCE")
	query := url.Values{"prefix": {prefix}, "limit": {strconv.Itoa(maxPage)}}
	for {
		var page hubsPage
		if err := call(cmd, http.MethodGet, "/chat_broadcast/hubs?"+query.Encode(), "", nil, &page); err != nil {
			return err
		}
		for _, b := range page.Hubs {
			t.row(b, b.Name, b.Clients, b.Head, b.RetainedMessages, since(b.Since))
		}
		if page.Next == "" {
			return t.out.Flush()
		}
		query.Set("after", page.Next)
	}
}

// runClients is `caddy chat clients`.
func runClients(cmd *cobra.Command, args []string) error {
	t := newTable(cmd, "CLIENT", "USER", "ADDRESS", "SINCE", "LAG", "MESSAGES IN", "OUT", "BYTES IN", "OUT")
	query := url.Values{"limit": {strconv.Itoa(maxPage)}}
	for {
		var page clientsPage
		if err := call(cmd, http.MethodGet, hubPath(args[0])+"?"+query.Encode(), "", nil, &page); err != nil {
			return err
		}
		for _, c := range page.Clients {
			t.row(c, c.ID, c.User, c.ClientIP, since(c.Since), c.Lag, c.MessagesIn, c.MessagesOut, c.BytesIn, c.BytesOut)
		}
		if page.Next == "" {
			return t.out.Flush()
		}
		query.Set("after", page.Next)
	}
}

// runSend is `caddy chat send`.
func runSend(cmd *cobra.Command, args []string) error {
	body := cmd.InOrStdin()
	if len(args) == 2 && args[1] != "-" {
		body = strings.NewReader(args[1])
	}
	message, err := io.ReadAll(body) // the endpoint waits for 10 s at most
	if err != nil {
		return fmt.Errorf("reading the message: %w", err)
	}
	contentType := "text/plain; charset=utf-8"
	if binary, _ := cmd.Flags().GetBool("binary"); binary {
		contentType = "application/octet-stream"
	} else if !utf8.Valid(message) {
		return errors.New("the message is not valid UTF-8: publish it with --binary")
	}
	var done publication
	err = call(cmd, http.MethodPost, hubPath(args[0])+"/messages", contentType, bytes.NewReader(message), &done)
	if err != nil {
		return err
	}
	return report(cmd, done, "published message %d for %d clients\n", done.Seq, done.Clients)
}

// kickable is what `caddy chat kick` has a flag for.
var kickable = []struct{ flag, usage, path string }{
	{"client", "The id of a client, as shown by caddy chat clients", "/chat_broadcast/clients/"},
	{"user", "A user, in all hubs", "/chat_broadcast/users/"},
	{"hub", "A hub", "/chat_broadcast/hubs/"},
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
			return fmt.Errorf("--%s must not be empty", k.flag) // a variable that is not set, and more kicked than was meant
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
	return report(cmd, done, "kicked %d clients\n", done.Kicked)
}

// tailPause is what `caddy chat tail` waits between two attempts to follow a hub, when the first lasted no longer.
const tailPause = time.Second

// runTail is `caddy chat tail`. A reload ends what the endpoint answers: it asks again, until there is no endpoint.
func runTail(cmd *cobra.Command, args []string) error {
	last := uint64(0)
	for again := false; ; again = true {
		began := time.Now()
		resp, err := ask(cmd, http.MethodGet, hubPath(args[0])+"/messages", "", nil)
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

// showTail prints lines until they end. last is the number of the message up to which all was shown or said to be left
// out, 0 for none, before and after.
func showTail(cmd *cobra.Command, r io.Reader, last uint64) (uint64, error) {
	lines := json.NewDecoder(r)
	for first := true; ; first = false {
		var line tailLine
		if lines.Decode(&line) != nil {
			return last, nil // however it ends, asking again will tell why
		}
		if first && last > 0 && line.Seq > last+1 { // lower is a hub that was opened anew
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
	return nil // of a later version
}

// ask sends a request to the admin endpoint that the flags tell.
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
		if answer, ok := apiError(err); ok {
			return nil, answer
		}
		return nil, fmt.Errorf("asking Caddy's admin endpoint at %s (--address or --config choose another): %w", endpoint, err)
	}
	return resp, nil
}

// apiError returns what the admin API says is wrong, if err is an answer of it. Caddy keeps that as text only.
func apiError(err error) (error, bool) {
	_, body, found := strings.Cut(err.Error(), "caddy responded with error: HTTP ")
	if !found {
		return nil, false
	}
	var answer struct {
		Error string `json:"error"`
	}
	_, body, _ = strings.Cut(body, ": ")
	if json.Unmarshal([]byte(body), &answer) != nil || answer.Error == "" {
		return nil, false
	}
	return errors.New(answer.Error), true
}

// call sends a request and reads the answer, which is JSON.
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

// report prints v as JSON, or else the text.
func report(cmd *cobra.Command, v any, format string, args ...any) error {
	if asJSON, _ := cmd.Flags().GetBool("json"); asJSON {
		return json.NewEncoder(cmd.OutOrStdout()).Encode(v)
	}
	_, err := fmt.Fprintf(cmd.OutOrStdout(), format, args...)
	return err
}

// A table prints rows: in columns for people, or as objects for programs. A failure to write is out.Flush's to tell.
type table struct {
	out interface {
		io.Writer
		Flush() error
	}
	asJSON bool
}

func newTable(cmd *cobra.Command, header ...string) table {
	if asJSON, _ := cmd.Flags().GetBool("json"); asJSON {
		return table{bufio.NewWriter(cmd.OutOrStdout()), true}
	}
	t := table{tabwriter.NewWriter(cmd.OutOrStdout(), 0, 0, 2, ' ', 0), false}
	fmt.Fprintln(t.out, strings.Join(header, "\t"))
	return t
}

// row adds v, of which people see the given columns.
func (t table) row(v any, columns ...any) {
	if t.asJSON {
		_ = json.NewEncoder(t.out).Encode(v)
		return
	}
	cells := make([]string, len(columns))
	for i, column := range columns {
		cells[i] = printable(fmt.Sprint(column))
	}
	fmt.Fprintln(t.out, strings.Join(cells, "\t"))
}

func since(t time.Time) string { return t.Local().Format(time.DateTime) }

// printable returns s with everything escaped that is no visible character or space: users and messages are strangers'
// words, which must not steer an operator's terminal.
func printable(s string) string {
	var b strings.Builder
	for _, r := range s {
		if strconv.IsPrint(r) {
			b.WriteRune(r)
		} else {
			b.WriteString(strings.Trim(strconv.QuoteRune(r), "'"))
		}
	}
	return b.String()
}
