package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"math/big"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"time"
)

// A launcher starts servers.
type launcher struct {
	dir   string // for temporary files
	self  string // this program
	caddy string
	cores []int // the cores of the servers; empty for any
}

// launcherFlags defines the flag of newLauncher.
func launcherFlags(f *flag.FlagSet) *string {
	return f.String("caddy", "", "Caddy `program` with chat_broadcast; default: go build ./cmd/caddy")
}

// newLauncher builds Caddy unless it is given, and returns a context that an interrupt ends. The caller must call closeIt.
func newLauncher(caddy string) (ctx context.Context, l *launcher, closeIt func(), err error) {
	ctx, cancel := signal.NotifyContext(context.Background(), os.Interrupt)
	l = &launcher{caddy: caddy}
	if l.dir, err = os.MkdirTemp("", "chatbench"); err != nil {
		cancel()
		return nil, nil, nil, err
	}
	closeIt = func() {
		cancel()
		_ = os.RemoveAll(l.dir) // a leftover is in the system's temporary folder
	}
	if l.self, err = os.Executable(); err == nil {
		err = l.writeCertificate()
	}
	if err == nil && caddy == "" {
		l.caddy = filepath.Join(l.dir, "caddy")
		build := exec.CommandContext(ctx, "go", "build", "-o", l.caddy, "./cmd/caddy")
		build.Stdout, build.Stderr = os.Stderr, os.Stderr
		if err = build.Run(); err != nil {
			err = fmt.Errorf("building Caddy: %w", err)
		}
	}
	if err != nil {
		closeIt()
	}
	return ctx, l, closeIt, err
}

func (l *launcher) cert() string { return filepath.Join(l.dir, "cert.pem") }
func (l *launcher) key() string  { return filepath.Join(l.dir, "key.pem") }

func (l *launcher) writeCertificate() error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1),
		NotAfter:     time.Now().Add(24 * time.Hour),
		IPAddresses:  []net.IP{net.IPv4(127, 0, 0, 1)},
	}
	cert, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return err
	}
	keyBytes, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	return errors.Join(
		os.WriteFile(l.cert(), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert}), 0o600),
		os.WriteFile(l.key(), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyBytes}), 0o600))
}

// freeAddress returns an address on which nobody listens at this moment.
func freeAddress() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	return l.Addr().String(), l.Close()
}

// caddyfile returns a configuration with one site at the address.
func caddyfile(admin, globals, scheme, address, site, chat string) string {
	return fmt.Sprintf("{\n\tadmin %s\n\tpersist_config off\n\tauto_https off\n\t%s\n}\n%s://%s {\n\t%s\n\tchat_broadcast * {\n\t\tmax_hubs 20000\n\t\t%s\n\t}\n}\n",
		admin, globals, scheme, address, site, chat)
}

// startCaddy starts Caddy and waits until it listens on the address.
func (l *launcher) startCaddy(ctx context.Context, address, config string) (*exec.Cmd, error) {
	file := filepath.Join(l.dir, "Caddyfile")
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, l.caddy, "run", "--config", file, "--adapter", "caddyfile")
	// Keep apart from the user's own Caddy.
	cmd.Env = append(os.Environ(), "XDG_CONFIG_HOME="+l.dir, "XDG_DATA_HOME="+l.dir)
	return cmd, l.start(ctx, cmd, address)
}

// start starts a server on the launcher's cores and waits until it listens. The server's output goes to a file.
func (l *launcher) start(ctx context.Context, cmd *exec.Cmd, address string) error {
	log, err := os.Create(filepath.Join(l.dir, "log"))
	if err != nil {
		return err
	}
	defer log.Close()
	cmd.Stdout, cmd.Stderr = log, log
	if err := startOn(cmd, l.cores); err != nil {
		return err
	}
	for deadline := time.Now().Add(connectTimeout); ; pause(ctx, 20*time.Millisecond) {
		conn, err := net.Dial("tcp", address)
		if err == nil {
			return conn.Close()
		}
		if time.Now().After(deadline) || ctx.Err() != nil {
			stop(cmd)
			printed, _ := os.ReadFile(log.Name())
			return fmt.Errorf("%s does not start: %w\n%s", strings.Join(cmd.Args, " "), err, printed)
		}
	}
}

// startOn starts a process on the given cores, or on any core if the list is empty.
func startOn(cmd *exec.Cmd, cores []int) error {
	if len(cores) > 0 {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		undo, err := pin(cores)
		if err != nil {
			return fmt.Errorf("pinning to cores %v: %w", cores, err)
		}
		defer undo()
	}
	return cmd.Start()
}

// stop kills a server. None of them has anything to save.
func stop(cmd *exec.Cmd) {
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
}
