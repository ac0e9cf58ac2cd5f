//go:build !unix

package fair

import "time"

// ProcessorTime returns known = false: there is no way here to learn how much processor time the process has used.
func ProcessorTime() (used time.Duration, known bool) { return 0, false }
