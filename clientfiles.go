package chatbroadcast

import (
	"bytes"
	"crypto/sha256"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/http"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

// ClientFiles serves the JavaScript client and the chat element to browsers: the files of this version of the plugin, so
// that pages and server always fit together. Put it below a path of its own, such as `/chat-client/*`. The last part of a
// request's path names the file; any other name gets 404, with a list of the files.
//
// Browsers keep the files and ask before each use whether they have changed. Pages of every origin may load them.
type ClientFiles struct {
	files map[string]clientFile // by name
}

// clientFolder is the folder of the client's files in the repository. Only files whose names begin with chat are for
// browsers; the others are for developers.
const clientFolder = "client"

//go:embed client/chat*
var clientSource embed.FS

// A clientFile is one of the client's files as it is served.
type clientFile struct {
	contentType string
	etag        string
	content     []byte
}

// clientTypes has the Content-Type by the end of a file's name.
var clientTypes = map[string]string{
	".js":   "text/javascript; charset=utf-8",
	".html": "text/html; charset=utf-8",
	".css":  "text/css; charset=utf-8",
	".svg":  "image/svg+xml",
	".ts":   "text/plain; charset=utf-8", // for people and compilers; the registered type is that of a video
}

// readClientFiles returns the files in a folder.
func readClientFiles(source fs.FS) (map[string]clientFile, error) {
	entries, err := fs.ReadDir(source, ".")
	if err != nil {
		return nil, err
	}
	files := map[string]clientFile{}
	for _, entry := range entries {
		name := entry.Name()
		contentType := clientTypes[path.Ext(name)]
		if contentType == "" {
			return nil, fmt.Errorf("the file %s has no Content-Type", name)
		}
		content, err := fs.ReadFile(source, name)
		if err != nil {
			return nil, err
		}
		sum := sha256.Sum256(content)
		files[name] = clientFile{contentType, fmt.Sprintf("%q", fmt.Sprintf("%x", sum[:16])), content}
	}
	return files, nil
}

// CaddyModule implements caddy.Module.
func (*ClientFiles) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: clientFilesID, New: func() caddy.Module { return new(ClientFiles) }}
}

// Provision implements caddy.Provisioner.
func (c *ClientFiles) Provision(caddy.Context) error {
	folder, err := fs.Sub(clientSource, clientFolder)
	if err == nil {
		c.files, err = readClientFiles(folder)
	}
	return err
}

// parseClientFiles sets up ClientFiles from their directive. It does what httpcaddyfile.RegisterHandlerDirective does, and
// refuses a path that is that of no file.
func parseClientFiles(helper httpcaddyfile.Helper) ([]httpcaddyfile.ConfigValue, error) {
	helper.Next()
	if helper.NextArg() {
		if err := checkClientPath(helper.Val()); err != nil {
			return nil, helper.WrapErr(err)
		}
	}
	helper.Reset()
	helper.Next()
	matcherSet, err := helper.ExtractMatcherSet()
	if err != nil {
		return nil, err
	}
	c := new(ClientFiles)
	if err := c.UnmarshalCaddyfile(helper.Dispenser); err != nil {
		return nil, err
	}
	return helper.NewRoute(matcherSet, c), nil
}

// checkClientPath returns an error for a path matcher that no file is below.
func checkClientPath(matcher string) error {
	if !strings.HasPrefix(matcher, "/") || strings.ContainsAny(matcher, "*{") {
		return nil
	}
	if _, err := fs.ReadFile(clientSource, path.Join(clientFolder, path.Base(matcher))); err == nil {
		return nil // one file alone
	}
	return fmt.Errorf("the path %s matches itself and nothing below it: write %s/*", matcher, strings.TrimSuffix(matcher, "/"))
}

// UnmarshalCaddyfile implements caddyfile.Unmarshaler. Syntax:
//
//	chat_broadcast_client [<matcher>]
func (c *ClientFiles) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next() // the directive
	if d.NextArg() {
		return d.Errf("unexpected argument %q: the directive takes nothing but a matcher, and a path begins with a slash, "+
			"as in /chat-client/*", d.Val())
	}
	if d.NextBlock(0) {
		return d.Err("the directive takes no block")
	}
	return nil
}

// ServeHTTP implements caddyhttp.MiddlewareHandler.
func (c *ClientFiles) ServeHTTP(w http.ResponseWriter, r *http.Request, _ caddyhttp.Handler) error {
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		w.Header().Set("Allow", "GET, HEAD")
		return caddyhttp.Error(http.StatusMethodNotAllowed, errors.New("the client's files are read with GET or HEAD"))
	}
	header := w.Header()
	header.Set("Cache-Control", "no-cache") // ask each time, because the files are those of the server's version
	header.Set("X-Content-Type-Options", "nosniff")
	header.Set("Access-Control-Allow-Origin", "*") // they are the same for everybody
	name := r.URL.Path[strings.LastIndexByte(r.URL.Path, '/')+1:]
	file, ok := c.files[name]
	if !ok {
		c.notFound(w)
		return nil
	}
	header.Set("Content-Type", file.contentType)
	header.Set("ETag", file.etag)
	if path.Ext(name) == ".html" {
		header.Add("Content-Security-Policy", clientPolicy)
	}
	http.ServeContent(w, r, name, time.Time{}, bytes.NewReader(file.content))
	return nil
}

// clientPolicy is what the client's pages may do. The query of such a page names a hub, and anybody can link to the page with
// any query. So it connects to this site only: nobody can make it show a chat of theirs under the site's name.
const clientPolicy = "default-src 'self'; base-uri 'none'; form-action 'none'"

// notFound answers a request for a file that there is not.
func (c *ClientFiles) notFound(w http.ResponseWriter) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.WriteHeader(http.StatusNotFound)
	names := slices.Sorted(maps.Keys(c.files))
	// It fails only when the connection is gone.
	_, _ = fmt.Fprintf(w, "chat_broadcast_client has no such file. It has: %s\n", strings.Join(names, ", "))
}

// Interface guards
var (
	_ caddy.Module                = (*ClientFiles)(nil)
	_ caddy.Provisioner           = (*ClientFiles)(nil)
	_ caddyhttp.MiddlewareHandler = (*ClientFiles)(nil)
	_ caddyfile.Unmarshaler       = (*ClientFiles)(nil)
)
