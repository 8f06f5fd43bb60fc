//go:build !echo

package edge

import (
	"go/build"
	"slices"
	"strings"
	"testing"
)

// TestEchoIsNotBuilt: without the tag no file of the echo path is compiled, and the path does not exist.
func TestEchoIsNotBuilt(t *testing.T) {
	for _, tags := range [][]string{nil, {"echo"}} {
		ctx := build.Default
		ctx.BuildTags = tags
		p, err := ctx.ImportDir(".", 0)
		if err != nil {
			t.Fatal(err)
		}
		if with, without := slices.Contains(p.GoFiles, "echo.go"), slices.Contains(p.GoFiles, "noecho.go"); with != (tags != nil) || without != (tags == nil) {
			t.Errorf("tags %v: built from %v", tags, p.GoFiles)
		}
	}
	b := newBench(t, nil)
	s := b.accept()
	s.receive([]byte(strings.Replace(upgradeText("", ""), "/ws", "/echo", 1)))
	s.wantsStatus(404)
}
