package main

import (
	"flag"
	"fmt"
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

// playSim plays one seed. A panic of a core is a violation too.
func playSim(seed uint64, opt *simOptions, mut string) (s *sim, violations []string) {
	s = newSim(seed, opt, mut)
	defer func() {
		if r := recover(); r != nil {
			buf := make([]byte, 4096)
			s.violate("panic", "%v\n%s", r, buf[:runtime.Stack(buf, false)])
			violations = s.violations
		}
	}()
	return s, s.run()
}

// shrinkSim switches faults off and makes the world smaller as long as the seed still fails.
func shrinkSim(seed uint64, mut string) (simOptions, *sim) {
	s, _ := playSim(seed, nil, mut)
	opt := s.opt
	try := func(change func(*simOptions)) bool {
		smaller := opt
		change(&smaller)
		if smaller == opt {
			return false
		}
		t, violations := playSim(seed, &smaller, mut)
		if len(violations) == 0 {
			return false
		}
		opt, s = smaller, t
		return true
	}
	flags := reflect.TypeFor[simOptions]()
	for again := true; again; {
		again = false
		for i := range flags.NumField() {
			if flags.Field(i).Type.Kind() == reflect.Bool {
				again = try(func(o *simOptions) { reflect.ValueOf(o).Elem().Field(i).SetBool(false) }) || again
			}
		}
		again = try(func(o *simOptions) { o.Sends = max(1, o.Sends/2) }) || again
		again = try(func(o *simOptions) { o.Sends = max(1, o.Sends-1) }) || again
		again = try(func(o *simOptions) { o.Users = max(1, o.Users-1) }) || again
		again = try(func(o *simOptions) { o.Devices = max(1, o.Devices-1) }) || again
		again = try(func(o *simOptions) { o.Edges = max(1, o.Edges-1) }) || again
		again = try(func(o *simOptions) { o.Shards = max(1, o.Shards-1) }) || again
	}
	return opt, s
}

// TestSimulation is P2, P3, P4, P5 and P8 under faults; see sim_world_test.go.
func TestSimulation(t *testing.T) {
	if *simSeed != 0 {
		s, violations := playSim(*simSeed, nil, "")
		t.Logf("options %+v\n%s\n%s", s.opt, strings.Join(s.trace, "\n"), s.truth)
		if len(violations) > 0 {
			t.Fatal(strings.Join(violations, "\n"))
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
				s, violations := playSim(seed, nil, "")
				if len(violations) > 0 {
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
				for _, line := range s.trace {
					if strings.Contains(line, "crashes") {
						crashes.Add(1)
					}
				}
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
		opt, s := shrinkSim(seed, "")
		t.Errorf("seed %d fails; smallest world %+v\n%s\n\n%s\n\nreplay: go test -run 'TestSimulation$' . -sim.seed=%d", seed, opt,
			strings.Join(s.trace, "\n"), strings.Join(s.violations, "\n"), seed)
	}
}

// mutNoSpan breaks the rule twice, since the edge's span of 64 catches a client that breaks it alone.
const mutNoSpan = "new numbers before the old have ended, at a careless edge"

// simMutations break one rule of DESIGN.md §4 or §5 each.
var simMutations = []string{
	// Durability and the log.
	"answered before it is durable",
	"the log is replayed from its end",
	"the log is trimmed by what was taken",
	"commit done before it is durable",
	"positions follow the clock alone",
	"later sends survive a failed one",
	// Numbers and duplicates.
	"no window rows",
	"window before mailbox",
	"a bit means seen",
	"the block counter is not raised",
	"every send gets a new message id",
	"a client counts on by itself from one",
	mutNoSpan,
	"a resend gets a new number",
	"a refusal does not hold the stream back",
	"a refused send is given up and counted as sent",
	"the client shows a known id again",
	// Delivery and the mailbox.
	"devices from an older cache",
	"the first device is no heir",
	"mailbox rows not written",
	"the mailbox is popped by reading",
	"no notice after a mailbox write",
	"no time-out",
	"a push goes to any session of the edge",
	// Receipts.
	"no outstanding rows",
	"receipts are announced and not stored",
}

// TestSimulationFindsMutations breaks each rule on purpose and expects a violation within some seeds.
func TestSimulationFindsMutations(t *testing.T) {
	const maxSeeds = 3000
	for _, mut := range simMutations {
		t.Run(strings.ReplaceAll(mut, " ", "_"), func(t *testing.T) {
			for seed := uint64(1); seed <= maxSeeds; seed++ {
				if _, violations := playSim(seed, nil, mut); len(violations) > 0 {
					t.Logf("seed %d: %s", seed, strings.SplitN(violations[0], "\n", 2)[0])
					return
				}
			}
			t.Errorf("no violation in %d seeds", maxSeeds)
		})
	}
}

// TestSimulationIsDeterministic plays a seed twice.
func TestSimulationIsDeterministic(t *testing.T) {
	for seed := uint64(1); seed <= 5; seed++ {
		a, _ := playSim(seed, nil, "")
		b, _ := playSim(seed, nil, "")
		if x, y := fmt.Sprint(a.trace), fmt.Sprint(b.trace); x != y {
			t.Fatalf("seed %d has two transcripts", seed)
		}
	}
}
