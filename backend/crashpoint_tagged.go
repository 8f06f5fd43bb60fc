//go:build crashpoints

package backend

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
)

// The armed crash point, read once from MILLRACE_CRASH=name:n. An empty name arms none.
var (
	crashName string
	crashLeft atomic.Int64
)

func init() {
	value := os.Getenv("MILLRACE_CRASH")
	if value == "" {
		return
	}
	name, count, ok := strings.Cut(value, ":")
	n, err := strconv.ParseInt(count, 10, 64)
	if !ok || name == "" || err != nil || n < 1 {
		panic(fmt.Sprintf("MILLRACE_CRASH=%q is not name:n with n of at least 1", value))
	}
	crashName = name
	crashLeft.Store(n)
}

// CrashPoint kills the process with SIGKILL at the n-th passing of the point that MILLRACE_CRASH names, so that no
// deferred function, flush or signal handler softens the crash. The caller never goes on after it.
func CrashPoint(name string) {
	if name != crashName || crashLeft.Add(-1) != 0 {
		return
	}
	if err := syscall.Kill(os.Getpid(), syscall.SIGKILL); err != nil {
		panic(fmt.Sprintf("crash point %s: %v", name, err))
	}
	select {}
}
