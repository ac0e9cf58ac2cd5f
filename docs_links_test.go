package chatbroadcast

import (
	"maps"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

var (
	fencedBlock  = regexp.MustCompile("(?ms)^ *```.*?^ *```$")
	codeSpan     = regexp.MustCompile("`[^`]*`")
	markdownLink = regexp.MustCompile(`\]\(([^()\s]+)\)`)
	heading      = regexp.MustCompile(`(?m)^#+ +(.*)$`)
	testName     = regexp.MustCompile("`((?:Test|Benchmark|Fuzz)[A-Za-z0-9]*_[A-Za-z0-9]+)`")
)

// anchors returns the anchors that GitHub gives the headings of a document.
func anchors(text string) map[string]bool {
	found := map[string]bool{}
	for _, match := range heading.FindAllStringSubmatch(fencedBlock.ReplaceAllString(text, ""), -1) {
		title := regexp.MustCompile(`\]\([^)]*\)`).ReplaceAllString(match[1], "") // a link's target
		anchor := strings.Map(func(r rune) rune {
			switch {
			case r == ' ':
				return '-'
			case r == '-' || r == '_' || r >= 'a' && r <= 'z' || r >= '0' && r <= '9':
				return r
			}
			return -1
		}, strings.ToLower(strings.TrimSpace(title)))
		found[anchor] = true
	}
	return found
}

func TestDocs_AnchorsAreThoseOfGitHub(t *testing.T) {
	const text = "# A title: with `code_span`, and more\n\n```\n# a comment\n```\n## 501: WebSocket over HTTP/2 or HTTP/3\n### Caddy's [log](x.md)\n"
	want := []string{"501-websocket-over-http2-or-http3", "a-title-with-code_span-and-more", "caddys-log"}
	if got := slices.Sorted(maps.Keys(anchors(text))); !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

// TestDocs_LinksResolve follows every relative link of the documents to its file and heading.
func TestDocs_LinksResolve(t *testing.T) {
	texts := documents(t)
	links := 0
	for document, text := range texts {
		text = codeSpan.ReplaceAllString(fencedBlock.ReplaceAllString(text, ""), "")
		for _, match := range markdownLink.FindAllStringSubmatch(text, -1) {
			if strings.Contains(match[1], ":") { // it has a scheme
				continue
			}
			links++
			target, anchor, hasAnchor := strings.Cut(match[1], "#")
			file := document
			if target != "" {
				file = path.Join(path.Dir(document), target)
			}
			if _, err := os.Stat(filepath.FromSlash(file)); err != nil {
				t.Errorf("%s links to %s, which does not exist", document, match[1])
				continue
			}
			if hasAnchor && !anchors(texts[file])[anchor] {
				t.Errorf("%s links to %s, which has no such heading", document, match[1])
			}
		}
	}
	if links < 100 {
		t.Errorf("found %d links, want at least 100", links)
	}
}

// TestDocs_NamedTestsExist is about the promises: each names the tests that show it.
func TestDocs_NamedTestsExist(t *testing.T) {
	var sources strings.Builder
	err := filepath.WalkDir(".", func(file string, _ os.DirEntry, err error) error {
		if err == nil && strings.HasSuffix(file, "_test.go") {
			sources.WriteString(readDocument(t, file))
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	for document, text := range documents(t) {
		if document == "CHANGELOG.md" || document == "CONTRIBUTING.md" { // they have examples and former names
			continue
		}
		for _, match := range testName.FindAllStringSubmatch(text, -1) {
			if !strings.Contains(sources.String(), "\nfunc "+match[1]+"(") {
				t.Errorf("%s names %s, which does not exist", document, match[1])
			}
		}
	}
}

// TestDocs_PicturesAreShown finds a picture that no document shows.
func TestDocs_PicturesAreShown(t *testing.T) {
	pictures, err := filepath.Glob("docs/*.png")
	if err != nil || len(pictures) == 0 {
		t.Fatalf("got %v, %v, want pictures", pictures, err)
	}
	all := strings.Join(slices.Collect(maps.Values(documents(t))), "\n")
	for _, picture := range pictures {
		if !strings.Contains(all, filepath.Base(picture)+")") {
			t.Errorf("no document shows %s", picture)
		}
	}
}

// TestDocs_README keeps the first document short, and what people run in it.
func TestDocs_README(t *testing.T) {
	text := readDocument(t, "README.md")
	if got, most := strings.Count(text, "\n"), 200; got > most {
		t.Errorf("got %d lines, want at most %d", got, most)
	}
	for _, want := range []string{"\n    go run ./cmd/caddy run --config example.Caddyfile\n", "\n    go test ./...\n", "\n    xcaddy build --with "} {
		if !strings.Contains(text, want) {
			t.Errorf("it has no line %q", want)
		}
	}
}
