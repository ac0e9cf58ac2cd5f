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

// A workshop has what is needed to start servers.
type workshop struct {
	dir   string // for what is temporary
	self  string // this program
	caddy string
	cores []int // where servers run; none: anywhere
}

// workshopFlags defines the flag of newWorkshop.
func workshopFlags(f *flag.FlagSet) *string {
	return f.String("caddy", "", "Caddy `program` with chat_broadcast, default: go build ./cmd/caddy")
}

// newWorkshop builds Caddy where needed. Whoever calls it calls close, which comes with a context that an interrupt ends.
func newWorkshop(caddy string) (ctx context.Context, w *workshop, closeIt func(), err error) {
	ctx, cancel := signal.NotifyContext(context.Background(), os.Interrupt)
	w = &workshop{caddy: caddy}
	if w.dir, err = os.MkdirTemp("", "chatbench"); err != nil {
		cancel()
		return nil, nil, nil, err
	}
	closeIt = func() {
		cancel()
		_ = os.RemoveAll(w.dir) // it is the system's temporary folder
	}
	if w.self, err = os.Executable(); err == nil {
		err = w.writeCertificate()
	}
	if err == nil && caddy == "" {
		w.caddy = filepath.Join(w.dir, "caddy")
		build := exec.CommandContext(ctx, "go", "build", "-o", w.caddy, "./cmd/caddy")
		build.Stdout, build.Stderr = os.Stderr, os.Stderr
		if err = build.Run(); err != nil {
			err = fmt.Errorf("building Caddy: %w", err)
		}
	}
	if err != nil {
		closeIt()
	}
	return ctx, w, closeIt, err
}

func (w *workshop) cert() string { return filepath.Join(w.dir, "cert.pem") }
func (w *workshop) key() string  { return filepath.Join(w.dir, "key.pem") }

func (w *workshop) writeCertificate() error {
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
		os.WriteFile(w.cert(), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert}), 0o600),
		os.WriteFile(w.key(), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyBytes}), 0o600))
}

// freeAddress is an address on which nobody listens at this moment.
func freeAddress() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	return l.Addr().String(), l.Close()
}

// caddyfile is a configuration with one site at the address.
func caddyfile(admin, globals, scheme, address, site string) string {
	return fmt.Sprintf("{\n\tadmin %s\n\tpersist_config off\n\tauto_https off\n\t%s\n}\n%s://%s {\n\t%s\n\tchat_broadcast\n}\n",
		admin, globals, scheme, address, site)
}

// startCaddy starts Caddy and waits until it listens on the address.
func (w *workshop) startCaddy(ctx context.Context, address, config string) (*exec.Cmd, error) {
	file := filepath.Join(w.dir, "Caddyfile")
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, w.caddy, "run", "--config", file, "--adapter", "caddyfile")
	// Away from the user's own Caddy.
	cmd.Env = append(os.Environ(), "XDG_CONFIG_HOME="+w.dir, "XDG_DATA_HOME="+w.dir)
	return cmd, w.start(ctx, cmd, address)
}

// start starts a server on the workshop's cores and waits until it listens. What it prints goes to a file.
func (w *workshop) start(ctx context.Context, cmd *exec.Cmd, address string) error {
	log, err := os.Create(filepath.Join(w.dir, "log"))
	if err != nil {
		return err
	}
	defer log.Close()
	cmd.Stdout, cmd.Stderr = log, log
	if err := startOn(cmd, w.cores); err != nil {
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

// startOn starts a process on these cores, if any.
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

// stop ends a server. None of them has anything to save, and none can refuse.
func stop(cmd *exec.Cmd) {
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
}
