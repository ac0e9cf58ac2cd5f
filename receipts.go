package chatbroadcast

import "time"

// receipts remember the messages of a hub that were sent with an id, each for the age of the history, so that a message
// that is sent again is not published again. When they are full, the address with the most receipts loses its oldest. What
// they forget before its age is over they note, because a sender must learn then that the hub cannot know. They need the
// hub's lock. The zero value is empty.
type receipts struct {
	known  map[sendKey]*fairItem[keptReceipt]
	queue  fairQueue[keptReceipt]
	tokens map[tokenKey]*tokenReceipts
	bytes  int
	lost   time.Time // when the newest was published of those that were forgotten early
}

// A sendKey tells a message from all others that were sent: the id that its sender gave it, and whose that is.
type sendKey struct{ user, token, id string }

// A tokenKey is the part of a sendKey that the messages of one connection have in common.
type tokenKey struct{ user, token string }

func (k sendKey) tokenKey() tokenKey { return tokenKey{k.user, k.token} }

// A receipt tells the sender of a message under which number and when it was published.
type receipt struct {
	seq      uint64 // counted from 1
	at       time.Time
	members  int  // of the hub at that time
	repeated bool // it had been published before
	unknown  bool // it may have been published before: it was not published now
}

// A keptReceipt is a receipt that is remembered.
type keptReceipt struct {
	key sendKey
	receipt
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
	return r.bytes + len(r.tokens)*tokenSize + len(r.queue.owners)*ownerSize
}

func (k sendKey) size() int { return receiptSize + len(k.user) + len(k.token) + len(k.id) }

// find returns the receipt of a message that was sent before.
func (r *receipts) find(key sendKey) (receipt, bool) {
	item, ok := r.known[key]
	if !ok {
		return receipt{}, false
	}
	return item.value.receipt, true
}

// complete reports whether there are receipts of all messages that were published with key's user and token within the
// last age.
func (r *receipts) complete(key sendKey, now time.Time, age time.Duration) bool {
	lost := r.lost
	if t := r.tokens[key.tokenKey()]; t != nil {
		lost = t.lost
	}
	return lost.IsZero() || now.Sub(lost) >= age
}

// add remembers a message of m's sender.
func (r *receipts) add(m *message, published receipt) {
	if r.known == nil {
		r.known = map[sendKey]*fairItem[keptReceipt]{}
		r.tokens = map[tokenKey]*tokenReceipts{}
	}
	t := r.tokens[m.key.tokenKey()]
	if t == nil {
		t = &tokenReceipts{lost: r.lost}
		if m.again || m.from != nil && m.from.joined.After(r.lost) {
			t.lost = time.Time{} // r was complete, or nothing that was lost can be of this token
		}
		r.tokens[m.key.tokenKey()] = t
	}
	t.count++
	r.known[m.key] = r.queue.push(m.address(), keptReceipt{m.key, published})
	r.bytes += m.key.size()
	if r.queue.len() > maxReceipts {
		_, oldest := r.queue.largest()
		r.forget(oldest, true)
	}
}

// forget forgets one receipt, because its age is over or early.
func (r *receipts) forget(item *fairItem[keptReceipt], early bool) {
	key, at := item.value.key, item.value.at
	r.queue.remove(item)
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
		r.lost = latest(r.lost, item.value.at)
	}
	*r = receipts{lost: r.lost}
}

// forgetUntil forgets the receipts of messages that were published at or before the given time. It returns when the oldest
// of the others was, if there are any.
func (r *receipts) forgetUntil(end time.Time) (oldest time.Time, some bool) {
	for owner := range r.queue.owners {
		item := r.queue.oldest(owner)
		for item != nil && !item.value.at.After(end) {
			r.forget(item, false)
			item = r.queue.oldest(owner)
		}
		if item != nil && (!some || item.value.at.Before(oldest)) {
			oldest, some = item.value.at, true
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

// receiptLocked returns the receipt of m if m is not to be published: it was published before, or its sender has sent it
// before and the hub cannot know.
func (b *hub) receiptLocked(m *message) (r receipt, found bool) {
	if m.key.id == "" {
		return receipt{}, false
	}
	if r, found = b.receipts.find(m.key); found {
		r.repeated = true
		return r, true
	}
	if m.again && (b.messages == 0 || !b.issued(m.key.token) || !b.receipts.complete(m.key, time.Now(), b.age)) {
		return receipt{unknown: true}, true
	}
	return receipt{}, false
}
