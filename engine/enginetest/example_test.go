package enginetest_test

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/chat-broadcast/caddy-chat-broadcast/engine"
	"github.com/chat-broadcast/caddy-chat-broadcast/engine/enginetest"
)

// A test of an engine, here of the reference. It would be called TestEngine.
func ExampleRun() {
	_ = func(t *testing.T) {
		enginetest.Run(t, func(testing.TB) enginetest.Harness {
			server := enginetest.NewServer()
			return enginetest.Harness{Connect: server.Connect, Persistent: true, Wipe: server.Wipe}
		})
	}
	// Output:
}

// A message that was published although its reply was lost is not published again.
func ExampleServer_LoseReplies() {
	server := enginetest.NewServer()
	session := server.Session()
	defer session.Close()
	batch := engine.Batch{
		Bounds:   engine.Bounds{Messages: 100, Bytes: 1 << 20, Age: time.Hour, Receipts: 100},
		Messages: []engine.Message{{Data: []byte("hello")}},
		Number:   1,
	}

	server.LoseReplies(1)
	_, err := session.Publish(context.Background(), "hub", batch)
	fmt.Println(err)
	receipts, err := session.Publish(context.Background(), "hub", batch)
	fmt.Println(receipts[0].Seq, err)
	// Output:
	// the connection broke before an answer came
	// 1 <nil>
}
