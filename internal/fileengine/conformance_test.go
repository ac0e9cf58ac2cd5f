package fileengine

import (
	"testing"

	"github.com/chat-broadcast/caddy-chat-broadcast/engine"
	"github.com/chat-broadcast/caddy-chat-broadcast/engine/enginetest"
)

// TestSession_Conforms runs the tests for any engine. TestSession_SurvivesKills kills processes, so that ending a session
// while it works is enough here.
func TestSession_Conforms(t *testing.T) {
	enginetest.Run(t, func(t testing.TB) enginetest.Harness {
		folder := t.TempDir()
		return enginetest.Harness{
			Persistent: true,
			Connect:    func(m engine.Monitor) (engine.Session, error) { return Open(folder, m) },
			Kill: func(s engine.Session) {
				if err := s.Close(); err != nil {
					t.Error(err)
				}
			},
		}
	})
}
