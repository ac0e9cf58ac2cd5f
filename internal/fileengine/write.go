package fileengine

import (
	"fmt"
	"slices"
	"time"

	"github.com/chat-broadcast/caddy-chat-broadcast/engine"
)

// A hub is what the committer remembers of a hub besides the file.
type hub struct {
	name     string
	epoch    string                     // that the hub gets when the file does not have it
	receipts map[engine.Key]keptReceipt // those in the file, or nil before they have been read
	number   uint64                     // of the last batch that has a number
	last     []engine.Receipt           // of that batch
	staged   *write                     // the last batch of the transaction that has a number
	damaged  error                      // why the committer leaves the hub's part of the file alone
	used     time.Time
}

// A keptReceipt is a storedReceipt, without its key, and its index in the file.
type keptReceipt struct {
	index, seq, at uint64
	epoch          string
}

// hub returns what the committer remembers of a hub.
func (s *Session) hub(name string) *hub {
	h := s.hubs[name]
	if h == nil {
		h = &hub{name: name, epoch: engine.NewEpoch()}
		s.hubs[name] = h
	}
	h.used = s.now()
	return h
}

// A write is a batch on its way into the file, or a call of Forget.
type write struct {
	name  string
	batch *engine.Batch // nil for Forget
	done  chan error    // has room for one

	// Owned by the committer until it answers without an error.
	hub      *hub
	twin     *write // that has the same batch and stands before this one in the transaction
	changed  bool   // whether the file has to change
	epoch    string // of the entries
	entries  []engine.Entry
	first    uint64 // number of the first entry
	receipts []engine.Receipt
}

// size returns the number of bytes to be written, besides what each write costs.
func (w *write) size() int {
	if w.batch == nil {
		return 0
	}
	size := 0
	for i := range w.batch.Messages {
		size += len(w.batch.Messages[i].Data)
	}
	return size
}

// answer ends the call of the writer. Only the first answer counts: if it was errInDoubt, the end of the doubt comes
// too late.
func (w *write) answer(err error) {
	select {
	case w.done <- err:
	default:
	}
}

// admit returns whether the write needs no transaction, and its error.
func (w *write) admit() (answered bool, err error) {
	h := w.hub
	if w.batch != nil && w.batch.Number != 0 {
		newest := h.number
		if h.staged != nil {
			newest = h.staged.batch.Number
		}
		switch n := w.batch.Number; {
		case n < newest:
			return true, fmt.Errorf("%w: batch %d of hub %q comes after batch %d", engine.ErrOldBatch, n, h.name, newest)
		case n == newest && h.staged != nil:
			w.twin = h.staged
			return false, nil
		case n == newest:
			w.receipts = slices.Clone(h.last)
			return true, nil
		}
	}
	if h.damaged != nil {
		return true, h.damaged
	}
	if w.batch != nil && w.batch.Number != 0 {
		h.staged = w
	}
	return false, nil
}

// apply does the write in a transaction.
func (w *write) apply(t *tables) error {
	if w.twin != nil {
		return nil
	}
	r, err := t.record(w.name)
	if err != nil {
		return err
	}
	if w.batch == nil {
		return w.forget(t, r)
	}
	if r == nil {
		r = &hubRecord{epoch: w.hub.epoch}
	}
	return w.publish(t, r)
}

// commit remembers that the file has the write.
func (w *write) commit() {
	h := w.hub
	h.staged = nil
	if w.twin != nil {
		w.receipts = slices.Clone(h.last) // the twin has just set it
		return
	}
	if w.batch == nil || w.changed && w.epoch == h.epoch {
		// When the file has forgotten the hub, the hub must begin another epoch.
		h.epoch = engine.NewEpoch()
	}
	if w.batch != nil && w.batch.Number != 0 {
		h.number, h.last = w.batch.Number, slices.Clone(w.receipts)
	}
}

// rollback forgets what the transaction had changed.
func (w *write) rollback() {
	w.hub.staged, w.hub.receipts = nil, nil
	w.twin, w.changed, w.entries, w.receipts = nil, false, nil, nil
}

// forget makes the hub forget its entries and begin a new epoch.
func (w *write) forget(t *tables, r *hubRecord) error {
	if r == nil {
		return nil
	}
	if err := t.trimEntries(r, nothing(), int(r.entries.count())); err != nil {
		return err
	}
	r.epoch, r.entries, r.bytes = engine.NewEpoch(), span{}, 0
	w.changed = true
	return t.put(w.name, r)
}

// publish publishes the messages of the batch.
func (w *write) publish(t *tables, r *hubRecord) error {
	w.epoch, w.first = r.epoch, r.entries.head+1
	for i := range w.batch.Messages {
		receipt, err := w.publishMessage(t, r, &w.batch.Messages[i])
		if err != nil {
			return err
		}
		w.receipts = append(w.receipts, receipt)
	}
	if len(w.entries) == 0 {
		return nil
	}
	w.changed = true
	bounds := &w.batch.Bounds
	if err := t.trimEntries(r, entryLimits(bounds, t.now), int(r.entries.count())); err != nil {
		return err
	}
	if err := t.trimReceipts(r, receiptLimits(bounds, t.now), int(r.receipts.count()), w.hub.dropped); err != nil {
		return err
	}
	r.active, r.age = t.now, ageOf(bounds.Age)
	if r.due == 0 || r.due > r.expires() {
		if err := t.schedule(w.name, r, r.expires()); err != nil {
			return err
		}
	}
	return t.put(w.name, r)
}

// publishMessage publishes a message, unless it was or may have been published before.
func (w *write) publishMessage(t *tables, r *hubRecord, m *engine.Message) (engine.Receipt, error) {
	keyed := m.Key != engine.Key{}
	if keyed {
		if err := w.hub.readReceipts(t, r); err != nil {
			return engine.Receipt{}, err
		}
	}
	since := receiptLimits(&w.batch.Bounds, t.now).keep.since
	if kept, found := w.hub.receipts[m.Key]; keyed && found && kept.at >= since {
		return engine.Receipt{Position: engine.Position{Epoch: kept.epoch, Seq: kept.seq}, At: timeOf(kept.at), Repeated: true}, nil
	}
	if m.Attempt == engine.Lookup || m.Attempt == engine.Again && (!keyed || r.lost != 0 && r.lost >= since) {
		return engine.Receipt{Unknown: true}, nil
	}
	e := storedEntry{at: t.now, data: m.Data}
	if err := t.appendEntry(r, &e); err != nil {
		return engine.Receipt{}, err
	}
	w.entries = append(w.entries, engine.Entry{At: timeOf(e.at), Data: e.data})
	if keyed {
		receipt := storedReceipt{at: e.at, key: m.Key, seq: r.entries.head, epoch: r.epoch}
		if err := t.appendReceipt(r, &receipt); err != nil {
			return engine.Receipt{}, err
		}
		w.hub.keep(r.receipts.head, &receipt)
	}
	return engine.Receipt{Position: engine.Position{Epoch: r.epoch, Seq: r.entries.head}, At: timeOf(e.at)}, nil
}

// readReceipts reads the receipts of the hub, if the committer does not remember them.
func (h *hub) readReceipts(t *tables, r *hubRecord) error {
	if h.receipts != nil {
		return nil
	}
	h.receipts = map[engine.Key]keptReceipt{}
	return t.eachReceipt(r, func(index uint64, receipt storedReceipt) {
		if receipt.epoch == r.epoch {
			receipt.epoch = r.epoch // one string for all
		}
		h.keep(index, &receipt)
	})
}

// keep remembers a receipt that the file has.
func (h *hub) keep(index uint64, receipt *storedReceipt) {
	h.receipts[receipt.key] = keptReceipt{index: index, seq: receipt.seq, at: receipt.at, epoch: receipt.epoch}
}

// dropped forgets a receipt that the file no longer has. The key may have a newer one.
func (h *hub) dropped(index uint64, receipt storedReceipt) {
	if h.receipts[receipt.key].index == index {
		delete(h.receipts, receipt.key)
	}
}
