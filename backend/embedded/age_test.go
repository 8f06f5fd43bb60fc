package embedded

import (
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"millrace/protocol"
)

const (
	testDay  = 24 * time.Hour
	testYear = 365 * testDay
	// testMs is when tests with a clock of their own begin: in 2023.
	testMs = 1_692_841_226_860
)

func TestAgeClock(t *testing.T) {
	day := testDay.Milliseconds()
	type look struct {
		wall int64 // in days since the first
		ran  time.Duration
	}
	for name, c := range map[string]struct {
		looks []look
		age   time.Duration
		want  int64 // before(age) in days since the first look; the past before it but for a day is a gap
	}{
		"all of it lived":              {[]look{{0, 0}, {100, 100 * testDay}}, 30 * testDay, 70},
		"a day off counts":             {[]look{{0, 0}, {100, 100 * testDay}, {101, 0}}, 30 * testDay, 71},
		"a jump counts for a day":      {[]look{{0, 0}, {100, 100 * testDay}, {1100, 0}}, 30 * testDay, 71},
		"a jump while it runs":         {[]look{{0, 0}, {100, 90 * testDay}}, 30 * testDay, 61},
		"and before the jump":          {[]look{{0, 0}, {100, 100 * testDay}, {1100, 0}, {1110, 10 * testDay}}, 30 * testDay, 81},
		"and after it":                 {[]look{{0, 0}, {100, 100 * testDay}, {1100, 0}, {1140, 40 * testDay}}, 30 * testDay, 1110},
		"set back, a gap is shortened": {[]look{{0, 0}, {100, 100 * testDay}, {1100, 0}, {500, 0}, {510, 10 * testDay}}, 30 * testDay, 81},
		"set back before the gap":      {[]look{{0, 0}, {100, 100 * testDay}, {1100, 0}, {90, 0}, {100, 10 * testDay}}, 30 * testDay, 70},
		"nothing is so old":            {[]look{{0, 0}, {10, 10 * testDay}}, 9 * testYear, -testMs / day},
	} {
		t.Run(name, func(t *testing.T) {
			var clock ageClock
			for _, l := range c.looks {
				clock.observe(testMs+l.wall*day, l.ran)
			}
			want := max(testMs+c.want*day, 0)
			if name == "nothing is so old" {
				want = 0
			}
			if got := clock.before(c.age); got != want {
				t.Errorf("before %v: day %.3f, want %d; gaps %v", c.age, float64(got-testMs)/float64(day), c.want, clock.gaps)
			}
		})
	}
}

// TestAgeClockNeverOverestimates writes rows while the wall clock is moved about at random, the process stopped and started, and
// compares what is taken for old with the time that really passed.
func TestAgeClockNeverOverestimates(t *testing.T) {
	type row struct{ dated, written, jumps int64 }
	for seed := range uint64(60) {
		rng := rand.New(rand.NewPCG(seed, 0))
		var clock ageClock
		var rows []row
		trueMs, wallMs, jumps := int64(0), int64(testMs), int64(0)
		span := func(max time.Duration) int64 { return rng.Int64N(max.Milliseconds()) }
		for range 400 {
			ran := span(30 * testDay)
			switch rng.IntN(10) {
			case 0: // a wrong clock, one way or the other
				wallMs += span(20*testYear) - (10 * testYear).Milliseconds()
				jumps++
				ran = 0
			case 1: // the process is down
				trueMs += ran
				wallMs += ran
				jumps++
				ran = 0
				stored, err := decodeAgeClock(appendAgeClock(nil, &clock))
				if err != nil {
					t.Fatal(err)
				}
				clock = stored
			case 2: // both at once
				trueMs += ran
				wallMs += ran + span(5*testYear)
				jumps++
				ran = 0
			default:
				trueMs += ran
				wallMs += ran
			}
			wallMs = max(wallMs, 0)
			clock.observe(wallMs, time.Duration(ran)*time.Millisecond)
			if len(clock.gaps) > maxGaps {
				t.Fatalf("seed %d: %d gaps", seed, len(clock.gaps))
			}
			for _, age := range []time.Duration{testYear, 2 * testYear} {
				before := clock.before(age)
				for _, r := range rows {
					if least := age.Milliseconds() - (jumps-r.jumps)*maxSkip.Milliseconds(); r.dated < before && trueMs-r.written < least {
						t.Fatalf("seed %d: a row of %v is taken for %v old; gaps %v", seed,
							time.Duration(trueMs-r.written)*time.Millisecond, age, clock.gaps)
					}
				}
			}
			clock.forget(clock.before(2 * testYear))
			// A row is dated by the clock, or later: positions never go back.
			rows = append(rows, row{min(wallMs, protocol.MaxTimestampMillis) + span(testYear)*int64(rng.IntN(2)), trueMs, jumps})
		}
	}
}

func TestAgeClockForgetsAndJoins(t *testing.T) {
	clock := ageClock{seenMs: 1}
	wall := int64(testMs)
	for i := range 3 * maxGaps {
		wall += (10 * testDay).Milliseconds()
		clock.observe(wall, time.Duration(1+i%7)*testDay)
	}
	if len(clock.gaps) != maxGaps {
		t.Fatalf("%d gaps, want the limit", len(clock.gaps))
	}
	for i, g := range clock.gaps {
		if g.toMs <= g.fromMs || i > 0 && g.fromMs <= clock.gaps[i-1].toMs || g.toMs > clock.seenMs {
			t.Fatalf("gap %d of %v", i, clock.gaps)
		}
	}
	before := clock.before(testYear / 4)
	clock.forget(before)
	if n := len(clock.gaps); n == 0 || n == maxGaps || clock.before(testYear/4) != before {
		t.Fatalf("%d gaps are left; a quarter of a year ago is %d, was %d", n, clock.before(testYear/4), before)
	}
	// The last date that can be stored stops the clock, and nothing grows older.
	clock.observe(protocol.MaxTimestampMillis+(10*testYear).Milliseconds(), 10*testYear)
	last := fmt.Sprint(clock)
	clock.observe(protocol.MaxTimestampMillis+(90*testYear).Milliseconds(), 80*testYear)
	if fmt.Sprint(clock) != last {
		t.Fatalf("the clock goes on after the last date: %v, was %s", clock, last)
	}
}
