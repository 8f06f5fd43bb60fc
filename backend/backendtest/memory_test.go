package backendtest

import "testing"

func TestMemory(t *testing.T) {
	Run(t, func(*testing.T) Storage {
		disk := &Disk{}
		return func(_ *testing.T, o Options) Instance { return disk.Open(o) }
	})
}
