package chatbroadcast

import (
	"compress/gzip"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
)

// clientSite serves the client's files beside a hub and pages.
const clientSite = `http://localhost:9080 {
	encode gzip
	chat_broadcast
	chat_broadcast_client /chat-client/*
	respond "a page"
}`

// clientFolderFiles returns the files of the repository that are for browsers, by name.
func clientFolderFiles(t *testing.T) map[string]string {
	t.Helper()
	paths, err := filepath.Glob("client/chat*")
	if err != nil || len(paths) == 0 {
		t.Fatalf("got files %v, error %v", paths, err)
	}
	files := map[string]string{}
	for _, path := range paths {
		content, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		files[filepath.Base(path)] = string(content)
	}
	return files
}

// TestClientFiles_AreThoseOfTheRepository gets every file as a browser does.
func TestClientFiles_AreThoseOfTheRepository(t *testing.T) {
	startCaddy(t, clientSite)
	plain := []string{"Accept-Encoding", "identity"}
	for name, content := range clientFolderFiles(t) {
		url := "http://" + httpAddr + "/chat-client/" + name
		got := request(t, http.MethodGet, url+"?v=1", nil, plain...)
		if got.status != http.StatusOK || got.body != content {
			t.Errorf("%s: got %d and %d bytes, want the %d bytes of the repository", name, got.status, len(got.body), len(content))
		}
		want := map[string]string{
			"Cache-Control":               "no-cache",
			"X-Content-Type-Options":      "nosniff",
			"Access-Control-Allow-Origin": "*",
			"Content-Type":                "",
			"Content-Security-Policy":     "",
		}
		switch filepath.Ext(name) {
		case ".js":
			want["Content-Type"] = "text/javascript; charset=utf-8"
		case ".html":
			want["Content-Type"] = "text/html; charset=utf-8"
			want["Content-Security-Policy"] = clientPolicy
		case ".ts":
			want["Content-Type"] = "text/plain; charset=utf-8"
		}
		etag := got.header.Get("ETag")
		head := request(t, http.MethodHead, url, nil, plain...)
		if head.status != http.StatusOK || head.body != "" || head.header.Get("ETag") != etag {
			t.Errorf("HEAD %s: got %d %q with ETag %s, want 200 with %s", name, head.status, head.body, head.header.Get("ETag"), etag)
		}
		for field, want := range want {
			if got, head := got.header.Get(field), head.header.Get(field); got != want || head != want {
				t.Errorf("%s, %s: got %q and for HEAD %q, want %q", name, field, got, head, want)
			}
		}
		if len(etag) != 34 || strings.Trim(etag, `"0123456789abcdef`) != "" {
			t.Errorf("%s: got ETag %s, want a strong one", name, etag)
		}
		again := request(t, http.MethodGet, url, nil, append(plain, "If-None-Match", etag)...)
		if again.status != http.StatusNotModified || again.body != "" || again.header.Get("Cache-Control") != "no-cache" {
			t.Errorf("%s again: got %d and %d bytes, want 304", name, again.status, len(again.body))
		}
		if old := request(t, http.MethodGet, url, nil, append(plain, "If-None-Match", `"0"`)...); old.status != http.StatusOK || old.body != content {
			t.Errorf("%s for a browser with another version: got %d, want 200", name, old.status)
		}
	}
}

// TestClientFiles_AreCompressed has files of the size from which on encode compresses.
func TestClientFiles_AreCompressed(t *testing.T) {
	startCaddy(t, clientSite)
	const encodeMinimum = 512
	for name, content := range clientFolderFiles(t) {
		if len(content) < encodeMinimum {
			continue
		}
		url := "http://" + httpAddr + "/chat-client/" + name
		got := request(t, http.MethodGet, url, nil, "Accept-Encoding", "gzip")
		r, err := gzip.NewReader(strings.NewReader(got.body))
		if err != nil {
			t.Errorf("%s: got %q, want gzip: %v", name, got.header.Get("Content-Encoding"), err)
			continue
		}
		if unzipped, err := io.ReadAll(r); err != nil || string(unzipped) != content || got.header.Get("Vary") != "Accept-Encoding" {
			t.Errorf("%s: got %d bytes, error %v and Vary %q", name, len(unzipped), err, got.header.Get("Vary"))
		}
		again := request(t, http.MethodGet, url, nil, "Accept-Encoding", "gzip", "If-None-Match", got.header.Get("ETag"))
		if again.status != http.StatusNotModified {
			t.Errorf("%s again: got %d, want 304", name, again.status)
		}
	}
}

// TestClientFiles_OtherNamesAreListed asks for what there is not, among it files of the repository that are not for browsers.
func TestClientFiles_OtherNamesAreListed(t *testing.T) {
	startCaddy(t, clientSite)
	list := strings.Join(slices.Sorted(maps.Keys(clientFolderFiles(t))), ", ")
	for _, name := range []string{
		"", "chat", "Chat.html", "chat.html/", "README.md", "package.json", "folder/..%2f..%2fmodule.go", "%2e%2e%2fclientfiles.go",
		"client", "chat.html%00", "<script>", strings.Repeat("x", 3000),
	} {
		got := request(t, http.MethodGet, "http://"+httpAddr+"/chat-client/folder/"+name, nil)
		if got.status != http.StatusNotFound || got.body != "chat_broadcast_client has no such file. It has: "+list+"\n" {
			t.Errorf("%s: got %d %q, want 404 and a list of %s", name, got.status, got.body, list)
		}
		if got.header.Get("Content-Type") != "text/plain; charset=utf-8" || got.header.Get("X-Content-Type-Options") != "nosniff" ||
			got.header.Get("Cache-Control") != "no-cache" {
			t.Errorf("%s: got %v", name, got.header)
		}
	}
	for _, method := range []string{http.MethodPost, http.MethodPut, http.MethodDelete, http.MethodOptions} {
		got := request(t, method, "http://"+httpAddr+"/chat-client/chat.html", nil)
		if got.status != http.StatusMethodNotAllowed || got.header.Get("Allow") != "GET, HEAD" {
			t.Errorf("%s: got %d with Allow %q, want 405 with GET, HEAD", method, got.status, got.header.Get("Allow"))
		}
	}
}

// TestClientFiles_BelowAnyPath also has a path that Caddy strips before, and one file alone.
func TestClientFiles_BelowAnyPath(t *testing.T) {
	startCaddy(t, `http://localhost:9080 {
	handle_path /stripped/* {
		chat_broadcast_client
	}
	chat_broadcast_client /v1/chat/*
	chat_broadcast_client /chat.html
	chat_broadcast /v1/*
	header Content-Security-Policy "frame-ancestors https://www.example.com"
	respond "a page"
}`)
	want := clientFolderFiles(t)["chat.html"]
	for _, path := range []string{"/stripped/chat.html", "/v1/chat/chat.html", "/chat.html"} {
		got := request(t, http.MethodGet, "http://"+httpAddr+path, nil)
		if got.status != http.StatusOK || got.body != want {
			t.Errorf("%s: got %d %q", path, got.status, got.body)
		}
		if got := got.header.Values("Content-Security-Policy"); !slices.Equal(got, []string{"frame-ancestors https://www.example.com", clientPolicy}) {
			t.Errorf("%s: got the policies %q, want the site's and the file's", path, got)
		}
	}
	if got := request(t, http.MethodGet, "http://"+httpAddr+"/elsewhere/chat.html", nil); got.body != "a page" {
		t.Errorf("elsewhere: got %q", got.body)
	}
	join(t, "/v1/lobby")
}

func TestDocs_ClientFiles(t *testing.T) {
	folder := t.TempDir()
	if err := os.WriteFile(filepath.Join(folder, "index.html"), []byte("a page"), 0o600); err != nil {
		t.Fatal(err)
	}
	startRecipe(t, "client-files", "/srv", folder)
	files := clientFolderFiles(t)
	for path, want := range map[string]string{"/": "a page", "/chat-client/chat.html": files["chat.html"]} {
		if got := request(t, http.MethodGet, "http://"+httpAddr+path, nil); got.status != http.StatusOK || got.body != want {
			t.Errorf("%s: got %d %q, want %q", path, got.status, got.body, want)
		}
	}
	joinEvents(t, "/chat/lobby")
}

func TestClientFiles_TypesOfFiles(t *testing.T) {
	source := fstest.MapFS{}
	want := map[string]string{
		"chat.js":   "text/javascript; charset=utf-8",
		"chat.css":  "text/css; charset=utf-8",
		"chat.svg":  "image/svg+xml",
		"chat.html": "text/html; charset=utf-8",
		"chat.d.ts": "text/plain; charset=utf-8",
	}
	for name := range want {
		source[name] = &fstest.MapFile{Data: []byte(name)}
	}
	files, err := readClientFiles(source)
	if err != nil {
		t.Fatal(err)
	}
	c := &ClientFiles{files: files}
	for name, want := range want {
		w := httptest.NewRecorder()
		if err := c.ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/any/"+name, nil), nil); err != nil {
			t.Fatal(err)
		}
		if got := w.Header().Get("Content-Type"); got != want || w.Body.String() != name {
			t.Errorf("%s: got %q with %q, want %q", name, got, w.Body, want)
		}
	}
	source["chat.bin"] = &fstest.MapFile{}
	if _, err := readClientFiles(source); err == nil || !strings.Contains(err.Error(), "chat.bin") {
		t.Errorf("got %v, want an error about the file without a type", err)
	}
}

// TestClientFiles_AllAreReadable provisions the module as Caddy does.
func TestClientFiles_AllAreReadable(t *testing.T) {
	c := new(ClientFiles)
	if err := c.Provision(caddy.Context{}); err != nil {
		t.Fatal(err)
	}
	if got, want := slices.Sorted(maps.Keys(c.files)), slices.Sorted(maps.Keys(clientFolderFiles(t))); !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

func TestClientFiles_CaddyfileErrorsNameTheLineAndTheFix(t *testing.T) {
	for line, want := range map[string]string{
		"chat_broadcast_client chat-client":            `unexpected argument "chat-client": the directive takes nothing but a matcher, and a path begins with a slash`,
		"chat_broadcast_client /chat-client/* v1":      `unexpected argument "v1"`,
		"chat_broadcast_client /chat-client/* {\nx\n}": "the directive takes no block",
		"chat_broadcast_client /chat-client":           "the path /chat-client matches itself and nothing below it: write /chat-client/*",
		"chat_broadcast_client /chat-client/":          "write /chat-client/*",
		"chat_broadcast_client /":                      "write /*",
		"chat_broadcast_client @unknown":               "unknown",
	} {
		config := "example.com {\n\t" + line + "\n}\n"
		_, _, err := caddyconfig.GetAdapter("caddyfile").Adapt([]byte(config), map[string]any{"filename": "Caddyfile"})
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v, want %s", line, err, want)
			continue
		}
		if !strings.Contains(err.Error(), "Caddyfile:2") && !strings.Contains(line, "{") && !strings.Contains(line, "@") {
			t.Errorf("%s: got %v, want line 2", line, err)
		}
	}
}
