package enginetest

import (
	"errors"
	"testing"

	"github.com/chat-broadcast/caddy-chat-broadcast/engine"
)

func TestRunInBubble_ReferencePasses(t *testing.T) {
	RunInBubble(t, func(testing.TB) Harness { return harness(NewServer()) })
}

// A node alone hides that its session is a cluster.
type alone struct{ engine.Session }

func TestRunInBubble_SessionAlonePasses(t *testing.T) {
	RunInBubble(t, func(testing.TB) Harness {
		server := NewServer()
		return Harness{
			Persistent: true,
			Connect: func(m engine.Monitor) (engine.Session, error) {
				session, err := server.Connect(m)
				return alone{session}, err
			},
		}
	})
}

func TestRun_SessionAlonePasses(t *testing.T) {
	Run(t, func(testing.TB) Harness {
		server := NewServer()
		return Harness{
			Connect: func(m engine.Monitor) (engine.Session, error) {
				session, err := server.Connect(m)
				return alone{session}, err
			},
		}
	})
}

// harness returns a server with everything that a Harness can have.
func harness(server *Server) Harness {
	return Harness{
		Connect:    server.Connect,
		Persistent: true,
		Kill:       func(s engine.Session) { s.(*Session).Kill() },
		Interrupt: func() (restore func()) {
			server.Down(errors.New("interrupted"))
			return server.Up
		},
		Wipe: server.Wipe,
	}
}
