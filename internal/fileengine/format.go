package fileengine

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"math"

	"github.com/chat-broadcast/caddy-chat-broadcast/engine"
)

// The file is a bbolt database with these buckets:
//
//	chat_broadcast  "format"     ─▶ number of the format, 4 bytes
//	hubs            name         ─▶ hubRecord
//	entries         id, number   ─▶ storedEntry
//	receipts        id, index    ─▶ storedReceipt
//	expiry          time, id     ─▶ name
//
// The name and the id are those of a hub. The file never uses an id again. A number has 8 bytes, the highest first, so
// that bbolt sorts numbers. A time is a number of milliseconds since 1970. The entries that a hub has are numbered without
// a gap, and so are its receipts. The last 4 bytes of each value, except for the format, are the CRC-32C of its key and of
// the rest of the value, because bbolt has checksums for its meta pages only.
//
// All hubs share these buckets, because a bucket for each hub would take at least a page. A hub stands in expiry at a time
// at which the sweep looks at it, which is not later than the end of its age. Messages extend the age and leave
// expiry as it is, so that only the first message of a hub writes there.
//
// A version that changes this increments formatVersion, and reads the formats before.
const formatVersion = 1

// The names of the buckets, and the keys in metaBucket.
const (
	metaBucket     = "chat_broadcast"
	hubsBucket     = "hubs"
	entriesBucket  = "entries"
	receiptsBucket = "receipts"
	expiryBucket   = "expiry"

	formatKey = "format"
	probeKey  = "probe" // see Session.probe
)

// dataBuckets returns the names of the buckets that a file of formatVersion has besides metaBucket.
func dataBuckets() []string {
	return []string{hubsBucket, entriesBucket, receiptsBucket, expiryBucket}
}

// errDamaged means that the file has something that the engine has not written.
var errDamaged = errors.New("damaged")

// A hubRecord is what the file has of a hub, besides its entries and receipts: the fields in this order, with the epoch
// last.
type hubRecord struct {
	id       uint64
	entries  span   // its head is the number of the hub's newest message
	bytes    uint64 // of the data of these entries
	receipts span
	lost     uint64 // time of the newest message whose receipt the hub has forgotten
	active   uint64 // time of the newest message
	age      uint64 // how long the hub keeps what it has, in milliseconds
	due      uint64 // the time at which the hub stands in expiry
	epoch    string
}

// A span is which numbered items of a hub the file has: those after base, up to head.
type span struct{ base, head uint64 }

func (s *span) count() uint64 { return s.head - s.base }

// expired returns whether everything that the hub has is older than its age.
func (r *hubRecord) expired(now uint64) bool { return r.expires() < now }

// expires returns the last time at which the hub's newest message is not older than its age.
func (r *hubRecord) expires() uint64 { return saturatingAdd(r.active, r.age) }

func saturatingAdd(a, b uint64) uint64 {
	if a > math.MaxUint64-b {
		return math.MaxUint64
	}
	return a + b
}

// numbers returns the fields with a fixed size, in the order of the file.
func (r *hubRecord) numbers() []*uint64 {
	return []*uint64{
		&r.id,
		&r.entries.base, &r.entries.head, &r.bytes,
		&r.receipts.base, &r.receipts.head,
		&r.lost, &r.active, &r.age, &r.due,
	}
}

// encode returns the value of the record.
func (r *hubRecord) encode(name string) []byte {
	var value []byte
	for _, n := range r.numbers() {
		value = binary.BigEndian.AppendUint64(value, *n)
	}
	value = append(value, r.epoch...)
	return seal([]byte(name), value)
}

// decodeRecord returns the record of a value.
func decodeRecord(name string, value []byte) (*hubRecord, error) {
	body, err := unseal([]byte(name), value)
	if err != nil {
		return nil, fmt.Errorf("record of hub %q: %w", name, err)
	}
	r := &hubRecord{}
	for _, n := range r.numbers() {
		if len(body) < 8 {
			return nil, fmt.Errorf("record of hub %q: %w: it is too short", name, errDamaged)
		}
		*n, body = binary.BigEndian.Uint64(body), body[8:]
	}
	r.epoch = string(body)
	return r, nil
}

// A storedEntry is an entry of a hub: its time, and then its data.
type storedEntry struct {
	at   uint64
	data []byte
}

// encode returns the value of the entry. The entry's data is afterwards that of the value, which is a copy.
func (e *storedEntry) encode(key []byte) []byte {
	value := make([]byte, 0, 8+len(e.data)+crc32.Size)
	value = binary.BigEndian.AppendUint64(value, e.at)
	value = append(value, e.data...)
	e.data = value[8:len(value):len(value)]
	return seal(key, value)
}

// decodeEntry returns the entry of a value. Its data is part of the value.
func decodeEntry(key, value []byte) (storedEntry, error) {
	body, err := unsealTimed(key, value)
	if err != nil {
		return storedEntry{}, fmt.Errorf("entry %x: %w", key, err)
	}
	return storedEntry{at: binary.BigEndian.Uint64(body), data: body[8:]}, nil
}

// A storedReceipt is a receipt of a hub: the fields in this order.
type storedReceipt struct {
	at    uint64
	key   engine.Key
	seq   uint64
	epoch string
}

// encode returns the value of the receipt.
func (r *storedReceipt) encode(key []byte) []byte {
	var value []byte
	value = binary.BigEndian.AppendUint64(value, r.at)
	value = append(value, r.key[:]...)
	value = binary.BigEndian.AppendUint64(value, r.seq)
	value = append(value, r.epoch...)
	return seal(key, value)
}

// decodeReceipt returns the receipt of a value.
func decodeReceipt(key, value []byte) (storedReceipt, error) {
	body, err := unsealTimed(key, value)
	if err == nil && len(body) < 8+len(engine.Key{})+8 {
		err = fmt.Errorf("%w: it is too short", errDamaged)
	}
	if err != nil {
		return storedReceipt{}, fmt.Errorf("receipt %x: %w", key, err)
	}
	r := storedReceipt{at: binary.BigEndian.Uint64(body)}
	body = body[8:]
	body = body[copy(r.key[:], body):]
	r.seq, r.epoch = binary.BigEndian.Uint64(body), string(body[8:])
	return r, nil
}

// pairKey returns the key of two numbers: of an item of a hub, or of a time and a hub.
func pairKey(first, second uint64) []byte {
	key := binary.BigEndian.AppendUint64(make([]byte, 0, 16), first)
	return binary.BigEndian.AppendUint64(key, second)
}

// seal appends the checksum to a value.
func seal(key, value []byte) []byte {
	return binary.BigEndian.AppendUint32(value, checksum(key, value))
}

// unseal returns a value without its checksum. The file has no value if it is nil.
func unseal(key, value []byte) ([]byte, error) {
	if value == nil {
		return nil, fmt.Errorf("%w: it is missing", errDamaged)
	}
	size := len(value) - crc32.Size
	if size < 0 || binary.BigEndian.Uint32(value[size:]) != checksum(key, value[:size]) {
		return nil, fmt.Errorf("%w: its checksum is wrong", errDamaged)
	}
	return value[:size], nil
}

// unsealTimed is unseal for a value that begins with a time.
func unsealTimed(key, value []byte) ([]byte, error) {
	body, err := unseal(key, value)
	if err == nil && len(body) < 8 {
		err = fmt.Errorf("%w: it is too short", errDamaged)
	}
	return body, err
}

func checksum(key, value []byte) uint32 {
	table := crc32.MakeTable(crc32.Castagnoli)
	return crc32.Update(crc32.Checksum(key, table), table, value)
}
