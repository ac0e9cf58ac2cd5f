package hub

import (
	"testing"
	"time"
)

func TestRate_HelloHasTheConfiguredWindow(t *testing.T) {
	for _, test := range []struct {
		window time.Duration
		want   int64
	}{
		{time.Microsecond, 1},
		{1500 * time.Microsecond, 2},
		{100 * time.Millisecond, 100},
		{time.Second, 1000},
		{7 * time.Second, 7000},
		{time.Minute, 60_000},
		{24 * time.Hour, 86_400_000},
	} {
		for messages := 1; messages <= 1000; messages++ {
			r := Rate{Messages: messages, Window: test.window}
			if got := r.allowance(); got.Window != test.want || got.Messages != messages {
				t.Fatalf("rate %d %v: got %+v, want a window of %d", messages, test.window, *got, test.want)
			}
		}
	}
}
