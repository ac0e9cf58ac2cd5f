package fileengine

import (
	"math"
	"slices"
	"time"

	"github.com/chat-broadcast/caddy-chat-broadcast/engine"
	"go.etcd.io/bbolt"
)

// fillPercent is how full bbolt makes a page that it splits. Items are appended to those of their hub and removed at the
// other end, so that a page gets few items later.
const fillPercent = 0.9

// tables are the buckets of the file in one transaction.
type tables struct {
	hubs, entries, receipts, expiry *bbolt.Bucket
	now                             uint64
}

func tablesOf(tx *bbolt.Tx, now time.Time) *tables {
	t := &tables{
		hubs:     tx.Bucket([]byte(hubsBucket)),
		entries:  tx.Bucket([]byte(entriesBucket)),
		receipts: tx.Bucket([]byte(receiptsBucket)),
		expiry:   tx.Bucket([]byte(expiryBucket)),
		now:      milliseconds(now),
	}
	t.entries.FillPercent, t.receipts.FillPercent = fillPercent, fillPercent
	return t
}

func milliseconds(t time.Time) uint64 { return uint64(max(t.UnixMilli(), 0)) }

func timeOf(ms uint64) time.Time { return time.UnixMilli(int64(ms)) }

// record returns the record of a hub, or nil if the file does not have the hub.
func (t *tables) record(name string) (*hubRecord, error) {
	value := t.hubs.Get([]byte(name))
	if value == nil {
		return nil, nil
	}
	return decodeRecord(name, value)
}

// put writes the record of a hub.
func (t *tables) put(name string, r *hubRecord) error {
	return t.hubs.Put([]byte(name), r.encode(name))
}

// appendEntry gives an entry the next number of the hub, which has an id from its first entry on.
func (t *tables) appendEntry(r *hubRecord, e *storedEntry) (err error) {
	if r.id == 0 {
		if r.id, err = t.hubs.NextSequence(); err != nil {
			return err
		}
	}
	r.entries.head++
	r.bytes += uint64(len(e.data))
	key := pairKey(r.id, r.entries.head)
	return t.entries.Put(key, e.encode(key))
}

// appendReceipt gives a receipt the next index of the hub.
func (t *tables) appendReceipt(r *hubRecord, receipt *storedReceipt) error {
	r.receipts.head++
	key := pairKey(r.id, r.receipts.head)
	return t.receipts.Put(key, receipt.encode(key))
}

// trimEntries removes the oldest entries of a hub until it has no more than l.keep, if it has more than l.allow. It removes
// at most a number of them.
func (t *tables) trimEntries(r *hubRecord, l limits, atMost int) error {
	limit := l.allow
	for ; r.entries.count() > 0 && atMost > 0; atMost-- {
		key := pairKey(r.id, r.entries.base+1)
		e, err := decodeEntry(key, t.entries.Get(key))
		if err != nil {
			return err
		}
		if !limit.exceeded(r.entries.count(), r.bytes, e.at) {
			return nil
		}
		limit = l.keep
		r.entries.base++
		r.bytes -= min(r.bytes, uint64(len(e.data)))
		if err := t.entries.Delete(key); err != nil {
			return err
		}
	}
	return nil
}

// trimReceipts is trimEntries for receipts. It calls dropped for each that it removes.
func (t *tables) trimReceipts(r *hubRecord, l limits, atMost int, dropped func(index uint64, receipt storedReceipt)) error {
	limit := l.allow
	for ; r.receipts.count() > 0 && atMost > 0; atMost-- {
		index := r.receipts.base + 1
		key := pairKey(r.id, index)
		receipt, err := decodeReceipt(key, t.receipts.Get(key))
		if err != nil {
			return err
		}
		if !limit.exceeded(r.receipts.count(), 0, receipt.at) {
			return nil
		}
		limit = l.keep
		r.receipts.base++
		r.lost = max(r.lost, receipt.at)
		dropped(index, receipt)
		if err := t.receipts.Delete(key); err != nil {
			return err
		}
	}
	return nil
}

// eachReceipt calls fn for each receipt of a hub, the oldest first.
func (t *tables) eachReceipt(r *hubRecord, fn func(index uint64, receipt storedReceipt)) error {
	cursor := t.receipts.Cursor()
	for index := r.receipts.base + 1; index <= r.receipts.head; index++ {
		key := pairKey(r.id, index)
		var value []byte
		if index == r.receipts.base+1 {
			_, value = cursor.Seek(key)
		} else {
			_, value = cursor.Next()
		}
		receipt, err := decodeReceipt(key, value)
		if err != nil {
			return err
		}
		fn(index, receipt)
	}
	return nil
}

// newest returns a copy of the newest entries of a hub that exceed no limit, the oldest first.
func (t *tables) newest(r *hubRecord, l limit) ([]engine.Entry, error) {
	var entries []engine.Entry
	var bytes uint64
	cursor := t.entries.Cursor()
	for seq := r.entries.head; seq > r.entries.base; seq-- {
		key := pairKey(r.id, seq)
		var value []byte
		if seq == r.entries.head {
			_, value = cursor.Seek(key)
		} else {
			_, value = cursor.Prev()
		}
		e, err := decodeEntry(key, value)
		if err != nil {
			return nil, err
		}
		bytes += uint64(len(e.data))
		if l.exceeded(uint64(len(entries)+1), bytes, e.at) {
			break
		}
		entries = append(entries, engine.Entry{At: timeOf(e.at), Data: slices.Clone(e.data)})
	}
	slices.Reverse(entries)
	return entries, nil
}

// schedule makes the sweep look at a hub at a time, instead of the time before.
func (t *tables) schedule(name string, r *hubRecord, due uint64) error {
	if r.due != 0 {
		if err := t.expiry.Delete(pairKey(r.due, r.id)); err != nil {
			return err
		}
	}
	r.due = due
	key := pairKey(due, r.id)
	return t.expiry.Put(key, seal(key, []byte(name)))
}

// A limit says what a hub keeps of its entries, or of its receipts.
type limit struct {
	count, bytes uint64
	since        uint64 // the time of the oldest
}

// exceeded returns whether so many items, with so many bytes and the oldest of that time, are too much. The bytes of
// a single one never are.
func (l limit) exceeded(count, bytes, oldest uint64) bool {
	return count > l.count || bytes > l.bytes && count > 1 || oldest < l.since
}

// limits allow a hub a little more than what it keeps. A hub that has more than that is trimmed to what it keeps, so that
// most messages need not change the pages of the oldest items.
type limits struct{ keep, allow limit }

// limitsOf returns limits that keep what bounds say, and allow an eighth more.
func limitsOf(count, bytes int, age time.Duration, now uint64) limits {
	n, size, ms := uint64(max(count, 0)), uint64(max(bytes, 0)), ageOf(age)
	return limits{
		keep:  limit{n, size, now - min(now, ms)},
		allow: limit{n + n/8, size + size/8, now - min(now, ms+ms/8)},
	}
}

func entryLimits(b *engine.Bounds, now uint64) limits {
	return limitsOf(b.Messages, b.Bytes, b.Age, now)
}

func receiptLimits(b *engine.Bounds, now uint64) limits {
	return limitsOf(b.Receipts, 0, b.Age, now)
}

// nothing are the limits of a hub that keeps nothing.
func nothing() limits {
	none := limit{since: math.MaxUint64}
	return limits{none, none}
}

// ageOf returns a Bounds.Age in milliseconds.
func ageOf(age time.Duration) uint64 { return uint64(max(age.Milliseconds(), 0)) }
