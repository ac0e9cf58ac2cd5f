package redisengine

import (
	"context"
	"embed"
	"errors"
	"fmt"
	"strings"

	"github.com/chat-broadcast/caddy-chat-broadcast/engine"
	"github.com/redis/rueidis"
)

// The fence.
//
// An epoch and a number must name one message for ever. But a server that restarts may have lost its newest writes, and
// so may a replica that takes the place of its primary: numbers run back. If the epoch went on, another message would get
// the number of one that clients have seen. Three things prevent that.
//
//   - Scripts run by EVALSHA only, and the text of each contains the run of the server process. Since version 7 a server
//     neither saves nor replicates scripts, so a process that has restarted answers NOSCRIPT until somebody has examined
//     it. A script is loaded only over the connection on which the server has said its run, so no server ever has the
//     scripts of another one.
//   - The data name the generation to which they belong. fence.lua decides, when a session examines a server, whether
//     the data of this server continue the generation: only if it is the same run, without a promotion in between, or if
//     nothing can be lost in a restart. Each hub has the generation in which its epoch was valid; in another one, the next
//     script that touches the hub begins a new epoch (see load in hub.lua).
//   - The scripts also contain the fence, which is made of run and generation, and each compares it with that in the data.
//     If they differ it does nothing and answers STALE. So all nodes agree on the generation, also when the data were
//     deleted, and when a process that was a primary, and then a replica, becomes a primary again. Such a process still
//     has the scripts.
//
// Moreover, a hub begins a new epoch when a node knows a newer message of the epoch than the server has.

// format is that of the data. Nodes with different ones cannot share them.
const format = "2"

//go:embed scripts/*.lua
var scriptFiles embed.FS

// A script names a file in the folder scripts.
type script int

const (
	scriptPublish script = iota
	scriptRead
	scriptForget
	scriptAnnounce
	scriptRenew
	scriptLease
	scriptNodes
	scriptFindEnded
	scriptRemoveUsers
	scriptEndLease
	scriptRemoveNode
)

// A scriptText says how the text of a script is put together.
type scriptText struct {
	flags string   // see "Eval scripts" in the documentation of Redis
	files []string // after common
}

// Only messages are refused when the server has no memory left: what else there is takes little, and helps to free some.
var scriptTexts = [...]scriptText{
	scriptPublish:     {"", []string{"hub", "receipts", "publish"}},
	scriptRead:        {"allow-oom", []string{"hub", "read"}},
	scriptForget:      {"allow-oom", []string{"hub", "forget"}},
	scriptAnnounce:    {"allow-oom", []string{"hub", "announce"}},
	scriptRenew:       {"allow-oom", []string{"hub", "renew"}},
	scriptLease:       {"allow-oom", []string{"lease"}},
	scriptNodes:       {"no-writes", []string{"nodes"}},
	scriptFindEnded:   {"allow-oom", []string{"find_ended"}},
	scriptRemoveUsers: {"allow-oom", []string{"hub", "remove_users"}},
	scriptEndLease:    {"allow-oom", []string{"end_lease"}},
	scriptRemoveNode:  {"allow-oom", []string{"remove_node"}},
}

// loadedScripts are the scripts that the server of a link has.
type loadedScripts struct {
	server     server
	generation string
	sha        [len(scriptTexts)]string
}

// errTwoServers means that a connection does not lead to one process.
var errTwoServers = errors.New("different servers answer on one connection: " +
	"the address seems to be that of a proxy, use that of the primary")

// raiseFence examines the server, decides to which generation its data belong, and loads the scripts.
func (l *link) raiseFence(ctx context.Context) (*loadedScripts, error) {
	srv, err := l.examine(ctx)
	if err != nil {
		return nil, err
	}
	if err := srv.check(); err != nil {
		return nil, err
	}
	loaded := &loadedScripts{server: srv}
	constants, err := l.decideGeneration(ctx, loaded)
	if err != nil {
		return nil, err
	}
	if err := l.loadScripts(ctx, loaded, constants); err != nil {
		return nil, err
	}
	again, err := l.examine(ctx)
	if err != nil {
		return nil, err
	}
	if again.runID != srv.runID {
		return nil, errTwoServers
	}
	l.session.generation.Store(&loaded.generation)
	return loaded, nil
}

// decideGeneration runs fence.lua, and returns the line that defines the constants of the scripts.
func (l *link) decideGeneration(ctx context.Context, loaded *loadedScripts) (string, error) {
	srv := loaded.server
	sha, err := l.loadScript(ctx, fmt.Sprintf("#!lua\nlocal RUN = %q\n%s", srv.runID, mustRead("fence")))
	if err != nil {
		return "", err
	}
	known := ""
	if g := l.session.generation.Load(); g != nil {
		known = *g
	}
	answer, err := l.do(ctx, l.evalsha(sha, []string{l.session.keys.server}, format, engine.NewEpoch(), known,
		srv.promotion, bit(srv.keeps()), bit(srv.rewriting))).ToArray()
	if code(err) == "FORMAT" {
		return "", fmt.Errorf("another version of the plugin has written the data (format %s instead of %s): "+
			"update all nodes, or use another prefix", strings.TrimPrefix(err.Error(), "FORMAT "), format)
	}
	if err != nil {
		return "", err
	}
	if len(answer) != 3 {
		return "", errMalformed
	}
	fence, err1 := answer[0].ToString()
	generation, err2 := answer[1].ToString()
	lost, err3 := answer[2].AsInt64()
	if err := errors.Join(err1, err2, err3); err != nil {
		return "", errMalformed
	}
	loaded.generation = generation
	return fmt.Sprintf("local FENCE, GENERATION, LOST = %q, %q, %d\n", fence, generation, lost), nil
}

func (l *link) loadScripts(ctx context.Context, loaded *loadedScripts, constants string) error {
	for s, t := range scriptTexts {
		text := "#!lua\n"
		if t.flags != "" {
			text = "#!lua flags=" + t.flags + "\n"
		}
		text += constants + mustRead("common")
		for _, file := range t.files {
			text += mustRead(file)
		}
		sha, err := l.loadScript(ctx, text)
		if err != nil {
			return err
		}
		loaded.sha[s] = sha
	}
	return nil
}

func (l *link) loadScript(ctx context.Context, text string) (string, error) {
	return l.do(ctx, l.commands.B().ScriptLoad().Script(text).Build()).ToString()
}

func (l *link) evalsha(sha string, keys []string, args ...string) rueidis.Completed {
	return l.commands.B().Evalsha().Sha1(sha).Numkeys(int64(len(keys))).Key(keys...).Arg(args...).Build()
}

// mustRead returns the text of a script. It is part of the program, so it is there.
func mustRead(file string) string {
	text, err := scriptFiles.ReadFile("scripts/" + file + ".lua")
	if err != nil {
		panic(err)
	}
	return string(text)
}
