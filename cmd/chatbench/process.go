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

// readUsage reads /proc, which only Linux has.
func readUsage(pid int) (u usage, err error) {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return u, err
	}
	// The fields follow the command's name, which may have spaces. State is the first; utime and stime are the 12th and
	// 13th, in ticks of 10 ms (proc(5); the unit is fixed for programs).
	fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
	for _, field := range fields[11:13] {
		ticks, err := strconv.ParseInt(field, 10, 64)
		if err != nil {
			return u, err
		}
		u.cpu += time.Duration(ticks) * 10 * time.Millisecond
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
