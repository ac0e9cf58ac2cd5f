package redisengine

import (
	"encoding/binary"
	"strconv"
	"strings"
	"time"

	"github.com/chat-broadcast/caddy-chat-broadcast/engine"
	"github.com/redis/rueidis"
)

// What scripts publish on the channel of a hub is binary. Numbers have the highest byte first. In both kinds, the epoch
// follows the length of the epoch in one byte.
//
//	entries  'E', epoch, number of the first entry in 8 bytes, entries
//	         an entry: time in 8 bytes (ms), length in 4 bytes, data
//	users    'U', epoch, version in 8 bytes, length of the node in 1 byte, node, users
//	         a user: clients in 4 bytes, length in 4 bytes, user
//
// read.lua answers entries in the same encoding.

// A push is what a script has published.
type push struct {
	epoch string

	first   uint64
	entries []engine.Entry

	// If node is not empty:
	version uint64
	node    engine.NodeID
	users   []engine.UserCount
}

// last returns the number of the last entry.
func (p *push) last() uint64 { return p.first + uint64(len(p.entries)) - 1 }

func parsePush(text string) (push, bool) {
	r := reader{rest: []byte(text)}
	kind := r.take(1)
	p := push{epoch: string(r.take(int(r.uint8())))}
	switch string(kind) {
	case "E":
		p.first = r.uint64()
		p.entries = r.entries()
		r.failed = r.failed || len(p.entries) == 0
	case "U":
		p.version = r.uint64()
		p.node = engine.NodeID(r.take(int(r.uint8())))
		p.users = r.users()
		r.failed = r.failed || p.node == ""
	default:
		r.failed = true
	}
	return p, !r.failed
}

// A reader takes values from the beginning of a text, until it fails.
type reader struct {
	rest   []byte
	failed bool
}

func (r *reader) take(n int) []byte {
	if n < 0 || n > len(r.rest) {
		r.failed = true
		r.rest = nil
		return nil
	}
	taken := r.rest[:n:n]
	r.rest = r.rest[n:]
	return taken
}

func (r *reader) uint8() uint8 {
	if b := r.take(1); b != nil {
		return b[0]
	}
	return 0
}

func (r *reader) uint32() uint32 {
	if b := r.take(4); b != nil {
		return binary.BigEndian.Uint32(b)
	}
	return 0
}

func (r *reader) uint64() uint64 {
	if b := r.take(8); b != nil {
		return binary.BigEndian.Uint64(b)
	}
	return 0
}

func (r *reader) entries() []engine.Entry {
	var all []engine.Entry
	for len(r.rest) > 0 {
		at := time.UnixMilli(int64(r.uint64()))
		all = append(all, engine.Entry{At: at, Data: r.take(int(r.uint32()))})
	}
	return all
}

func (r *reader) users() []engine.UserCount {
	var all []engine.UserCount
	for len(r.rest) > 0 {
		clients := int(r.uint32())
		all = append(all, engine.UserCount{User: string(r.take(int(r.uint32()))), Clients: clients})
	}
	return all
}

// A page is an answer of read.lua.
type page struct {
	engine.Snapshot
	head uint64 // number of the newest entry of the hub
}

func parsePage(answer []rueidis.RedisMessage) (page, error) {
	if len(answer) != 6 {
		return page{}, errMalformed
	}
	var p page
	var err error
	number := func(i int) uint64 {
		n, e := answer[i].AsUint64()
		if e != nil {
			err = errMalformed
		}
		return n
	}
	p.Base, p.head, p.Version = number(1), number(2), number(3)
	p.Epoch, _ = answer[0].ToString()
	text, e := answer[4].ToString()
	if e != nil || p.Epoch == "" {
		return page{}, errMalformed
	}
	r := reader{rest: []byte(text)}
	p.Entries = r.entries()
	p.Seq = p.Base + uint64(len(p.Entries))
	users, e := answer[5].AsStrSlice()
	if err != nil || e != nil || r.failed || p.Seq > p.head || len(users)%2 != 0 {
		return page{}, errMalformed
	}
	p.Users = map[engine.NodeID][]engine.UserCount{}
	for i := 0; i < len(users); i += 2 {
		clients, e := strconv.Atoi(users[i+1])
		if e != nil || len(users[i]) < nodeIDLength {
			return page{}, errMalformed
		}
		node, user := engine.NodeID(users[i][:nodeIDLength]), users[i][nodeIDLength:]
		p.Users[node] = append(p.Users[node], engine.UserCount{User: user, Clients: clients})
	}
	return p, nil
}

// parseReceipts parses an answer of publish.lua to a batch of n messages.
func parseReceipts(answer string, n int) ([]engine.Receipt, error) {
	words := strings.Fields(answer)
	if len(words) != 3 && len(words) != 3+n {
		return nil, errMalformed
	}
	next, err := parseReceipt(words[:3])
	if err != nil {
		return nil, err
	}
	receipts := make([]engine.Receipt, n)
	for i := range receipts {
		word := "+"
		if len(words) > 3 {
			word = words[3+i]
		}
		switch word {
		case "+":
			receipts[i] = next
			next.Seq++
		case "?":
			receipts[i].Unknown = true
		default:
			if receipts[i], err = parseReceipt(strings.Split(word, ":")); err != nil {
				return nil, err
			}
			receipts[i].Repeated = true
		}
	}
	return receipts, nil
}

// parseReceipt parses an epoch, a number and a time.
func parseReceipt(words []string) (engine.Receipt, error) {
	if len(words) != 3 {
		return engine.Receipt{}, errMalformed
	}
	seq, err1 := strconv.ParseUint(words[1], 10, 64)
	at, err2 := strconv.ParseInt(words[2], 10, 64)
	if err1 != nil || err2 != nil || words[0] == "" {
		return engine.Receipt{}, errMalformed
	}
	return engine.Receipt{Position: engine.Position{Epoch: words[0], Seq: seq}, At: time.UnixMilli(at)}, nil
}
