package client

import (
	"fmt"
	"path/filepath"
	"testing"
)

// BenchmarkQueue measures how fast sends are answered by a server that does nothing, with and without a state file.
func BenchmarkQueue(b *testing.B) {
	for _, stored := range []bool{false, true} {
		b.Run(fmt.Sprintf("stored=%v", stored), func(b *testing.B) {
			s := newFakeServer(b)
			url, listener := s.listen()
			defer listener.Close()
			o := s.options("alice")
			o.URL, o.NetDial, o.MaxOutbox = url, nil, LimitMaxOutbox
			if stored {
				o.StatePath = filepath.Join(b.TempDir(), "state")
			}
			c, err := Dial(b.Context(), o)
			if err != nil {
				b.Fatal(err)
			}
			defer c.Close()
			b.ResetTimer()
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					if _, err := c.Send(b.Context(), "bob", "hello"); err != nil {
						b.Error(err)
						return
					}
				}
			})
		})
	}
}
