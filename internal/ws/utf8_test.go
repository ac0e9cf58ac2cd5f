package ws

import (
	"bytes"
	"testing"
	"unicode/utf8"
)

func TestValidUTF8_FindsTheFirstBadByte(t *testing.T) {
	for _, tc := range []struct {
		name  string
		text  string
		whole int
		ok    bool
	}{
		{"empty", "", 0, true},
		{"ascii", "abc", 3, true},
		{"whole characters", "κόσμε𐍈", len("κόσμε𐍈"), true},
		{"half a character", "aκ"[:2], 1, true},
		{"three quarters of a character", "a𐍈"[:4], 1, true},
		{"a continuation first", "\x80", 1, false},
		{"beyond U+10FFFF, unfinished", "\xf4\x90", 2, false},
		{"a surrogate, unfinished", "\xed\xa0", 2, false},
		{"overlong, unfinished", "\xe0\x80", 2, false},
		{"an impossible byte", "a\xff", 2, false},
		{"a start instead of a continuation", "\xf0\x9f\x41", 3, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			whole, ok := ValidUTF8([]byte(tc.text))
			if ok != tc.ok || ok && whole != tc.whole {
				t.Errorf("got %d, %v, want %d, %v", whole, ok, tc.whole, tc.ok)
			}
		})
	}
}

// FuzzValidUTF8 compares the check of pieces with the check of the whole, and makes sure that it refuses nothing which can
// still become valid.
func FuzzValidUTF8(f *testing.F) {
	f.Add([]byte("Hello-µ@ßöäüàá-UTF-8!!"), uint8(1))
	f.Add([]byte("\xf4\x90\x80\x80"), uint8(2))
	f.Add([]byte("\xed\xa0\x80edited"), uint8(1))
	f.Fuzz(func(t *testing.T, text []byte, step uint8) {
		valid, refused := 0, false
		for end := 0; end < len(text) && !refused; {
			end = min(end+int(step)+1, len(text))
			whole, ok := ValidUTF8(text[valid:end])
			valid += whole
			refused = !ok
			if refused && canBecomeValid(text[:end]) {
				t.Fatalf("% x was refused, but can become valid", text[:end])
			}
			if !refused && !canBecomeValid(text[:end]) {
				t.Fatalf("% x was let through, but cannot become valid", text[:end])
			}
		}
		if got, want := !refused && valid == len(text), utf8.Valid(text); got != want {
			t.Fatalf("% x: got %v, want %v", text, got, want)
		}
	})
}

// canBecomeValid tries what could follow.
func canBecomeValid(p []byte) bool {
	for _, tail := range []string{
		"", "\x80", "\x80\x80", "\x80\x80\x80", "\xbf", "\xbf\xbf", "\xbf\xbf\xbf", "\x9f\x80", "\x9f\x80\x80", "\x8f\x80\x80",
		"\xa0\x80", "\x90\x80\x80",
	} {
		if utf8.Valid(append(bytes.Clone(p), tail...)) {
			return true
		}
	}
	return false
}
