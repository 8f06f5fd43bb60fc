package router

import (
	"hash/maphash"
	"sync"

	"millrace/protocol"
)

// shard is one part of the table: an index over records in an arena.
type shard struct {
	mu sync.RWMutex

	// Guarded by mu.
	index   index
	arena   arena
	devices devices
	counts  counts
}

// counts is what a shard reports. The first two are levels, the others only grow.
type counts struct {
	users, routes                                uint64
	binds, staleBinds, replaced                  uint64
	unbinds, staleUnbinds, staleStates, rebuilds uint64
	bytes                                        uint64 // filled by Table.total
}

// text is a name as its caller has it; comparing it copies nothing.
type text interface{ string | []byte }

// place is where the route of (user, device) is.
type place struct {
	slot    int  // valid if found
	found   bool // the route exists
	sibling bool // the user has a route of another device
}

// find looks for a route. It always walks to the end of the probe sequence, where the user's other
// devices are.
func find[U, D text](s *shard, h uint64, user U, device D) (p place) {
	x := &s.index
	if len(x.tags) == 0 {
		return p
	}
	tag := tagOf(h)
	for i := x.home(h); x.tags[i] != tagEmpty; i = x.after(i) {
		if x.tags[i] != tag {
			continue
		}
		r := s.arena.at(x.refs[i])
		switch {
		case string(r.user()) != string(user):
		case deviceIs(&s.devices, r, device):
			p.slot, p.found = i, true
		default:
			p.sibling = true
		}
	}
	return p
}

func deviceIs[D text](d *devices, r record, device D) bool {
	if code := r.device(); code != deviceInRecord {
		return d.names[code] == string(device)
	}
	return string(r.ownDevice()) == string(device)
}

func (s *shard) appendRoutes(dst []protocol.Route, h uint64, user string) []protocol.Route {
	x := &s.index
	if len(x.tags) == 0 {
		return dst
	}
	tag := tagOf(h)
	for i := x.home(h); x.tags[i] != tagEmpty; i = x.after(i) {
		if x.tags[i] != tag {
			continue
		}
		r := s.arena.at(x.refs[i])
		if string(r.user()) != user {
			continue
		}
		dst = append(dst, protocol.Route{Device: s.deviceName(r), Session: r.session(), Live: r.live()})
	}
	return dst
}

func (s *shard) deviceName(r record) string {
	if code := r.device(); code != deviceInRecord {
		return s.devices.names[code]
	}
	return string(r.ownDevice())
}

// insert adds a route that is not there.
func (s *shard) insert(seed maphash.Seed, h uint64, user, device string, session protocol.Session, login uint64, newUser bool) {
	if s.index.full() {
		s.reindex(seed, slotsFor(s.index.live+1))
	}
	code := s.devices.acquire(device)
	off := s.arena.alloc(recordBytes(user, device, code))
	r := s.arena.at(off)
	r.setNames(user, device, code)
	r.setSession(session)
	r.setLogin(login)
	s.index.insert(h, off)
	s.counts.routes++
	if newUser {
		s.counts.users++
	}
}

// remove deletes the route at a slot.
func (s *shard) remove(seed maphash.Seed, slot int, lastOfUser bool) {
	off := s.index.refs[slot]
	r := s.arena.at(off)
	s.devices.release(r.device())
	s.arena.release(off, r.bytes())
	s.index.remove(slot)
	s.counts.routes--
	if lastOfUser {
		s.counts.users--
	}
	if s.arena.wasteful() {
		s.compact(seed)
	}
}

// reindex builds the index anew, without the marks of deleted routes. Hashes are not kept (8 B a
// route) but computed again.
func (s *shard) reindex(seed maphash.Seed, slots int) {
	old := s.index
	s.index = newIndex(slots)
	for i, tag := range old.tags {
		if tag >= tagFirst {
			off := old.refs[i]
			s.index.insert(maphash.Bytes(seed, s.arena.at(off).user()), off)
		}
	}
	s.counts.rebuilds++
}

// compact moves every record to a new arena and builds an index of the right size. At least as many bytes
// were freed since the last time as are moved now, so a removal pays for moving one record.
func (s *shard) compact(seed maphash.Seed) {
	old, from := s.index, s.arena
	s.arena = arena{}
	s.index = newIndex(slotsFor(old.live))
	for i, tag := range old.tags {
		if tag < tagFirst {
			continue
		}
		r := from.at(old.refs[i])
		n := r.bytes()
		off := s.arena.alloc(n)
		copy(s.arena.at(off), r[:n])
		s.index.insert(maphash.Bytes(seed, r.user()), off)
	}
	s.counts.rebuilds++
}
