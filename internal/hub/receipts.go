package hub

import (
	"time"

	"github.com/chat-broadcast/caddy-chat-broadcast/internal/fair"
)

// receipts remember the messages of a hub that were sent with an id, so that the hub does not publish a message twice
// if its sender repeats it. Each receipt lasts for the age of the history. When there are too many, the address with
// the most receipts loses its oldest one. Receipts note which ones they have forgotten early, because a sender must
// then learn that the hub cannot know. The hub's lock guards them. The zero value is empty.
type receipts struct {
	known  map[Key]*fair.Item[keptReceipt]
	queue  fair.Queue[keptReceipt]
	tokens map[tokenKey]*tokenReceipts
	bytes  int
	lost   time.Time // when the newest message was published whose receipt was forgotten early
}

// A Key identifies a message by the id that its sender gave it, and by the sender's user and token.
type Key struct{ User, Token, ID string }

// A tokenKey is the part of a Key that all messages with one token share.
type tokenKey struct{ user, token string }

func (k Key) tokenKey() tokenKey { return tokenKey{k.User, k.Token} }

// A Receipt says with which number and when a message was published.
type Receipt struct {
	Seq      uint64    // counted from 1
	At       time.Time // zero if no client can see it: without history, id and clients of the events protocol
	Members  int       // how many members the hub had at that time
	Repeated bool      // the message had been published before
	Unknown  bool      // the message may have been published before, and was not published now
	Epoch    string    // of Seq, if it is not the hub's

	waited time.Duration // how long publish waited for turns
}

// A keptReceipt is a remembered receipt and its key.
type keptReceipt struct {
	key Key
	Receipt
}

// tokenReceipts describe the receipts of one tokenKey: how many there are, and when the newest message was published
// whose receipt was forgotten early.
type tokenReceipts struct {
	count int
	lost  time.Time
}

// maxReceipts is how many receipts a hub remembers: some minutes of a busy chat, in about a megabyte.
const maxReceipts = 4096

// receiptSize, tokenSize and ownerSize are about how many bytes a receipt, a tokenReceipts and an address in the queue
// take, besides the strings of keys.
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

// find returns the receipt with the given key, if there is one.
func (r *receipts) find(key Key) (Receipt, bool) {
	item, ok := r.known[key]
	if !ok {
		return Receipt{}, false
	}
	return item.Value.Receipt, true
}

// complete reports whether there certainly are receipts of all messages that were published with key's user and token
// within the last age.
func (r *receipts) complete(key Key, now time.Time, age time.Duration) bool {
	lost := r.lost
	if t := r.tokens[key.tokenKey()]; t != nil {
		lost = t.lost
	}
	return lost.IsZero() || now.Sub(lost) >= age
}

// add remembers the receipt of m, which has a key. members is how many the hub has.
func (r *receipts) add(m *Message, members int) {
	if r.known == nil {
		r.known = map[Key]*fair.Item[keptReceipt]{}
		r.tokens = map[tokenKey]*tokenReceipts{}
	}
	t := r.tokens[m.Key.tokenKey()]
	if t == nil {
		t = &tokenReceipts{lost: r.lost}
		if m.Again || !m.Joined.IsZero() && m.Joined.After(r.lost) {
			t.lost = time.Time{} // r was complete, or the token is newer than all lost receipts
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

// forget forgets one receipt. early says that its age is not over.
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

// forgetEarly forgets all receipts before their age is over.
func (r *receipts) forgetEarly() {
	for _, item := range r.known {
		r.lost = latest(r.lost, item.Value.At)
	}
	*r = receipts{lost: r.lost}
}

// forgetUntil forgets the receipts of messages that were published at or before end. It returns when the oldest message
// of the other receipts was published, and whether there are others.
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

// receiptLocked fills in the receipt of m, which has a key, and returns true if the hub must not publish m: because it has
// published m before, or because the sender has sent m before and the hub cannot know whether it was published.
func (b *Hub) receiptLocked(m *Message, r *Receipt) bool {
	h := &b.history
	if before, found := h.receipts.find(m.Key); found {
		r.Seq, r.At, r.Members, r.Repeated = before.Seq, before.At, before.Members, true
		return true
	}
	r.Unknown = m.Again && (h.messages == 0 || !b.issued(m.Key.Token) || !h.receipts.complete(m.Key, time.Now(), h.age))
	return r.Unknown
}
