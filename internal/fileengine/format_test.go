package fileengine

import (
	"encoding/hex"
	"errors"
	"reflect"
	"testing"

	"github.com/chat-broadcast/caddy-chat-broadcast/engine"
)

// TestFormat_Values has values of format 1 as its files have them. If it fails, files that exist cannot be read any more.
func TestFormat_Values(t *testing.T) {
	record := &hubRecord{
		id: 1, entries: span{2, 3}, bytes: 4, receipts: span{5, 6}, lost: 7, active: 8, age: 9, due: 10, epoch: "3w5e11264sgsf",
	}
	entry := storedEntry{at: 1_700_000_000_000, data: []byte("hello")}
	receipt := storedReceipt{at: 1_700_000_000_000, key: engine.Key{1, 2, 15: 3}, seq: 4, epoch: "3w5e11264sgsf"}
	key := pairKey(1, 2)
	tests := []struct {
		name   string
		value  []byte
		want   string
		decode func(value []byte) (any, error)
		is     any
	}{
		{
			"record", record.encode("hub"),
			"0000000000000001000000000000000200000000000000030000000000000004000000000000000500000000000000060000000000000007" +
				"00000000000000080000000000000009000000000000000a33773565313132363473677366",
			func(v []byte) (any, error) { return decodeRecord("hub", v) }, record,
		},
		{
			"entry", (&storedEntry{at: entry.at, data: entry.data}).encode(key),
			"0000018bcfe5680068656c6c6f",
			func(v []byte) (any, error) { return decodeEntry(key, v) }, entry,
		},
		{
			"receipt", receipt.encode(key),
			"0000018bcfe5680001020000000000000000000000000003000000000000000433773565313132363473677366",
			func(v []byte) (any, error) { return decodeReceipt(key, v) }, receipt,
		},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			if got := hex.EncodeToString(test.value[:len(test.value)-4]); got != test.want {
				t.Errorf("got value %s, want %s", got, test.want)
			}
			decoded, err := test.decode(test.value)
			if err != nil || !reflect.DeepEqual(decoded, test.is) {
				t.Errorf("got %+v, %v; want %+v", decoded, err, test.is)
			}
			for i := range test.value {
				test.value[i] ^= 0x10
				if _, err := test.decode(test.value); !errors.Is(err, errDamaged) {
					t.Errorf("got error %v when byte %d is another one, want %v", err, i, errDamaged)
				}
				test.value[i] ^= 0x10
			}
			if _, err := test.decode(nil); !errors.Is(err, errDamaged) {
				t.Errorf("got error %v without a value, want %v", err, errDamaged)
			}
			for size := range len(test.value) - 4 - len(record.epoch) {
				k := key
				if test.name == "record" {
					k = []byte("hub")
				}
				short := seal(k, append([]byte(nil), test.value[:size]...))
				if _, err := test.decode(short); err == nil && size < 8 {
					t.Errorf("a value of %d bytes was decoded", size)
				}
			}
		})
	}
	if got, want := hex.EncodeToString(seal([]byte("hub"), []byte("value"))), "76616c7565"+"3ba91770"; got != want {
		t.Errorf("got value %s with its checksum, want %s", got, want)
	}
	if got, want := hex.EncodeToString(key), "00000000000000010000000000000002"; got != want {
		t.Errorf("got key %s, want %s", got, want)
	}
}
