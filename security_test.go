package main

import (
	"go/ast"
	"os"
	"regexp"
	"strings"
	"testing"
)

// TestSecurityDocument: edge/SECURITY.md has every row that it must have, and each test that it names exists.
func TestSecurityDocument(t *testing.T) {
	content, err := os.ReadFile("edge/SECURITY.md")
	if err != nil {
		t.Fatal(err)
	}
	tests := make(map[string]bool)
	for _, f := range sourceFiles(t) {
		for _, decl := range f.syntax.Decls {
			if fn, ok := decl.(*ast.FuncDecl); ok && f.test && fn.Recv == nil {
				tests[f.path+" "+fn.Name.Name] = true
			}
		}
	}
	reference := regexp.MustCompile("`([a-z_/]+_test\\.go (?:Test|Fuzz)[A-Za-z0-9_]+)`")
	row := regexp.MustCompile(`(?m)^\| *([FS][0-9]+)? *\|.*$`)
	rows := make(map[string]bool)
	for _, line := range row.FindAllStringSubmatch(string(content), -1) {
		rows[line[1]] = true
		if !reference.MatchString(line[0]) {
			t.Errorf("no test proves %.60s", line[0])
		}
	}
	for _, want := range strings.Fields("F28 F29 F30 F31 F32 F33 S1 S2 S3 S4 S5 S6 S7 S8 S9 S11 S16") {
		if !rows[want] {
			t.Errorf("row %s is missing", want)
		}
	}
	named := reference.FindAllStringSubmatch(string(content), -1)
	for _, match := range named {
		if !tests[match[1]] {
			t.Errorf("no such test: %s", match[1])
		}
	}
	// A name that stands outside a reference is checked by nobody, but for this test's own.
	if all := regexp.MustCompile(`\b(?:Test|Fuzz)[A-Z]\w+`).FindAllString(string(content), -1); len(all) != len(named)+1 {
		t.Errorf("%d tests are named, %d with their file", len(all), len(named))
	}
}
