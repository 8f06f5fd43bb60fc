package main

import "testing"

func TestFootprint(t *testing.T) {
	var f footprint
	if told := f.perConnection(1000); told != 0 {
		t.Errorf("%v before the server serves", told)
	}
	f.begin()
	if f.empty.Load() == 0 {
		t.Fatal("this system does not tell what is resident")
	}
	const each, connections = 64 << 10, 256
	held := make([]byte, each*connections)
	for i := 0; i < len(held); i += 4096 {
		held[i] = 1
	}
	told := f.perConnection(connections)
	// Other tests' garbage comes and goes in the same process.
	if told < each/2 || told > 4*each {
		t.Errorf("%v bytes a connection, want about %d", told, each)
	}
	if told := f.perConnection(footprintLeast - 1); told != 0 {
		t.Errorf("%v with hardly any connections", told)
	}
	if held[0] != 1 {
		t.Fatal("the memory is gone")
	}
}
