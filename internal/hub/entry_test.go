package hub

import (
	"bytes"
	"encoding/binary"
	"testing"

	"github.com/chat-broadcast/caddy-chat-broadcast/engine"
	"github.com/chat-broadcast/caddy-chat-broadcast/internal/feed"
	"github.com/chat-broadcast/caddy-chat-broadcast/internal/ws"
)

func TestEntry_IsRefusedUnlessItIsAMessage(t *testing.T) {
	for name, data := range map[string][]byte{
		"empty":                  {},
		"unknown kind":           {3, 0, 0},
		"kind 0":                 {0, 0, 0},
		"no sender":              {textEntry},
		"half a sender":          {textEntry, 0x80},
		"no user":                {textEntry, 1},
		"user beyond the end":    {textEntry, 1, 2, 'a'},
		"user beyond everything": append([]byte{textEntry, 1}, binary.AppendUvarint(nil, 1<<63)...),
		"sender too large":       append([]byte{textEntry}, bytes.Repeat([]byte{0xff}, 11)...),
	} {
		if m, err := decodeEntry(data); err == nil {
			t.Errorf("%s: got %+v, want an error", name, m)
		}
	}
}

func TestKey_HashTellsKeysApart(t *testing.T) {
	if h := (Key{"ada", "token", ""}).hash(); h != (engine.Key{}) {
		t.Errorf("got %x for a message without id, want none", h)
	}
	hashes := map[engine.Key]Key{}
	for _, k := range []Key{
		{"a", "b", "c"},
		{"ab", "", "c"},
		{"", "ab", "c"},
		{"a", "", "bc"},
		{"", "", "abc"},
		{"", "a", "bc"},
		{"\x01a", "", "c"},
		{"", "\x01a", "c"},
	} {
		h := k.hash()
		if other, ok := hashes[h]; ok || h == (engine.Key{}) {
			t.Errorf("got %x for %q and for %q", h, k, other)
		}
		hashes[h] = k
	}
}

// FuzzDecodeEntry decodes anything, and compares what is encoded with what comes back.
func FuzzDecodeEntry(f *testing.F) {
	f.Add([]byte{textEntry, 0, 0}, uint64(0), "", true)
	f.Add([]byte{binaryEntry, 0x80, 1, 3, 'a', 'd', 'a', 1}, uint64(1<<63), "ada", false)
	f.Add([]byte{3}, uint64(1), "\x00", true)
	f.Fuzz(func(t *testing.T, data []byte, sender uint64, user string, text bool) {
		before := bytes.Clone(data)
		m, err := decodeEntry(data)
		if !bytes.Equal(data, before) {
			t.Fatal("decodeEntry has changed the entry")
		}
		if err == nil {
			again, err := decodeEntry(encodeMessage(&Message{Message: m}).Data)
			if err != nil || again.Sender != m.Sender || again.User != m.User || again.Opcode != m.Opcode || !bytes.Equal(again.Payload, m.Payload) {
				t.Errorf("%x is %+v, which comes back as %+v, %v", data, m, again, err)
			}
		}
		want := feed.Message{Sender: feed.ClientID(sender), User: user, Opcode: ws.TextMessage, Payload: data}
		if !text {
			want.Opcode = ws.BinaryMessage
		}
		got, err := decodeEntry(encodeMessage(&Message{Message: want}).Data)
		if err != nil || got.Sender != want.Sender || got.User != user || got.Opcode != want.Opcode || !bytes.Equal(got.Payload, data) {
			t.Errorf("%+v comes back as %+v, %v", want, got, err)
		}
	})
}
