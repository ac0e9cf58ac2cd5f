package hub

import (
	"time"

	"github.com/chat-broadcast/caddy-chat-broadcast/internal/fair"
)

// receipts remember the messages of a hub that were sent with an id, each for the age of the history, so that a message
// that is sent again is not published again. When they are full, the address with the most receipts loses its oldest. What
// they forget before its age is over they note, because a sender must learn then that the hub cannot know. They need the
// hub's lock. The zero value is empty.
type receipts struct {
	known  map[Key]*fair.Item[keptReceipt]
	queue  fair.Queue[keptReceipt]
	tokens map[tokenKey]*tokenReceipts
	bytes  int
	lost   time.Time // when the newest was published of those that were forgotten early
}

// A Key tells a message from all others that were sent: the id that its sender gave it, and whose that is.
type Key struct{ User, Token, ID string }

// A tokenKey is the part of a Key that the messages of one connection have in common.
type tokenKey struct{ user, token string }

func (k Key) tokenKey() tokenKey { return tokenKey{k.User, k.Token} }

// A Receipt tells the sender of a message under which number and when it was published.
type Receipt struct {
	Seq      uint64    // counted from 1
	At       time.Time // zero if nobody sees it: in a hub without history and without clients of the events protocol
	Members  int       // of the hub at that time
	Repeated bool      // it had been published before
	Unknown  bool      // it may have been published before: it was not published now

	waited time.Duration // how long publish has waited for turns
}

// A keptReceipt is a receipt that is remembered.
type keptReceipt struct {
	key Key
	Receipt
}

// tokenReceipts say about the receipts of one tokenKey how many there are, and when the newest was published of those
// that were forgotten early.
type tokenReceipts struct {
	count int
	lost  time.Time
}

// maxReceipts is for how many messages a hub remembers their keys: some minutes of a busy chat, in about a megabyte.
const maxReceipts = 4096

// receiptSize, tokenSize and ownerSize are about what a receipt, a tokenReceipts and an address in the queue take, besides
// the strings of keys.
const (
	receiptSize = 288
	tokenSize   = 128
	ownerSize   = 192
)

// size returns about how many bytes the receipts take.
func (r *receipts) size() int {
	return r.bytes + len(r.tokens)*tokenSize + r.queue.OwnerCount()*ownerSize
}

func (k Key) size() int { return receiptSize + len(k.User) + len(k.Token) + len(k.ID) }

// find returns the receipt of a message that was sent before.
func (r *receipts) find(key Key) (Receipt, bool) {
	item, ok := r.known[key]
	if !ok {
		return Receipt{}, false
	}
	return item.Value.Receipt, true
}

// complete reports whether there are receipts of all messages that were published with key's user and token within the
// last age.
func (r *receipts) complete(key Key, now time.Time, age time.Duration) bool {
	lost := r.lost
	if t := r.tokens[key.tokenKey()]; t != nil {
		lost = t.lost
	}
	return lost.IsZero() || now.Sub(lost) >= age
}

// add remembers a message of m's sender.
func (r *receipts) add(m *Message, members int) {
	if r.known == nil {
		r.known = map[Key]*fair.Item[keptReceipt]{}
		r.tokens = map[tokenKey]*tokenReceipts{}
	}
	t := r.tokens[m.Key.tokenKey()]
	if t == nil {
		t = &tokenReceipts{lost: r.lost}
		if m.Again || !m.Joined.IsZero() && m.Joined.After(r.lost) {
			t.lost = time.Time{} // r was complete, or nothing that was lost can be of this token
		}
		r.tokens[m.Key.tokenKey()] = t
	}
	t.count++
	r.known[m.Key] = r.queue.Push(m.Address, keptReceipt{m.Key, Receipt{Seq: m.Seq, At: m.At, Members: members}})
	r.bytes += m.Key.size()
	if r.queue.Len() > maxReceipts {
		_, oldest := r.queue.Largest()
		r.forget(oldest, true)
	}
}

// forget forgets one receipt, because its age is over or early.
func (r *receipts) forget(item *fair.Item[keptReceipt], early bool) {
	key, at := item.Value.key, item.Value.At
	r.queue.Remove(item)
	delete(r.known, key)
	r.bytes -= key.size()
	t := r.tokens[key.tokenKey()]
	t.count--
	if t.count == 0 {
		delete(r.tokens, key.tokenKey())
	}
	if early {
		t.lost = latest(t.lost, at)
		r.lost = latest(r.lost, at)
	}
}

// forgetEarly forgets all receipts, before their age is over.
func (r *receipts) forgetEarly() {
	for _, item := range r.known {
		r.lost = latest(r.lost, item.Value.At)
	}
	*r = receipts{lost: r.lost}
}

// forgetUntil forgets the receipts of messages that were published at or before the given time. It returns when the oldest
// of the others was, if there are any.
func (r *receipts) forgetUntil(end time.Time) (oldest time.Time, some bool) {
	for owner := range r.queue.Owners() {
		item := r.queue.Oldest(owner)
		for item != nil && !item.Value.At.After(end) {
			r.forget(item, false)
			item = r.queue.Oldest(owner)
		}
		if item != nil && (!some || item.Value.At.Before(oldest)) {
			oldest, some = item.Value.At, true
		}
	}
	return oldest, some
}

func latest(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// receiptLocked fills in the receipt of m and returns true if m, which has a key, is not to be published: it was published
// before, or its sender has sent it before and the hub cannot know.
func (b *Hub) receiptLocked(m *Message, r *Receipt) bool {
	h := &b.history
	if before, found := h.receipts.find(m.Key); found {
		r.Seq, r.At, r.Members, r.Repeated = before.Seq, before.At, before.Members, true
		return true
	}
	r.Unknown = m.Again && (h.messages == 0 || !b.issued(m.Key.Token) || !h.receipts.complete(m.Key, time.Now(), h.age))
	return r.Unknown
}
