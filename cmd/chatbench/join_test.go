package main

import (
	"net/http/httptest"
	"strings"
	"testing"
)

func TestJoin_FindsNoFaultsInTheFloors(t *testing.T) {
	for name, server := range map[string]*httptest.Server{
		"floor":       httptest.NewServer(&floor{history: 30}),
		"batched TLS": httptest.NewTLSServer(&floor{batched: true, history: 30}),
	} {
		defer server.Close()
		o := shortRun(server.URL)
		o.hubs, o.senders = 1, 1
		r, err := measureJoin(t.Context(), o, 30)
		if err != nil || r.Faults.any() || r.Burst <= 0 || r.Joined.Max < r.Joined.P50 || r.Joined.P50 <= 0 {
			t.Errorf("%s: got %+v, %v", name, r, err)
		}
	}
}

func TestJoin_FindsHistoryThatIsTooShort(t *testing.T) {
	server := httptest.NewServer(&floor{history: 28})
	defer server.Close()
	o := shortRun(server.URL)
	o.hubs, o.senders = 1, 1
	r, err := measureJoin(t.Context(), o, 30)
	if err != nil || r.Faults != (faults{Lost: int64(2 * o.clients)}) {
		t.Errorf("got %+v, %v, want 2 lost messages a client", r.Faults, err)
	}
}

func TestJoin_RefusesHubWithMessages(t *testing.T) {
	server := httptest.NewServer(&floor{history: 30})
	defer server.Close()
	o := shortRun(server.URL)
	o.hubs, o.senders = 1, 1
	if _, err := measureJoin(t.Context(), o, 30); err != nil {
		t.Fatal(err)
	}
	if _, err := measureJoin(t.Context(), o, 30); err == nil || !strings.Contains(err.Error(), "had messages already") {
		t.Errorf("got %v, want an error that the hub had messages", err)
	}
}

func TestFloor_KeepsTheLastMessages(t *testing.T) {
	h := &floorHub{history: 3}
	h.keepLocked([]byte("abb"), []int{1, 2})
	h.keepLocked([]byte("cccdd"), []int{3, 2})
	if got := string(h.kept); got != "bbcccdd" {
		t.Errorf("kept %q, want %q", got, "bbcccdd")
	}
}
