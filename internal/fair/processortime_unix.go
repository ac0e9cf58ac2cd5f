//go:build unix

package fair

import (
	"time"

	"golang.org/x/sys/unix"
)

// ProcessorTime returns how much processor time the process has used since it started, in user and system mode together
// (getrusage(2)). known is false where the system does not tell.
func ProcessorTime() (used time.Duration, known bool) {
	var u unix.Rusage
	if unix.Getrusage(unix.RUSAGE_SELF, &u) != nil {
		return 0, false
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano()), true
}
