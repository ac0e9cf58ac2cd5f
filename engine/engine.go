// Package engine defines what the hubs of chat_broadcast need from an engine. An engine gives the messages of each hub
// their numbers, keeps the newest of them, and passes them to every node that has the hub open.
//
// With the default engine, memory, hubs number their messages themselves and this package is not involved. The plugin
// has two more: file, for one node whose hubs survive a restart, and redis, for hubs that many nodes share. Anybody can
// write another one as a Caddy module in the namespace chat_broadcast.engines. The package enginetest tests it.
//
// An engine is simple on purpose. Queues, retries, gaps and the users of a hub are the business of the hub that uses it.
package engine

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"strconv"
	"time"
)

// An Engine is a configured engine: the guest module.
type Engine interface {
	// Key identifies the messages that sessions of the engine share, for example by a folder or by an address and a
	// prefix, without any secret. A reload that configures an engine with the same key keeps the session.
	Key() string

	// Connect starts a session, and returns without waiting for a server. A server that does not answer is no error:
	// the session reports it to the monitor and connects when it can. With an error the configuration does not start.
	Connect(Monitor) (Session, error)
}

// A Reconfigurer is an Engine whose configuration has parts that are not in its key, such as a password.
type Reconfigurer interface {
	// Reconfigure gives a running session, which an engine with the same key has started, this configuration.
	Reconfigure(Session)
}

// A Limiter is an Engine that takes only messages up to a size.
type Limiter interface {
	// MaxMessageSize returns the largest `max_message_size` that a hub may have, in bytes.
	MaxMessageSize() int
}

// A Monitor learns how a session does. It is safe for concurrent use, and its methods return at once.
type Monitor interface {
	// State tells that the engine cannot be reached, for the given reason, or with nil that it can. A session is down
	// until its first State(nil).
	State(err error)

	// Warn has one sentence for the operator's log, about a setting of the server that endangers messages, or about data
	// that cannot be read.
	Warn(text string)
}

// A Session is a running engine. It outlives configurations, and is safe for concurrent use.
//
// A call that needs a server returns when its context is done at the latest. Hubs are known by name: 1 to 255 bytes of
// UTF-8; a name that begins with a control character belongs to the plugin.
type Session interface {
	// Open returns what the engine has of a hub, and from then on passes everything new to the receiver: all entries
	// with a number above Snapshot.Seq and no gap. Entries may reach the receiver before Open returns. A hub that the
	// engine does not have is new: it has an epoch and no entries. Opening an open hub again replaces the receiver: the
	// one before gets nothing more. A failed Open leaves the hub closed. A cluster first takes back what this node has
	// announced in the hub before.
	Open(ctx context.Context, hub string, bounds Bounds, to Receiver) (Snapshot, error)

	// Leave ends what Open began, unless another receiver has replaced this one. It returns at once. A call of the
	// receiver that has begun may still run. The hub may be opened again at once, also while Leave still has work to do:
	// a cluster also takes back what this node has announced, but nothing that it announces after a later Open.
	Leave(hub string, from Receiver)

	// Publish gives the messages of a batch consecutive numbers, in their order, keeps them as the bounds say, and
	// passes them to the receivers of all nodes, this one included. When it returns without an error the messages are
	// as safe as the engine can make them. The hub need not be open. The receipts are those of the messages, one by
	// one.
	//
	// An error that wraps ErrUnavailable means that this call has published no message and none will be. It says nothing
	// about an earlier attempt. After any other error the messages may be published or not; the caller repeats the batch,
	// with the same messages and Number.
	Publish(ctx context.Context, hub string, batch Batch) ([]Receipt, error)

	// Forget makes the hub forget its entries and begin a new epoch. It keeps receipts, users and the receipts of the last
	// batch. The version of announcements begins again.
	Forget(ctx context.Context, hub string) error

	// Close ends the session. Calls that run may fail. It calls neither a receiver nor the monitor after it has
	// returned.
	Close() error
}

// A Cluster is a Session whose hubs are shared by many nodes. A node is one process.
type Cluster interface {
	Session

	// ID returns the id of this node. It never changes.
	ID() NodeID

	// Number returns a number that no other living node has, from 1. It is 0 until the session is connected, and may
	// change when the engine has lost its data.
	Number() uint64

	// Read returns what the engine has of a hub after a position, to fill a gap. If the position's epoch is not the
	// hub's, or if the engine no longer has the entry after it, the snapshot begins with the oldest entry that it has.
	Read(ctx context.Context, hub string, after Position) (Snapshot, error)

	// Announce tells the other nodes how many clients each of the given users now has in the hub on this node. A user
	// without clients has 0. It is called for an open hub, and for one call at a time. The receivers of all nodes get
	// it, this one included.
	Announce(ctx context.Context, hub string, users []UserCount) error

	// Renew keeps this node and what it knows alive. It must be called every RenewInterval, and once after each
	// State(nil). It returns the open hubs whose position or version differs from what the node knows.
	Renew(ctx context.Context, status Status, known []Known) (Renewal, error)

	// Nodes returns the living nodes, this one included, by name and number.
	Nodes(ctx context.Context) ([]Node, error)
}

const (
	// RenewInterval is the time between two calls of Cluster.Renew.
	RenewInterval = 5 * time.Second

	// Lease is how long a node lives without Renew. After that the others remove its users.
	Lease = 15 * time.Second
)

// ErrUnavailable means that the engine has certainly not published a message.
var ErrUnavailable = errors.New("the engine is unavailable")

// ErrOldBatch means that a batch with a higher number was published before. Nobody will learn what has become of an earlier
// attempt.
var ErrOldBatch = fmt.Errorf("%w: a later batch was published", ErrUnavailable)

// A Receiver gets what happens in one hub, in order: the session makes one call at a time for each Open. The calls
// return at once. A receiver may keep what it gets, and must not change it. A receiver must expect entries that it already
// has. A Cluster may lose calls when a server or a connection fails; any other Session never does.
type Receiver interface {
	// Entries passes consecutive entries. The first has the given number.
	Entries(epoch string, first uint64, entries []Entry)

	// Users passes what a node has announced. The version counts the announcements of the hub in this epoch.
	Users(version uint64, node NodeID, users []UserCount)
}

// A Position is a place among the messages of a hub. An epoch and a number together name one message for ever.
type Position struct {
	Epoch string // 1 to 16 lower-case letters and digits, see NewEpoch
	Seq   uint64 // of the newest message; numbers begin with 1, or go on in a new epoch
}

// NewEpoch returns an epoch that no hub has had.
func NewEpoch() string {
	var random [8]byte
	_, _ = rand.Read(random[:]) // never fails
	return strconv.FormatUint(binary.NativeEndian.Uint64(random[:]), 36)
}

// Bounds say what an engine keeps of a hub. It may keep a little more, up to twice as much. Nodes may have different bounds
// for a hub that they share. Then the largest of each hold, so that no node takes from the others what they keep. A Cluster
// may hold to the bounds of a node for some minutes after the node has left the hub.
type Bounds struct {
	Messages int           // the newest entries
	Bytes    int           // of their data, together; the newest entry is kept even if it alone has more
	Age      time.Duration // of entries and receipts; a hub that is not open and has nothing younger is forgotten
	Receipts int           // receipts of messages with a key
}

// A Batch is what one node publishes in one hub at once.
type Batch struct {
	Bounds   Bounds
	Known    Position  // the newest message that the node has of the hub; zero if the hub is not open there
	Messages []Message // 1 to 64

	// Number makes the batch safe to repeat: when the number is that of the last batch of this session in the hub,
	// Publish returns the receipts of that batch. Numbers grow as long as the session lives, also when the hub is
	// opened again. Publish refuses a lower one with ErrOldBatch. A batch with number 0 is safe to repeat only if its
	// messages have keys.
	Number uint64
}

// A Message is one to be published.
type Message struct {
	Data    []byte // opaque to the engine, which must not change it
	Key     Key    // not zero: a message with the same key is published once within Bounds.Age
	Attempt Attempt
}

// A Key identifies a message by what its sender says about it. The zero key is none.
type Key [16]byte

// An Attempt says what an engine does with a message whose key it does not remember. Without a key it remembers none.
type Attempt uint8

const (
	// First means that it publishes the message.
	First Attempt = iota

	// Again means that the message may have been sent before. The engine publishes it if it can know that it has not, and
	// otherwise answers Receipt.Unknown. It cannot know after it has forgotten a receipt within Bounds.Age.
	Again

	// Lookup means that the engine answers Receipt.Unknown.
	Lookup
)

// A Receipt says what has become of a message.
type Receipt struct {
	Position
	At       time.Time // with milliseconds
	Repeated bool      // a message with this key was published before, as Position and At say
	Unknown  bool      // the message may have been published before, and was not published now
}

// An Entry is a message that a hub has.
type Entry struct {
	At   time.Time // with milliseconds; it may be before that of the entry before
	Data []byte
}

// A Snapshot is what an engine has of a hub: the entries after number Base up to Seq, which is Base + len(Entries).
type Snapshot struct {
	Position
	Base    uint64
	Entries []Entry

	// Before is where this epoch goes on from the one before it: that epoch ended with that number, and up to it both
	// have the same messages. It is zero if the numbers have begun anew, or if the engine does not know.
	Before Position

	// Only of a Cluster: what the nodes have announced, without users that have no clients, and the newest version.
	Users   map[NodeID][]UserCount
	Version uint64
}

// A NodeID identifies a node for as long as it lives, and no other node ever.
type NodeID string

// A UserCount is a user in a hub, and how many clients the user has there on one node. The user "" is anonymous.
type UserCount struct {
	User    string
	Clients int
}

// A Known is what a node knows of a hub that it has open.
type Known struct {
	Hub string
	Position
	Version uint64
	Bounds  Bounds
}

// A Status describes a node to the others.
type Status struct {
	Name    string // of the machine
	Since   time.Time
	Hubs    int // open
	Clients int
	Behind  uint64 // how many messages the node has yet to get, at its last Renew
}

// A Renewal is the answer to Cluster.Renew.
type Renewal struct {
	// Changed has the position and the version of each known hub for which the engine has others.
	Changed []Known

	// Forgotten says that the engine has taken the node for dead and has removed its users: the node must announce them
	// again.
	Forgotten bool
}

// A Node describes a node of a cluster.
type Node struct {
	ID     NodeID
	Number uint64
	Self   bool
	Status
	Renewed time.Time // when it last called Renew
}
