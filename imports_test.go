package main

import (
	"bytes"
	"go/ast"
	"go/format"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// layout is the import table: which packages of ours each package may import, in its tests too. Islands
// do not know each other; the root joins them. A package that is not in the table is a mistake.
var layout = map[string][]string{
	".":                   {"*"},
	"protocol":            {},
	"protocol/token":      {},
	"protocol/client":     {"protocol"},
	"tuning":              {},
	"edge":                {"protocol", "protocol/token"},
	"router":              {"protocol"},
	"backend":             {"protocol"},
	"backend/api":         {"backend", "protocol", "protocol/token"},
	"backend/embedded":    {"backend", "backend/backendtest", "protocol"},
	"backend/pulsar":      {"backend", "backend/backendtest", "protocol"},
	"backend/cassandra":   {"backend", "backend/backendtest", "protocol"},
	"backend/backendtest": {"backend", "protocol"},
	"loadtest":            {"protocol", "loadtest/checker"},
	"loadtest/checker":    {},
}

// testOnly are packages that only tests may import.
var testOnly = []string{"backend/backendtest"}

// homes says where another's module may be imported, and in how many files of a folder at most (0: any
// number). It keeps each of them replaceable.
var homes = []struct {
	module  string
	folders []string
	files   int
}{
	{"github.com/panjf2000/gnet/v2", []string{"edge", "loadtest"}, 1},
	{"github.com/tidwall/redcon", []string{"router"}, 0},
	{"github.com/cockroachdb/pebble/v2", []string{"backend/embedded"}, 0},
	{"github.com/apache/pulsar-client-go", []string{"backend/pulsar"}, 0},
	{"github.com/gocql/gocql", []string{"backend/cassandra"}, 0},
	{"github.com/golang-jwt/jwt/v5", []string{"protocol/token"}, 0},
	{"github.com/prometheus/client_golang", []string{"."}, 1},
	{"github.com/alecthomas/kong", []string{"."}, 0},
	{"github.com/pelletier/go-toml/v2", []string{"."}, 1},
}

// goFile is one parsed file of the project.
type goFile struct {
	path    string // from the root, with slashes
	folder  string
	test    bool
	source  []byte
	syntax  *ast.File
	imports []string
}

// sourceFiles parses every Go file of the project.
func sourceFiles(t *testing.T) []goFile {
	t.Helper()
	var files []goFile
	for _, name := range projectFiles(t) {
		if path.Ext(name) != ".go" || strings.Contains(name, "testdata/") {
			continue
		}
		source, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		syntax, err := parser.ParseFile(token.NewFileSet(), name, source, parser.ParseComments|parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		f := goFile{path: name, folder: path.Dir(name), test: strings.HasSuffix(name, "_test.go"), source: source, syntax: syntax}
		for _, spec := range syntax.Imports {
			imported, err := strconv.Unquote(spec.Path.Value)
			if err != nil {
				t.Fatal(err)
			}
			f.imports = append(f.imports, imported)
		}
		files = append(files, f)
	}
	if len(files) < 10 {
		t.Fatalf("found only %d Go files: not run in the root of the project?", len(files))
	}
	return files
}

// projectFiles lists what belongs to the project: everything but what .gitignore names and git's own.
func projectFiles(t *testing.T) []string {
	t.Helper()
	ignored := ignorePatterns(t)
	var files []string
	err := filepath.WalkDir(".", func(name string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name = filepath.ToSlash(name)
		switch {
		case name == ".":
			return nil
		case name == ".git" || ignored(name):
			if entry.IsDir() {
				return fs.SkipDir
			}
		case entry.Type().IsRegular():
			files = append(files, name)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return files
}

// ignorePatterns understands what .gitignore uses: /name, /name/, and *.suffix.
func ignorePatterns(t *testing.T) func(name string) bool {
	t.Helper()
	content, err := os.ReadFile(".gitignore")
	if err != nil {
		t.Fatal(err)
	}
	patterns := strings.Fields(string(content))
	return func(name string) bool {
		for _, p := range patterns {
			subject := path.Base(name)
			if rooted, ok := strings.CutPrefix(p, "/"); ok {
				p, subject = strings.TrimSuffix(rooted, "/"), name
			}
			if match, err := path.Match(p, subject); err != nil || match {
				return true
			}
		}
		return false
	}
}

func TestImportTable(t *testing.T) {
	for _, f := range sourceFiles(t) {
		allowed, known := layout[f.folder]
		if !known {
			t.Errorf("%s: folder %s is not in the layout", f.path, f.folder)
			continue
		}
		for _, imported := range f.imports {
			name, ours := strings.CutPrefix(imported, "millrace/")
			switch {
			case !ours && imported != "millrace":
			case name == f.folder && f.test: // an external test of its own package
			case !slices.Contains(allowed, name) && !slices.Contains(allowed, "*"):
				t.Errorf("%s imports %s: %s may import %v", f.path, imported, f.folder, allowed)
			case slices.Contains(testOnly, name) && !f.test:
				t.Errorf("%s imports %s, which is for tests", f.path, imported)
			}
		}
	}
}

func TestForeignModulesStayAtHome(t *testing.T) {
	for _, home := range homes {
		importers := make(map[string][]string) // folder → files
		for _, f := range sourceFiles(t) {
			if slices.ContainsFunc(f.imports, func(i string) bool { return i == home.module || strings.HasPrefix(i, home.module+"/") }) {
				if !slices.Contains(home.folders, f.folder) {
					t.Errorf("%s imports %s, which belongs to %v", f.path, home.module, home.folders)
				} else if !f.test {
					importers[f.folder] = append(importers[f.folder], f.path)
				}
			}
		}
		for _, files := range importers {
			if home.files > 0 && len(files) > home.files {
				t.Errorf("%s is imported in %v: at most %d file", home.module, files, home.files)
			}
		}
	}
}

// TestPackagesAreDocumented: each package says what it is, in one place.
func TestPackagesAreDocumented(t *testing.T) {
	docs := make(map[string][]string)
	packages := make(map[string]bool)
	for _, f := range sourceFiles(t) {
		if f.test {
			continue
		}
		packages[f.folder] = true
		if f.syntax.Doc != nil {
			docs[f.folder] = append(docs[f.folder], f.path)
		}
	}
	for folder := range packages {
		if len(docs[folder]) != 1 {
			t.Errorf("package %s has %d package comments %v, want one", folder, len(docs[folder]), docs[folder])
		}
	}
}

func TestFormat(t *testing.T) {
	for _, f := range sourceFiles(t) {
		formatted, err := format.Source(f.source)
		if err != nil {
			t.Errorf("%s: %v", f.path, err)
		} else if !bytes.Equal(formatted, f.source) {
			t.Errorf("%s is not formatted: gofmt -w %s", f.path, f.path)
		}
	}
}

// TestTopLevel: documents and data live in the folder that they describe.
func TestTopLevel(t *testing.T) {
	files := []string{"go.mod", "go.sum", "Makefile", "README.md"}
	folders := []string{"protocol", "edge", "router", "backend", "tuning", "loadtest", "scripts"}
	entries, err := os.ReadDir(".")
	if err != nil {
		t.Fatal(err)
	}
	ignored := ignorePatterns(t)
	for _, e := range entries {
		name := e.Name()
		switch {
		case strings.HasPrefix(name, ".") || ignored(name):
		case e.IsDir() && slices.Contains(folders, name):
		case !e.IsDir() && (slices.Contains(files, name) || path.Ext(name) == ".go"):
		default:
			t.Errorf("%s does not belong at the top level", name)
		}
	}
	for _, name := range files {
		if _, err := os.Stat(name); err != nil {
			t.Error(err)
		}
	}
}

// TestNothingOfThisMachineLeaks looks for what only means something where it was written: home directories, package
// mirrors, notes to oneself.
func TestNothingOfThisMachineLeaks(t *testing.T) {
	leaks := []*regexp.Regexp{
		regexp.MustCompile(`(?:^|[^A-Za-z0-9_.-])/(?:home|root|work|Users|farm)/`),
		regexp.MustCompile(`(?:proxy|sum)\.golang\.org|registry\.npmjs|deb\.debian|pypi\.org|repo1?\.maven|static\.crates`),
		regexp.MustCompile(`\b(?:T[O]DO|F[I]XME)\b`),
	}
	for _, name := range projectFiles(t) {
		if strings.Contains(name, "testdata/") {
			continue
		}
		content, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		for i, line := range bytes.Split(content, []byte("\n")) {
			for _, leak := range leaks {
				if found := leak.Find(line); found != nil {
					t.Errorf("%s:%d: %q", name, i+1, found)
				}
			}
		}
	}
}

// TestDocumentLinks: what a document points at is there.
func TestDocumentLinks(t *testing.T) {
	link := regexp.MustCompile(`\]\(([^)#\s]+)[^)]*\)`)
	found := 0
	for _, name := range projectFiles(t) {
		if path.Ext(name) != ".md" {
			continue
		}
		content, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		for _, match := range link.FindAllSubmatch(content, -1) {
			target := string(match[1])
			if strings.Contains(target, "://") {
				continue
			}
			found++
			if _, err := os.Stat(path.Join(path.Dir(name), target)); err != nil {
				t.Errorf("%s links to %s: %v", name, target, err)
			}
		}
	}
	if found == 0 {
		t.Error("no document links to another")
	}
}
