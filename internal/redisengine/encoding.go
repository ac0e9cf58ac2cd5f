package redisengine

import (
	"encoding/binary"
	"errors"
	"math"
	"strconv"
	"strings"
	"time"

	"github.com/chat-broadcast/caddy-chat-broadcast/engine"
	"github.com/redis/rueidis"
)

// What scripts publish on the channel of a hub is binary. Numbers have the highest byte first. They are doubles, as all
// numbers are in Lua, unless something else is said; doubles are exact up to 2^53. In both kinds, the epoch follows the
// length of the epoch in one byte.
//
//	entries  'E', epoch, number of the first entry, entries
//	         an entry: integer of 4 bytes with the length of the rest, entry as in the list of the hub
//	users    'U', epoch, version, length of the node in one byte, node, users
//	         a user: two integers of 4 bytes with the clients and the length of the rest, user
//
// An entry in the list of a hub is its time (ms), its number, a number that only the scripts use, and its data.

// Arguments are text, except for bounds: four doubles, see hub.lua.

// boundsAsBefore is an argument that leaves the bounds of a hub as they are.
const boundsAsBefore = ""

// encodeBounds returns bounds as an argument.
func encodeBounds(b engine.Bounds) string {
	var data [32]byte
	for i, n := range []float64{float64(b.Messages), float64(b.Bytes), float64(b.Age.Milliseconds()), float64(b.Receipts)} {
		binary.BigEndian.PutUint64(data[8*i:], math.Float64bits(n))
	}
	return string(data[:])
}

func milliseconds(d time.Duration) string { return strconv.FormatInt(d.Milliseconds(), 10) }

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
		p.first = r.number()
		p.entries = r.entries(p.first)
		r.failed = r.failed || len(p.entries) == 0
	case "U":
		p.version = r.number()
		p.node = engine.NodeID(r.take(int(r.uint8())))
		p.users = r.users()
		r.failed = r.failed || p.node == ""
	default:
		r.failed = true
	}
	return p, !r.failed && p.epoch != ""
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

func (r *reader) number() uint64 {
	b := r.take(8)
	if b == nil {
		return 0
	}
	f := math.Float64frombits(binary.BigEndian.Uint64(b))
	if f < 0 || f > 1<<53 || f != math.Trunc(f) {
		r.failed = true
		return 0
	}
	return uint64(f)
}

// entries takes all entries, of which the first has the given number.
func (r *reader) entries(first uint64) []engine.Entry {
	var all []engine.Entry
	for len(r.rest) > 0 {
		entry := reader{rest: r.take(int(r.uint32()))}
		all = append(all, entry.entry(first+uint64(len(all))))
		r.failed = r.failed || entry.failed
	}
	return all
}

// entry takes the entry with the given number.
func (r *reader) entry(number uint64) engine.Entry {
	at := time.UnixMilli(int64(r.number()))
	if r.number() != number {
		r.failed = true
	}
	r.number()
	return engine.Entry{At: at, Data: r.rest}
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
	if len(answer) != 8 {
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
	if before, _ := answer[4].ToString(); before != "" {
		p.Before = engine.Position{Epoch: before, Seq: number(5)}
	}
	entries, err1 := answer[6].AsStrSlice()
	users, err2 := answer[7].AsStrSlice()
	if errors.Join(err, err1, err2) != nil || p.Epoch == "" || len(users)%2 != 0 {
		return page{}, errMalformed
	}
	p.Seq = p.Base
	for _, text := range entries {
		p.Seq++
		r := reader{rest: []byte(text)}
		p.Entries = append(p.Entries, r.entry(p.Seq))
		if r.failed || p.Seq > p.head {
			return page{}, errMalformed
		}
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
	r := reader{rest: []byte(answer)}
	at, first := r.number(), r.number()
	next := engine.Receipt{
		Position: engine.Position{Epoch: string(r.take(int(r.uint8()))), Seq: first},
		At:       time.UnixMilli(int64(at)),
	}
	words := strings.Fields(string(r.rest))
	if r.failed || len(words) != 0 && len(words) != n {
		return nil, errMalformed
	}
	receipts := make([]engine.Receipt, n)
	for i := range receipts {
		word := "+"
		if len(words) > 0 {
			word = words[i]
		}
		switch word {
		case "+":
			receipts[i] = next
			next.Seq++
		case "?":
			receipts[i].Unknown = true
		default:
			var err error
			if receipts[i], err = parseReceipt(word); err != nil {
				return nil, err
			}
		}
	}
	return receipts, nil
}

// parseReceipt parses the receipt of a message that was published before.
func parseReceipt(word string) (engine.Receipt, error) {
	parts := strings.Split(word, ":")
	if len(parts) != 3 {
		return engine.Receipt{}, errMalformed
	}
	seq, err1 := strconv.ParseUint(parts[1], 10, 64)
	at, err2 := strconv.ParseInt(parts[2], 10, 64)
	if err1 != nil || err2 != nil {
		return engine.Receipt{}, errMalformed
	}
	position := engine.Position{Epoch: parts[0], Seq: seq}
	return engine.Receipt{Position: position, At: time.UnixMilli(at), Repeated: true}, nil
}
