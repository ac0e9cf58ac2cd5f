package ws

import "unicode/utf8"

// ValidUTF8 checks a piece of text that begins with a character and may end within one. It returns how many leading
// bytes of p are whole characters, so that the next piece begins with the bytes after them. ok says whether p can still
// become valid: it is false as soon as no byte that may follow can save p (RFC 6455 §8.1). At the end of a message n must
// be len(p).
func ValidUTF8(p []byte) (n int, ok bool) {
	n = len(p)
	// An unfinished character has at most utf8.UTFMax-1 bytes: it begins in the last three.
	for i := n - 1; i >= 0 && n-i < utf8.UTFMax; i-- {
		if utf8.RuneStart(p[i]) {
			if !utf8.FullRune(p[i:]) {
				n = i
			}
			break
		}
	}
	return n, utf8.Valid(p[:n])
}
