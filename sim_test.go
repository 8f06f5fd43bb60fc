package main

import (
	"flag"
	"fmt"
	"maps"
	"reflect"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
)

var (
	simSeeds = flag.Uint64("sim.seeds", 2000, "how many seeds TestSimulation plays")
	simSeed  = flag.Uint64("sim.seed", 0, "play only this seed and print its transcript")
)

// play plays a plan. A panic of a core is a violation too.
func (p simPlan) play() (s *sim) {
	s = newSim(p)
	defer func() {
		if r := recover(); r != nil {
			buf := make([]byte, 4096)
			s.violate("panic", "%v\n%s", r, buf[:runtime.Stack(buf, false)])
		}
	}()
	s.run()
	return s
}

// shrink switches faults off, makes the world smaller, and leaves out sends and faults one by one, as long as the
// same promise is broken. It returns the smallest world, with its transcript.
func (p simPlan) shrink() *sim {
	s := p.play()
	broken, opt := s.broken, s.opt
	p.opt, p.skip = &opt, map[int]bool{}
	try := func(smaller simPlan) bool {
		if t := smaller.play(); t.broken != broken {
			return false
		}
		p = smaller
		return true
	}
	option := func(change func(*simOptions)) bool {
		smaller := *p.opt
		change(&smaller)
		q := p
		q.opt = &smaller
		return smaller != *p.opt && try(q)
	}
	flags := reflect.TypeFor[simOptions]()
	for again := true; again; {
		again = false
		for i := range flags.NumField() {
			if flags.Field(i).Type.Kind() == reflect.Bool {
				again = option(func(o *simOptions) { reflect.ValueOf(o).Elem().Field(i).SetBool(false) }) || again
			}
		}
		again = option(func(o *simOptions) { o.Sends = max(1, o.Sends/2) }) || again
		again = option(func(o *simOptions) { o.Users = max(1, o.Users-1) }) || again
		again = option(func(o *simOptions) { o.Devices = max(1, o.Devices-1) }) || again
		again = option(func(o *simOptions) { o.Edges = max(1, o.Edges-1) }) || again
		again = option(func(o *simOptions) { o.Shards = max(1, o.Shards-1) }) || again
	}
	for size := s.planned; size > 0; size /= 2 {
		for from := 0; from < s.planned; from += size {
			q := p
			q.skip = maps.Clone(p.skip)
			for n := from; n < from+size; n++ {
				q.skip[n] = true
			}
			try(q)
		}
	}
	p.tracing = true
	return p.play()
}

// TestSimulation is P2, P3, P4, P5 and P8 under faults; see sim_world_test.go.
func TestSimulation(t *testing.T) {
	if *simSeed != 0 {
		s := simPlan{seed: *simSeed, tracing: true}.play()
		t.Logf("options %+v\n%s\n%s", s.opt, strings.Join(s.trace, "\n"), s.truth)
		if len(s.violations) > 0 {
			t.Fatal(strings.Join(s.violations, "\n"))
		}
		return
	}
	var next, answered, shown, crashes atomic.Uint64
	var mu sync.Mutex
	var failed []uint64
	var wait sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		wait.Go(func() {
			for {
				seed := next.Add(1)
				if seed > *simSeeds {
					return
				}
				s := simPlan{seed: seed}.play()
				if len(s.violations) > 0 {
					mu.Lock()
					failed = append(failed, seed)
					mu.Unlock()
				}
				for _, m := range s.truth.order {
					if m.answered {
						answered.Add(1)
					}
				}
				shown.Add(uint64(len(s.truth.shownBy)))
				crashes.Add(uint64(s.crashes))
			}
		})
	}
	wait.Wait()
	t.Logf("%d seeds: %d messages answered, %d times shown, %d crashes", *simSeeds, answered.Load(), shown.Load(), crashes.Load())
	for i, seed := range failed {
		if i == 3 {
			t.Errorf("and %d seeds more", len(failed)-i)
			break
		}
		s := simPlan{seed: seed}.shrink()
		t.Errorf("seed %d fails; smallest world %+v\n%s\n\n%s\n\nreplay: go test -run 'TestSimulation$' . -sim.seed=%d", seed, s.opt,
			strings.Join(s.trace, "\n"), strings.Join(s.violations, "\n"), seed)
	}
}

// mutNoSpan breaks the rule twice, since the edge's span of 64 catches a client that breaks it alone.
const mutNoSpan = "new numbers before the old have ended, at a careless edge"

// simMutations break one rule of DESIGN.md §4 or §5 each. Where a rule matters rarely, the world makes it matter more often.
var simMutations = []struct {
	name  string
	world func(*simOptions)
}{
	// Durability and the log.
	{name: "answered before it is durable"},
	{name: "the log is replayed from its end"},
	{name: "the log is trimmed by what was taken"},
	{name: "commit done before it is durable"},
	{name: "positions follow the clock alone"},
	{name: "later sends survive a failed one"},
	// Numbers and duplicates.
	{name: "no window rows"},
	{name: "window before mailbox"},
	{name: "a bit means seen"},
	{name: "the block counter is not raised"},
	{name: "every send gets a new message id"},
	{name: "a client counts on by itself from one"},
	{name: mutNoSpan},
	{name: "a resend gets a new number"},
	{name: "a refusal does not hold the stream back"},
	{name: "a refused send is given up and counted as sent"},
	{name: "mailbox_full does not stick", world: func(o *simOptions) {
		o.SmallMailboxes, o.Disconnects, o.Slow, o.Restores, o.Clones = true, true, true, false, false
		o.Users, o.Devices, o.Sends = 2, 1, 80
	}},
	{name: "the client shows a known id again"},
	{name: "a late owner's windows replace newer ones", world: func(o *simOptions) { o.LateOwners = true }},
	// Delivery and the mailbox.
	{name: "devices from an older cache"},
	{name: "the first device is no heir"},
	{name: "a ninth device is registered", world: func(o *simOptions) { o.ManyDevices = true }},
	{name: "mailbox rows not written"},
	{name: "the mailbox is popped by reading"},
	{name: "no notice after a mailbox write"},
	{name: "no time-out"},
	{name: "a push goes to any session of the edge"},
	{name: "acknowledgements are forgotten at once"},
	// Receipts.
	{name: "no outstanding rows"},
	{name: "receipts are announced and not stored"},
	{name: "receipts are dated by the clock alone", world: func(o *simOptions) {
		o.OneServer, o.ClockSteps, o.Crashes, o.Restores, o.Clones, o.LateOwners = true, true, true, false, false, false
	}},
}

// TestSimulationFindsMutations breaks each rule on purpose and expects a violation within some seeds.
func TestSimulationFindsMutations(t *testing.T) {
	const maxSeeds = 3000
	for _, mut := range simMutations {
		t.Run(strings.ReplaceAll(mut.name, " ", "_"), func(t *testing.T) {
			for seed := uint64(1); seed <= maxSeeds; seed++ {
				p := simPlan{seed: seed, mut: mut.name, world: mut.world}
				s := p.play()
				if len(s.violations) == 0 {
					continue
				}
				t.Logf("seed %d: %s", seed, strings.SplitN(s.violations[0], "\n", 2)[0])
				p.mut = ""
				if s := p.play(); len(s.violations) > 0 {
					t.Errorf("seed %d fails without the mutation too: %s", seed, s.violations[0])
				}
				return
			}
			t.Errorf("no violation in %d seeds", maxSeeds)
		})
	}
}

// TestSimulationIsDeterministic plays a seed twice.
func TestSimulationIsDeterministic(t *testing.T) {
	for seed := uint64(1); seed <= 5; seed++ {
		p := simPlan{seed: seed, tracing: true}
		a, b := p.play(), p.play()
		if x, y := fmt.Sprint(a.trace), fmt.Sprint(b.trace); x != y {
			t.Fatalf("seed %d has two transcripts", seed)
		}
	}
}
