package main

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"
)

// usage is the CPU time and memory of a process.
type usage struct {
	cpu            time.Duration // user and system, since its start
	resident, peak int64         // bytes
}

// readUsage reads a clock and a file that only Linux has.
func readUsage(pid int) (u usage, err error) {
	if u.cpu, err = processTime(pid); err != nil {
		return u, err
	}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	for line := range strings.Lines(string(status)) {
		name, value, _ := strings.Cut(line, ":")
		switch name {
		case "VmRSS":
			u.resident = kilobytes(value)
		case "VmHWM":
			u.peak = kilobytes(value)
		}
	}
	return u, err
}

// kilobytes parses a value like "  123 kB".
func kilobytes(s string) int64 {
	n, _ := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(s), " kB"), 10, 64)
	return n << 10
}
