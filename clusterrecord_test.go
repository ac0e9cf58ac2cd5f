package chatbroadcast

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
)

// A record has what all clients of a cluster have seen, and notes what contradicts the protocol.
type record struct {
	mu             sync.Mutex
	hubs           map[string]*hubRecord
	contradictions []string
	outcomes       map[string]int // how connections and requests have ended, and refused messages
}

// maxContradictions is how many of them a test shows. One fault makes thousands.
const maxContradictions = 20

// A hubRecord has what clients have seen of one hub. Every payload is sent once, so it identifies its message.
type hubRecord struct {
	epochs   map[string]*epochRecord
	order    []string // the epochs, as they came
	answered map[string]publishedAs
	refused  map[string]bool // messages that the server has said are not published, by payload
	raw      [][]string      // what each connection of a raw client has got
}

// An epochRecord has the messages of one epoch.
type epochRecord struct {
	payloads map[int]string
	seqs     map[string]int
}

// publishedAs is an answer to a sender.
type publishedAs struct {
	seq   int
	epoch string // that of the sender's connection, or "" for a POST
	late  bool   // the message was sent for the first time after the fault was over
}

func newRecord() *record {
	return &record{hubs: map[string]*hubRecord{}, outcomes: map[string]int{}}
}

// hubLocked returns the record of a hub.
func (r *record) hubLocked(hub string) *hubRecord {
	h := r.hubs[hub]
	if h == nil {
		h = &hubRecord{epochs: map[string]*epochRecord{}, answered: map[string]publishedAs{}, refused: map[string]bool{}}
		r.hubs[hub] = h
	}
	return h
}

// epochLocked returns the record of an epoch.
func (h *hubRecord) epochLocked(epoch string) *epochRecord {
	e := h.epochs[epoch]
	if e == nil {
		e = &epochRecord{payloads: map[int]string{}, seqs: map[string]int{}}
		h.epochs[epoch] = e
		h.order = append(h.order, epoch)
	}
	return e
}

func (r *record) contradict(format string, args ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.contradictLocked(format, args...)
}

func (r *record) contradictLocked(format string, args ...any) {
	r.contradictions = append(r.contradictions, fmt.Sprintf(format, args...))
}

// ended counts how a connection or a request has ended.
func (r *record) ended(how string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.outcomes[how]++
}

// begun notes that a client has learned of an epoch.
func (r *record) begun(hub, epoch string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.hubLocked(hub).epochLocked(epoch)
}

// saw notes that a client has got a message. An epoch and a number are one message, for all clients and for ever, and an epoch
// has no message twice.
func (r *record) saw(client, hub, epoch string, seq int, payload string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	e := r.hubLocked(hub).epochLocked(epoch)
	if other, known := e.payloads[seq]; known && other != payload {
		r.contradictLocked("%s: message %d of epoch %s in %s is %.40q, and was %.40q", client, seq, epoch, hub, payload, other)
		return
	}
	if other, known := e.seqs[payload]; known && other != seq {
		r.contradictLocked("%s: %.40q is message %d of epoch %s in %s, and was message %d", client, payload, seq, epoch, hub, other)
		return
	}
	e.payloads[seq], e.seqs[payload] = payload, seq
}

// answer notes that a message was answered as published.
func (r *record) answer(hub, payload string, as publishedAs) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.hubLocked(hub).answered[payload] = as
}

// refuse notes that a message was answered as not published.
func (r *record) refuse(hub, payload string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.hubLocked(hub).refused[payload] = true
	r.outcomes["refused"]++
}

// rawEnded notes what a connection of a raw client has got, in this order.
func (r *record) rawEnded(hub string, payloads []string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	h := r.hubLocked(hub)
	h.raw = append(h.raw, payloads)
}

// check compares what all clients have seen, at the end. final has, for each hub that keeps everything, its epoch and all of its
// messages by number. With lossless every answered message must be among them.
func (r *record) check(final map[string]finalLog, lossless bool) []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	for name, h := range r.hubs {
		r.checkRefusedLocked(name, h)
		r.checkRawLocked(name, h)
		if log, ok := final[name]; ok {
			r.checkAnsweredLocked(name, h, log, lossless)
		}
	}
	return r.contradictions
}

// A finalLog is a hub at the end.
type finalLog struct {
	epoch    string
	payloads map[int]string
}

// checkRefusedLocked requires that no message exists of which the server has said that it is not published.
func (r *record) checkRefusedLocked(name string, h *hubRecord) {
	for payload := range h.refused {
		for epoch, e := range h.epochs {
			if seq, published := e.seqs[payload]; published {
				r.contradictLocked("%.40q in %s was refused, and is message %d of epoch %s", payload, name, seq, epoch)
			}
		}
	}
}

// checkAnsweredLocked requires that answered messages are in the hub, under the numbers of the answers. Where a fault may lose
// messages, these are the ones that were sent after it, in the last epoch.
func (r *record) checkAnsweredLocked(name string, h *hubRecord, log finalLog, lossless bool) {
	for payload, as := range h.answered {
		if !lossless && (!as.late || as.epoch != log.epoch) {
			continue
		}
		if got := log.payloads[as.seq]; got != payload {
			r.contradictLocked("%.40q in %s was answered as message %d of epoch %q, and that is %.40q of epoch %s at the end",
				payload, name, as.seq, as.epoch, got, log.epoch)
		}
	}
}

// checkRawLocked requires that each connection of a raw client has got consecutive messages of one epoch.
func (r *record) checkRawLocked(name string, h *hubRecord) {
	for _, payloads := range h.raw {
		if len(payloads) == 0 || slices.ContainsFunc(slices.Collect(maps.Values(h.epochs)), func(e *epochRecord) bool { return e.has(payloads) }) {
			continue
		}
		r.contradictLocked("a raw client in %s got %d messages that are consecutive in no epoch: %s", name, len(payloads), h.explainLocked(payloads))
	}
}

// has reports whether payloads are consecutive messages. The last ones may be unknown: perhaps this client alone got them.
func (e *epochRecord) has(payloads []string) bool {
	first, known := e.seqs[payloads[0]]
	if !known {
		return false
	}
	for i, payload := range payloads {
		seq, known := e.seqs[payload]
		if !known {
			return !slices.ContainsFunc(payloads[i:], func(p string) bool { return e.seqs[p] != 0 })
		}
		if seq != first+i {
			return false
		}
	}
	return true
}

// explainLocked says where payloads stop being consecutive, in each epoch.
func (h *hubRecord) explainLocked(payloads []string) string {
	var b strings.Builder
	for _, epoch := range h.order {
		e := h.epochs[epoch]
		last := 0
		for i, payload := range payloads {
			seq := e.seqs[payload]
			if i > 0 && seq != last+1 {
				fmt.Fprintf(&b, "epoch %s: [%d] is %d after %d (of %d to %d); ", epoch, i, seq, last, e.seqs[payloads[0]], e.seqs[payloads[len(payloads)-1]])
				break
			}
			last = seq
		}
	}
	return b.String()
}

// epochCounts returns the smallest and the largest number of epochs of a hub.
func (r *record) epochCounts() (fewest, most int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	fewest = -1
	for _, h := range r.hubs {
		n := len(h.epochs)
		most = max(most, n)
		if fewest < 0 || n < fewest {
			fewest = n
		}
	}
	return fewest, most
}

// counts returns how many messages were answered and how many were refused.
func (r *record) counts() (answered, refused int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, h := range r.hubs {
		answered += len(h.answered)
		refused += len(h.refused)
	}
	return answered, refused
}
