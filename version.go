package main

import (
	"fmt"
	"runtime"
	"runtime/debug"
)

// buildVersion says which program this is, as far as the Go toolchain recorded it: no build flags are needed.
type buildVersion struct {
	version string // module version, with Go's pseudo-version between tags; "devel" when unknown
	commit  string // revision with "-dirty" for uncommitted changes; "unknown" outside a checkout
	goVers  string
}

func readBuildVersion() buildVersion {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return buildVersion{"devel", "unknown", runtime.Version()}
	}
	return versionOf(info)
}

func versionOf(info *debug.BuildInfo) buildVersion {
	v := buildVersion{info.Main.Version, "unknown", info.GoVersion}
	if v.version == "" || v.version == "(devel)" {
		v.version = "devel"
	}
	dirty := ""
	for _, s := range info.Settings {
		switch {
		case s.Key == "vcs.revision":
			v.commit = s.Value
		case s.Key == "vcs.modified" && s.Value == "true":
			dirty = "-dirty"
		}
	}
	if v.commit != "unknown" {
		v.commit += dirty
	}
	return v
}

func (v buildVersion) String() string {
	return fmt.Sprintf("millrace %s\ncommit %s\n%s %s/%s", v.version, v.commit, v.goVers, runtime.GOOS, runtime.GOARCH)
}
