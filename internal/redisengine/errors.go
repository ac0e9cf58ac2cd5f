package redisengine

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"

	"github.com/chat-broadcast/caddy-chat-broadcast/engine"
	"github.com/redis/rueidis"
)

// The errors of a session.
var (
	errClosed       = errors.New("the session is closed")
	errNotConnected = errors.New("not connected yet")
	errNotOpen      = errors.New("the hub is not open")
	errHubName      = errors.New("the name of a hub is 1 to 255 bytes of UTF-8")
	errBatchSize    = errors.New("a batch has 1 to 64 messages")
	errReplaced     = errors.New("the hub was opened again or left meanwhile")
	errMalformed    = errors.New("malformed answer: does another program write keys with the prefix of the engine?")
	errHandshake    = errors.New("the TLS handshake failed: if the server does not speak TLS, use redis:// instead of rediss://")
	// errClosedByServer is all that is left of a connection.
	errClosedByServer = errors.New("it has closed the connection")
	errLoading        = errors.New("loading its data")
	errReadOnly       = errors.New("it is a replica, which takes no messages: use the address of its primary, or Sentinels")
)

// unavailable returns the error for something that was certainly not done.
func unavailable(err error) error { return fmt.Errorf("%w: %w", engine.ErrUnavailable, err) }

// code returns the first word of an error that Redis has answered, such as OOM, and "" for any other error.
func code(err error) string {
	answer, ok := rueidis.IsRedisErr(err)
	if !ok {
		return ""
	}
	word, _, _ := strings.Cut(answer.Error(), " ")
	return word
}

// outcome returns the error for a script that failed with err. It wraps engine.ErrUnavailable if Redis has certainly not
// run the script. The scripts have no compatibility mode ("#!lua"), so Redis examines its own state before it runs them.
func outcome(err error) error {
	switch code(err) {
	case "OOM":
		return unavailable(errors.New("the server has no memory left, as its maxmemory says"))
	case "READONLY", "NOSCRIPT", "STALE", "LOADING", "MASTERDOWN", "NOREPLICAS", "MISCONF", "NOAUTH", "NOPERM", "BUSY":
		return unavailable(err)
	case "OLD":
		return engine.ErrOldBatch
	}
	return err
}

// explain returns err with what to change, for the operator.
func explain(err error) error {
	if err == nil {
		return nil
	}
	switch code(err) {
	case "":
		return explainConnection(err)
	case "WRONGPASS":
		return errors.New("wrong user or password: change them in the URL of the engine")
	case "NOAUTH":
		return errors.New("a password is needed: add it to the URL of the engine, as in redis://:password@host")
	case "NOPERM":
		return fmt.Errorf("the user may not do what the engine needs, change its ACL: %w", err)
	case "LOADING":
		return errLoading
	case "DENIED":
		return errors.New("in protected mode, it refuses other machines: give it a password or bind it to an address")
	case "MISCONF":
		return fmt.Errorf("it refuses to write because it cannot save its data to disk: %w", err)
	case "NOREPLICAS":
		return fmt.Errorf("it refuses to write because too few replicas are connected (min-replicas-to-write): %w", err)
	case "READONLY":
		return errReadOnly
	case "No": // such master with that name
		return errors.New("the Sentinels do not know the master that the URL names")
	case "unknown": // command
		if strings.Contains(err.Error(), "SENTINEL") {
			return errors.New("it is not a Sentinel: the URL must name Sentinels, which know the servers")
		}
	case "DB": // index is out of range
		return fmt.Errorf("it does not have the database of the URL: %w", err)
	}
	return err
}

// explainConnection leaves out what differs each time, such as ports, so that an error that persists is told once.
func explainConnection(err error) error {
	var failed *net.OpError
	switch {
	case errors.Is(err, errHandshake):
		return err
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, os.ErrDeadlineExceeded):
		return errors.New("no answer in time")
	case errors.As(err, &failed) && failed.Op == "dial":
		return failed.Err
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF), errors.As(err, &failed):
		return errClosedByServer
	case strings.HasPrefix(err.Error(), "received unknown message type"),
		strings.HasPrefix(err.Error(), "received unexpected"):
		return errors.New("it does not speak the protocol of Redis: is it another server?" + expectsTLS)
	}
	return err
}

// expectsTLS is a hint for a server that breaks a connection without TLS off before it has said anything.
const expectsTLS = " If it expects TLS, use rediss:// instead of redis://"

// notNil returns err unless it only means that a script has answered nothing.
func notNil(err error) error {
	if rueidis.IsRedisNil(err) {
		return nil
	}
	return err
}
