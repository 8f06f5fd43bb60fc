//go:build !crashpoints

package backend

// CrashPoint marks a place where a crash is worth trying. In normal builds it is empty and compiles away. Built
// with the tag crashpoints, the process kills itself (SIGKILL) when it passes the point that MILLRACE_CRASH names, "name:n" for the n-th time.
func CrashPoint(name string) {}
