package backend

import (
	"testing"
	"time"

	"millrace/protocol"
)

// TestDates: no receipt is dated before one of another shard, nor before a record that another shard has taken. A client
// compares the dates of both, and asks for what changed since the newest.
func TestDates(t *testing.T) {
	var s Server
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC).UnixMilli()
	record := protocol.NextPosition(0, now+time.Hour.Milliseconds()) // the wall clock was set forward
	for _, step := range []struct{ given, want int64 }{
		{now, now},
		{protocol.PositionMillis(record), now + time.Hour.Milliseconds()},
		{now + 1, now + time.Hour.Milliseconds()}, // another shard, by its monotonic clock
		{now + 2*time.Hour.Milliseconds(), now + 2*time.Hour.Milliseconds()},
	} {
		if got := s.date(step.given); got != step.want {
			t.Errorf("date(%d) = %d, want %d", step.given, got, step.want)
		}
	}
}
