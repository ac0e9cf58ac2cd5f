package enginetest

import (
	"bytes"
	"cmp"
	"fmt"
	"slices"
	"time"

	"github.com/chat-broadcast/caddy-chat-broadcast/engine"
)

// A hub is what the server has of one hub. The server's lock guards it.
type hub struct {
	epoch    string
	seq      uint64          // of the newest message in this epoch, or 0
	entries  []engine.Entry  // the newest ones, up to seq
	before   engine.Position // where this epoch goes on from the one before
	bounds   engine.Bounds   // the widest at the newest call that named some
	modified time.Time       // when the newest message was published, in any epoch

	receipts map[engine.Key]engine.Receipt
	keys     []engine.Key // of the receipts, in the order of their messages
	lost     time.Time    // the time of the newest message whose receipt was forgotten within bounds.Age, or zero

	batches map[engine.NodeID]numberedBatch

	users   map[engine.NodeID]map[string]int // how many clients each user has, on each node
	version uint64                           // how many announcements there were in this epoch
}

// A numberedBatch is the last batch of one session that had a number.
type numberedBatch struct {
	number   uint64
	messages []engine.Message
	receipts []engine.Receipt
}

// repeat returns the receipts of b if batch is the same one. It returns nothing if batch is a later one.
func (b numberedBatch) repeat(batch engine.Batch) ([]engine.Receipt, error) {
	switch {
	case batch.Number > b.number:
		return nil, nil
	case batch.Number < b.number:
		return nil, fmt.Errorf("%w: batch %d comes after batch %d", engine.ErrOldBatch, batch.Number, b.number)
	case !slices.EqualFunc(batch.Messages, b.messages, sameMessage):
		return nil, fmt.Errorf("%w: batch %d is repeated with other messages: give each batch of a session its own number",
			engine.ErrUnavailable, batch.Number)
	}
	return slices.Clone(b.receipts), nil
}

func sameMessage(a, b engine.Message) bool { return a.Key == b.Key && bytes.Equal(a.Data, b.Data) }

// newHub returns a hub without messages. It knows of no message before lost, if that is not zero.
func newHub(lost time.Time) *hub {
	return &hub{
		epoch:    engine.NewEpoch(),
		receipts: map[engine.Key]engine.Receipt{},
		lost:     lost,
		batches:  map[engine.NodeID]numberedBatch{},
		users:    map[engine.NodeID]map[string]int{},
	}
}

func (h *hub) position() engine.Position { return engine.Position{Epoch: h.epoch, Seq: h.seq} }

// publish gives the messages of a batch their numbers, as far as they are not to be published again. It returns their
// receipts, one for each message, and what was published.
func (h *hub) publish(batch engine.Batch, now time.Time) (receipts []engine.Receipt, published []engine.Entry) {
	receipts = make([]engine.Receipt, 0, len(batch.Messages))
	for _, m := range batch.Messages {
		receipt, known := h.find(m, now)
		if !known {
			entry := engine.Entry{At: now.Truncate(time.Millisecond), Data: slices.Clone(m.Data)}
			receipt = h.append(m.Key, entry)
			published = append(published, entry)
		}
		receipts = append(receipts, receipt)
	}
	if len(published) > 0 {
		h.modified = now
	}
	return receipts, published
}

// find returns the receipt of a message that is not to be published.
func (h *hub) find(m engine.Message, now time.Time) (receipt engine.Receipt, known bool) {
	if receipt, ok := h.receipts[m.Key]; ok {
		receipt.Repeated = true
		return receipt, true
	}
	switch m.Attempt {
	case engine.Again:
		complete := m.Key != engine.Key{} && !h.isKept(h.lost, now)
		return engine.Receipt{Unknown: true}, !complete
	case engine.Lookup:
		return engine.Receipt{Unknown: true}, true
	default:
		return engine.Receipt{}, false
	}
}

// append gives an entry the next number, and remembers its receipt if it has a key.
func (h *hub) append(key engine.Key, entry engine.Entry) engine.Receipt {
	h.seq++
	h.entries = append(h.entries, entry)
	receipt := engine.Receipt{Position: h.position(), At: entry.At}
	if key != (engine.Key{}) {
		h.receipts[key] = receipt
		h.keys = append(h.keys, key)
	}
	return receipt
}

// isKept reports whether a message of that time is younger than bounds.Age.
func (h *hub) isKept(at, now time.Time) bool { return now.Sub(at) < h.bounds.Age }

// trim forgets what is outside the bounds.
func (h *hub) trim(now time.Time) {
	h.entries = h.entries[len(h.entries)-h.countKept(now):]
	for len(h.keys) > 0 {
		oldest := h.receipts[h.keys[0]].At
		if h.isKept(oldest, now) {
			if len(h.keys) <= h.bounds.Receipts {
				return
			}
			h.lost = oldest
		}
		delete(h.receipts, h.keys[0])
		h.keys = h.keys[1:]
	}
}

// countKept returns how many of the newest entries are within the bounds.
func (h *hub) countKept(now time.Time) int {
	count, bytes := 0, 0
	for _, entry := range slices.Backward(h.entries) {
		bytes += len(entry.Data)
		tooLarge := bytes > h.bounds.Bytes && count > 0 // the newest entry alone is never too large
		if count == h.bounds.Messages || tooLarge || !h.isKept(entry.At, now) {
			break
		}
		count++
	}
	return count
}

// forgetReceipts forgets all receipts, and remembers that it has.
func (h *hub) forgetReceipts() {
	for _, receipt := range h.receipts {
		if receipt.At.After(h.lost) {
			h.lost = receipt.At
		}
	}
	clear(h.receipts)
	h.keys = nil
}

// begin begins a new epoch, in which the newest message has the given number. Older entries stay.
func (h *hub) begin(seq uint64) {
	base := h.seq - uint64(len(h.entries))
	h.entries = h.entries[:max(seq, base)-base]
	h.before = engine.Position{}
	if seq > 0 {
		h.before = engine.Position{Epoch: h.epoch, Seq: seq}
	}
	h.epoch, h.seq, h.version = engine.NewEpoch(), seq, 0
}

// forget forgets all entries and begins a new epoch. It keeps receipts and users.
func (h *hub) forget() {
	h.entries = nil
	h.begin(0)
}

// snapshot returns the entries after a position, or all if the position is not followed by one of them.
func (h *hub) snapshot(after engine.Position) engine.Snapshot {
	base := h.seq - uint64(len(h.entries))
	if after.Epoch == h.epoch && after.Seq >= base && after.Seq <= h.seq {
		base = after.Seq
	}
	entries := h.entries[uint64(len(h.entries))-(h.seq-base):]
	return engine.Snapshot{
		Position: h.position(),
		Base:     base,
		Entries:  slices.Clone(entries),
		Before:   h.before,
		Users:    h.usersByNode(),
		Version:  h.version,
	}
}

// usersByNode returns the users on all nodes, in the order of their names.
func (h *hub) usersByNode() map[engine.NodeID][]engine.UserCount {
	users := map[engine.NodeID][]engine.UserCount{}
	for node := range h.users {
		users[node] = h.usersOf(node)
	}
	return users
}

func (h *hub) usersOf(node engine.NodeID) []engine.UserCount {
	users := make([]engine.UserCount, 0, len(h.users[node]))
	for user, clients := range h.users[node] {
		users = append(users, engine.UserCount{User: user, Clients: clients})
	}
	slices.SortFunc(users, func(a, b engine.UserCount) int { return cmp.Compare(a.User, b.User) })
	return users
}

// announce notes how many clients users have on a node.
func (h *hub) announce(node engine.NodeID, users []engine.UserCount) {
	counts := h.users[node]
	if counts == nil {
		counts = map[string]int{}
		h.users[node] = counts
	}
	for _, u := range users {
		if u.Clients == 0 {
			delete(counts, u.User)
			continue
		}
		counts[u.User] = u.Clients
	}
	if len(counts) == 0 {
		delete(h.users, node)
	}
	h.version++
}
