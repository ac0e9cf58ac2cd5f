package redisengine

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/redis/rueidis"
)

// DefaultURL is the server that the engine uses if none is configured.
const DefaultURL = "redis://127.0.0.1:6379"

// DefaultPrefix begins all keys and channels in Redis if no other prefix is configured.
const DefaultPrefix = "chat_broadcast:"

const (
	defaultPort         = "6379"
	defaultSentinelPort = "26379"
)

const (
	// dialTimeout bounds how long a connection takes to be made, and again how long the handshake takes.
	dialTimeout = 5 * time.Second

	// pingInterval is how long a connection is silent before it is tested, and answerTimeout how long the answer to
	// that test may take. Together they bound how long a dead connection goes unnoticed. A server that stops for a
	// moment, for example to fork, must not be taken for dead.
	pingInterval  = 2 * time.Second
	answerTimeout = 5 * time.Second

	// refreshInterval is the time between two looks at the Sentinels, in case that they have said unheard that the primary
	// is another one.
	refreshInterval = 5 * time.Second

	// ringScale is the logarithm of how many commands may be in flight on a connection. See link.slots.
	ringScale = 10

	// bufferSize is that of a connection, in each direction.
	bufferSize = 64 << 10
)

// Options say which server a session uses. The zero value is none; see ParseURL.
type Options struct {
	network   string   // "tcp" or "unix"
	addresses []string // of the server, or of Sentinels if master is set
	tls       bool
	db        int
	master    string // the name by which the Sentinels know the server
	credentials
}

// credentials are what Session.SetCredentials changes.
type credentials struct {
	username, password                 string
	sentinelUsername, sentinelPassword string
}

// ParseURL parses the address of a server:
//
//	redis://[[user]:password@]host[:port][/db]
//	rediss://…                                             the same over TLS
//	unix://[[user]:password@]/path[?db=n]
//	redis+sentinel://[[user]:password@]host[:port][,host[:port]…]/master[/db][?sentinel_user=…&sentinel_password=…]
//	rediss+sentinel://…                                    the same over TLS, also to the Sentinels
//
// The user and the password are those of Redis. The default user needs only a password. In them, a % that two
// hexadecimal digits follow must be written %25; other characters may stand as they are. An error never contains them.
func ParseURL(text string) (Options, error) {
	scheme, rest, found := strings.Cut(text, "://")
	if !found {
		return Options{}, errors.New("the URL of Redis must begin with redis://, rediss://, unix:// or redis+sentinel://")
	}
	var o Options
	rest = o.cutUser(scheme, rest)
	rest, query, _ := strings.Cut(rest, "?")
	values, err := url.ParseQuery(query)
	if err != nil {
		return Options{}, errors.New("the URL of Redis has a malformed part after the question mark")
	}
	switch scheme {
	case "redis", "rediss":
		err = o.parseServer(rest)
	case "redis+sentinel", "rediss+sentinel":
		err = o.parseSentinels(rest, values)
	case "unix":
		err = o.parseSocket(rest, values)
	default:
		err = fmt.Errorf("the URL of Redis begins with %s://, which is none of redis://, rediss://, unix:// and "+
			"redis+sentinel://", scheme)
	}
	if err != nil {
		return Options{}, err
	}
	for name := range values {
		return Options{}, fmt.Errorf("the URL of Redis has an unknown parameter %q", name)
	}
	o.tls = strings.HasPrefix(scheme, "rediss")
	return o, nil
}

// cutUser takes the user and the password from the beginning of rest. It cuts at the last @, so that a password may
// contain any character.
func (o *Options) cutUser(scheme, rest string) string {
	if scheme == "unix" && strings.HasPrefix(rest, "/") {
		return rest
	}
	at := strings.LastIndexByte(rest, '@')
	if at < 0 {
		return rest
	}
	user, password, _ := strings.Cut(rest[:at], ":")
	o.username, o.password = unescape(user), unescape(password)
	return rest[at+1:]
}

// unescape replaces what is escaped with %. What cannot be an escape is taken as it is: placeholders put passwords into
// URLs without escaping them.
func unescape(s string) string {
	if plain, err := url.PathUnescape(s); err == nil {
		return plain
	}
	return s
}

func (o *Options) parseServer(rest string) error {
	host, db, _ := strings.Cut(rest, "/")
	if strings.Contains(host, ",") {
		return errors.New("the URL of Redis names several servers: for Sentinels use redis+sentinel://")
	}
	address, err := withPort(host, defaultPort)
	if err != nil {
		return err
	}
	o.network, o.addresses = "tcp", []string{address}
	return o.parseDB(db)
}

func (o *Options) parseSentinels(rest string, values url.Values) error {
	hosts, path, _ := strings.Cut(rest, "/")
	for host := range strings.SplitSeq(hosts, ",") {
		address, err := withPort(host, defaultSentinelPort)
		if err != nil {
			return err
		}
		o.addresses = append(o.addresses, address)
	}
	master, db, _ := strings.Cut(path, "/")
	if master == "" {
		return errors.New("the URL of Redis needs the name of the master after the Sentinels: " +
			"redis+sentinel://host:26379/mymaster")
	}
	o.network, o.master = "tcp", unescape(master)
	o.sentinelUsername, o.sentinelPassword = values.Get("sentinel_user"), values.Get("sentinel_password")
	values.Del("sentinel_user")
	values.Del("sentinel_password")
	return o.parseDB(db)
}

func (o *Options) parseSocket(path string, values url.Values) error {
	if !strings.HasPrefix(path, "/") || path == "/" {
		return errors.New("the URL of Redis needs the path of a socket: unix:///run/redis/redis.sock")
	}
	o.network, o.addresses = "unix", []string{unescape(path)}
	db := values.Get("db")
	values.Del("db")
	return o.parseDB(db)
}

func (o *Options) parseDB(text string) error {
	if text == "" {
		return nil
	}
	db, err := strconv.Atoi(text)
	if err != nil || db < 0 {
		return fmt.Errorf("the URL of Redis has the database %q, which is not a number", text)
	}
	o.db = db
	return nil
}

// withPort returns the address of a host for dialing.
func withPort(host, port string) (string, error) {
	name := host
	if h, p, err := net.SplitHostPort(host); err == nil {
		name, port = h, p
	} else if strings.HasPrefix(host, "[") && strings.HasSuffix(host, "]") {
		name = host[1 : len(host)-1]
	} else if strings.Contains(host, ":") {
		return "", fmt.Errorf("the URL of Redis has the host %q: write host:port, and an IPv6 address in brackets", host)
	}
	if name == "" {
		return "", errors.New("the URL of Redis has no host")
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
		return "", fmt.Errorf("the URL of Redis has the port %q, which is not one of 1 to 65535", port)
	}
	return net.JoinHostPort(name, port), nil
}

// String returns the address without any secret.
func (o Options) String() string {
	text := strings.Join(o.addresses, ",")
	if o.master != "" {
		text += "/" + o.master
	}
	if o.db != 0 {
		text += "/" + strconv.Itoa(o.db)
	}
	return text
}

// Key identifies the data that sessions with these options and this prefix share. It contains no secret.
func (o Options) Key(prefix string) string {
	return fmt.Sprintf("redis %s %s", o, prefix)
}

// clientOption returns what rueidis needs to make connections. They are made with dial.
func (o Options) clientOption(
	dial func(context.Context, string, *net.Dialer, *tls.Config) (net.Conn, error),
) rueidis.ClientOption {
	dialer := net.Dialer{Timeout: dialTimeout, KeepAlive: pingInterval}
	option := rueidis.ClientOption{
		InitAddress:         o.addresses,
		Username:            o.username,
		Password:            o.password,
		SelectDB:            o.db,
		ClientName:          "chat_broadcast",
		ClientSetInfo:       rueidis.DisableClientSetInfo,
		DialCtxFn:           dial,
		Dialer:              dialer,
		ConnWriteTimeout:    answerTimeout,
		ReadBufferEachConn:  bufferSize,
		WriteBufferEachConn: bufferSize,
		RingScaleEachConn:   ringScale,
		PipelineMultiplex:   -1, // one connection
		AlwaysPipelining:    true,
		DisableCache:        true,
		DisableRetry:        true, // a script may have run although its answer is missing
		ForceSingleClient:   o.master == "",
	}
	if o.tls {
		option.TLSConfig = &tls.Config{MinVersion: tls.VersionTLS12}
	}
	if o.master != "" {
		option.Sentinel = rueidis.SentinelOption{
			MasterSet:               o.master,
			Username:                o.sentinelUsername,
			Password:                o.sentinelPassword,
			Dialer:                  dialer,
			TLSConfig:               option.TLSConfig,
			TopologyRefreshInterval: refreshInterval,
		}
	}
	return option
}
