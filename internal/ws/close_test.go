package ws

import (
	"bytes"
	"testing"

	"github.com/gorilla/websocket"
)

func TestLegalCloseCode_AreThoseOfIANAAndOfApplications(t *testing.T) {
	for _, tc := range []struct {
		first, last int
		legal       bool
	}{
		{-1, 999, false},
		{1000, 1003, true},
		{1004, 1006, false},
		{1007, 1014, true},
		{1015, 2999, false},
		{3000, 4999, true},
		{5000, 65535, false},
	} {
		for code := tc.first; code <= tc.last; code++ {
			if got := LegalCloseCode(code); got != tc.legal {
				t.Errorf("%d: got %v, want %v", code, got, tc.legal)
			}
		}
	}
}

func TestClose_FrameCarriesCodeAndReason(t *testing.T) {
	for _, tc := range []struct {
		name  string
		close Close
		want  string // "": no frame
	}{
		{"code and reason", Close{CloseTryAgainLater, "lagged"}, "\x88\x08\x03\xf5lagged"},
		{"code alone", ProtocolError, "\x88\x02\x03\xea"},
		{"largest code", Close{Code: 4999}, "\x88\x02\x13\x87"},
		{"no code", Close{Code: CloseNoStatusReceived}, "\x88\x00"},
		{"abnormal closure", Close{CloseAbnormalClosure, "ping_timeout"}, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got := tc.close.Frame()
			if string(got) != tc.want || (got == nil) != (tc.want == "") {
				t.Fatalf("got %q, want %q", got, tc.want)
			}
			if got == nil {
				return
			}
			_, body := Parts(got)
			if want := websocket.FormatCloseMessage(tc.close.Code, tc.close.Reason); !bytes.Equal(body, want) {
				t.Errorf("got %q, but gorilla makes it %q", body, want)
			}
		})
	}
}

func TestCloseCodes_AreThoseOfGorilla(t *testing.T) {
	for got, want := range map[int]int{
		CloseNormalClosure:           websocket.CloseNormalClosure,
		CloseGoingAway:               websocket.CloseGoingAway,
		CloseProtocolError:           websocket.CloseProtocolError,
		CloseNoStatusReceived:        websocket.CloseNoStatusReceived,
		CloseAbnormalClosure:         websocket.CloseAbnormalClosure,
		CloseInvalidFramePayloadData: websocket.CloseInvalidFramePayloadData,
		ClosePolicyViolation:         websocket.ClosePolicyViolation,
		CloseMessageTooBig:           websocket.CloseMessageTooBig,
		CloseInternalServerErr:       websocket.CloseInternalServerErr,
		CloseServiceRestart:          websocket.CloseServiceRestart,
		CloseTryAgainLater:           websocket.CloseTryAgainLater,
	} {
		if got != want {
			t.Errorf("got %d, want %d", got, want)
		}
	}
}
