package main

import (
	"io"
	"log/slog"
	"os"
	"slices"

	"golang.org/x/term"
)

// secretAttrs are keys whose values are never written, whoever logs them: what may be read in a log must not
// let anyone in or show what people write.
var secretAttrs = []string{"token", "secret", "authorization", "content"}

// newLogger logs lines of cfg.Level and above to w, as text or JSON. Both quote control characters.
func newLogger(w io.Writer, cfg LogConfig) *slog.Logger {
	options := &slog.HandlerOptions{Level: logLevel(cfg.Level), ReplaceAttr: redact}
	if cfg.Format == "json" || cfg.Format == "auto" && !isTerminal(w) {
		return slog.New(slog.NewJSONHandler(w, options))
	}
	return slog.New(slog.NewTextHandler(w, options))
}

func redact(_ []string, a slog.Attr) slog.Attr {
	if slices.Contains(secretAttrs, a.Key) {
		return slog.String(a.Key, "[redacted]")
	}
	return a
}

// logLevel expects one of the settings table's choices.
func logLevel(name string) (level slog.Level) {
	if err := level.UnmarshalText([]byte(name)); err != nil {
		panic("log level was not validated: " + name)
	}
	return level
}

func isTerminal(stream any) bool {
	f, ok := stream.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}
