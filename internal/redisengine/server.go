package redisengine

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
)

// oldestVersion is the first major version of Redis that neither replicates nor saves loaded scripts.
const oldestVersion = 7

// A server is what a server process says about itself.
type server struct {
	runID     string
	version   string
	mode      string // standalone, sentinel or cluster
	role      string // master or slave
	promotion string // changes when the process becomes a primary again
	replicas  bool
	eviction  string // maxmemory-policy
	loading   bool   // its data; until it has them it says that it has no append-only file

	appendOnly bool
	rewriting  bool // the append-only file; it has none yet if that was switched on just now
	// Only if it lets the user read its configuration:
	configKnown     bool
	appendFsync     string
	noSyncOnRewrite bool
}

// examine asks the server of a connection about itself.
func (l *link) examine(ctx context.Context) (server, error) {
	text, err := l.do(ctx, l.commands.B().Info().Build()).ToString()
	if err != nil {
		return server{}, err
	}
	s := parseInfo(text)
	config, err := l.do(ctx, l.commands.B().ConfigGet().Parameter("appendfsync", "no-appendfsync-on-rewrite").Build()).
		AsStrMap()
	switch {
	case err == nil && config["appendfsync"] != "":
		s.configKnown = true
		s.appendFsync = config["appendfsync"]
		s.noSyncOnRewrite = config["no-appendfsync-on-rewrite"] != "no"
	case err != nil && code(err) == "":
		return server{}, err // no answer
	}
	return s, nil
}

func parseInfo(text string) server {
	fields := map[string]string{}
	for line := range strings.Lines(text) {
		if name, value, found := strings.Cut(strings.TrimRight(line, "\r\n"), ":"); found {
			fields[name] = value
		}
	}
	return server{
		runID:      fields["run_id"],
		version:    fields["redis_version"],
		mode:       fields["redis_mode"],
		role:       fields["role"],
		promotion:  fields["master_replid2"],
		replicas:   fields["connected_slaves"] != "0",
		eviction:   fields["maxmemory_policy"],
		loading:    fields["loading"] == "1",
		appendOnly: fields["aof_enabled"] == "1",
		rewriting: fields["aof_rewrite_in_progress"] != "0" || fields["aof_rewrite_scheduled"] != "0" ||
			fields["aof_last_bgrewrite_status"] != "ok",
	}
}

// check returns an error if the engine cannot use the server.
func (s server) check() error {
	major, _, _ := strings.Cut(s.version, ".")
	n, err := strconv.Atoi(major)
	switch {
	case err != nil || s.runID == "":
		return errors.New("it does not say its version and run: is this Redis?")
	case s.mode == "sentinel":
		return errors.New("it is a Sentinel: use redis+sentinel:// and the name of the master")
	case n < oldestVersion:
		return fmt.Errorf("its version is %s, but the engine needs %d.0 or newer", s.version, oldestVersion)
	case s.mode == "cluster":
		return errors.New("it belongs to a Redis Cluster, which the engine does not support: " +
			"use a single server, or one with Sentinels")
	case s.role != "master":
		return errReadOnly
	case s.loading:
		return errLoading
	}
	return nil
}

// syncs reports whether the server has stored on disk what it answers.
func (s server) syncs() bool {
	return s.appendOnly && s.configKnown && s.appendFsync == "always" && !s.noSyncOnRewrite
}

// keeps reports whether a restart of the server certainly loses nothing that it has answered, provided that it was so from
// the beginning. If it has replicas, one of them may take its place, which may lack the newest messages.
func (s server) keeps() bool { return s.syncs() && !s.replicas && strings.Trim(s.promotion, "0") == "" }

// warnings returns what an operator should know about the settings of the server.
func (s server) warnings() []string {
	var all []string
	if s.eviction != "noeviction" && s.eviction != "" {
		all = append(all, fmt.Sprintf("Redis evicts messages when its memory is full, because its maxmemory-policy is %s: "+
			"set maxmemory-policy noeviction", s.eviction))
	}
	const newEpochs = "and clients of every hub then see a new epoch"
	switch {
	case s.syncs():
	case !s.appendOnly:
		all = append(all, "a restart of Redis loses the messages since its last snapshot, or all, "+newEpochs+
			": set appendonly yes and appendfsync always to keep them")
	case !s.configKnown:
		all = append(all, "a restart of Redis may lose the newest messages, "+newEpochs+
			", because the engine may not read how Redis stores them: allow CONFIG GET")
	case s.appendFsync == "always":
		all = append(all, "a restart of Redis may lose the newest messages, "+newEpochs+
			": set no-appendfsync-on-rewrite no to keep them")
	default:
		all = append(all, fmt.Sprintf("a restart of Redis may lose the newest messages (appendfsync %s), %s: "+
			"set appendfsync always to keep them", s.appendFsync, newEpochs))
	}
	return all
}
