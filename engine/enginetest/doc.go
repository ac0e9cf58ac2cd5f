// Package enginetest tests engines, and has one in memory to test hubs with.
//
// # Testing an engine
//
// [Run] tests whether an engine keeps the promises of package engine. The author of an engine calls it from a test, with
// a function that returns an engine without hubs:
//
//	func TestEngine(t *testing.T) {
//		enginetest.Run(t, func(t testing.TB) enginetest.Harness {
//			e := &myengine.Engine{Folder: t.TempDir()}
//			return enginetest.Harness{Connect: e.Connect, Persistent: true}
//		})
//	}
//
// Each promise is a subtest, for example TestEngine/Session/Publish_KeyIsPublishedOnce, so that one of them can be run
// alone. Which ones there are depends on the engine: those about nodes run if its sessions are an engine.Cluster, those
// about a restart if the [Harness] says that hubs outlive their sessions, and so on. None is ever skipped. The test logs
// what it assumes of the engine.
//
// Many tests are random, and run senders and receivers at the same time: run them often, and with the race detector. The
// suite waits up to ten seconds for what must happen, and hardly at all for what must not.
//
// Where package engine allows more than one behavior, so does the suite: an engine may keep twice what the bounds
// say, it may go on counting in a new epoch or begin with 1, and it may pass entries that a snapshot has, too. While
// nothing fails, receivers of a cluster must get everything, although a cluster may lose calls when its server cannot be
// reached.
//
// # Testing hubs
//
// [NewServer] returns the reference: a [Server] that keeps hubs in memory, for one process. It is also an example of an
// engine, without everything that makes one hard: there is no connection, no disk and no second process. Its methods, and
// those of its [Session], provoke faults: a server that cannot be reached or that has lost its data, replies and
// pushes that are lost, a node that is killed.
package enginetest
