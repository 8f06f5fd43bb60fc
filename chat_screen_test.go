package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
	"unicode/utf8"
)

func TestPrintable(t *testing.T) {
	for in, want := range map[string]string{
		"hello":                   "hello",
		"Grüße, 世界 👩‍💻 نص":        "Grüße, 世界 👩‍💻 نص",
		"a\nb\tc":                 `a\nb c`,
		"\x1b]0;title\a\x1b[2J":   `\x1b]0;title\x07\x1b[2J`,
		"\u009b31m":               `\u009b31m`,
		"evil\u202etxt.exe\u2066": `evil\u202etxt.exe\u2066`,
		"\x00\x7f":                `\x00\x7f`,
		"\xff\xfe":                `\xff\xfe`,
		"a\u200bb\u2028c\ufeff":   `a\u200bb\u2028c\ufeff`,
		"\U000e0041":              `\U000e0041`,
		"\r\n":                    `\x0d\n`,
	} {
		if got := printable(in); got != want {
			t.Errorf("%q became %q, want %q", in, got, want)
		}
	}
}

func FuzzPrintable(f *testing.F) {
	f.Add("a\x1b[31m\u202e\xff")
	f.Fuzz(func(t *testing.T, in string) {
		out := printable(in)
		if !utf8.ValidString(out) || strings.ContainsFunc(out, hidden) || printable(out) != out {
			t.Fatalf("%q became %q", in, out)
		}
	})
}

func TestLineFormat(t *testing.T) {
	at := time.Date(2026, 1, 2, 3, 4, 0, 0, time.Local) // another day
	for _, c := range []struct {
		l            line
		plain, paint string
	}{
		{line{at: at, mark: markDelivered, who: "to bob", text: "hi"}, "2026-01-02 03:04 ✓✓ to bob: hi", "\x1b[2m2026-01-02 03:04\x1b[0m \x1b[32m✓✓\x1b[0m to bob: hi"},
		{line{at: at, mark: markNone, who: "bob", text: "hi", foreign: true}, "2026-01-02 03:04    bob: hi", "\x1b[2m2026-01-02 03:04\x1b[0m    \x1b[1mbob\x1b[0m: hi"},
		{line{text: "* connected"}, "* connected", "\x1b[2m* connected\x1b[0m"},
	} {
		if got := c.l.format(false); got != c.plain {
			t.Errorf("plain %q, want %q", got, c.plain)
		}
		if got := c.l.format(true); got != c.paint {
			t.Errorf("painted %q, want %q", got, c.paint)
		}
	}
	for _, mark := range []string{markWaiting, markSent, markDelivered, markFailed, markNone} {
		if utf8.RuneCountInString(mark) != 2 {
			t.Errorf("mark %q has not two columns: a changed line would change its length", mark)
		}
	}
}

func TestClockTime(t *testing.T) {
	now := time.Date(2026, 3, 2, 0, 30, 0, 0, time.Local)
	for before, want := range map[time.Duration]string{
		0: "00:30", 29 * time.Minute: "00:01", 31 * time.Minute: "2026-03-01 23:59", 365 * 24 * time.Hour: "2025-03-02 00:30",
	} {
		if got := clockTime(now.Add(-before), now); got != want {
			t.Errorf("%v before: %q, want %q", before, got, want)
		}
	}
}

func TestRowsOf(t *testing.T) {
	for _, c := range []struct {
		text string
		rows int
		sure bool
	}{
		{"", 1, true}, {"short", 1, true}, {strings.Repeat("x", 10), 1, false}, {strings.Repeat("x", 11), 2, true},
		{"\x1b[31m123456789\x1b[0m", 1, true}, {"✓✓ é", 1, true}, {"Привет… ά", 1, true}, {"世界", 1, true}, {"12345世界", 1, true}, {"1234567世界", 1, false}, {"123456世界", 1, false},
	} {
		if rows, sure := rowsOf(c.text, 10); rows != c.rows || sure != c.sure {
			t.Errorf("%q: %d, %v; want %d, %v", c.text, rows, sure, c.rows, c.sure)
		}
	}
}

// emulator is a terminal of which everything can be read, what has scrolled off included.
type emulator struct {
	t             testing.TB
	width, height int
	rows          [][]rune
	top           int // rows[top] is the first row on the screen
	row, column   int
}

func newEmulator(t testing.TB, width, height int) *emulator {
	return &emulator{t: t, width: width, height: height, rows: [][]rune{nil}}
}

func (e *emulator) Write(p []byte) (int, error) {
	for rest := p; len(rest) > 0; {
		r, size := utf8.DecodeRune(rest)
		switch {
		case r == '\r':
			e.column = 0
		case r == '\n':
			e.lineFeed()
		case r == 0x1b:
			size = e.escape(rest)
		case r < 0x20:
			e.t.Fatalf("control character in %q", p)
		default:
			e.put(r)
		}
		rest = rest[size:]
	}
	return len(p), nil
}

func (e *emulator) lineFeed() {
	e.row++
	if e.row == len(e.rows) {
		e.rows = append(e.rows, nil)
	}
	e.top = max(e.top, e.row-e.height+1)
}

func (e *emulator) put(r rune) {
	columns := 1
	if r >= 0x1100 && r != '✓' && r != '✗' && r != '…' {
		columns = 2
	}
	if e.column+columns > e.width {
		e.column = 0
		e.lineFeed()
	}
	for len(e.rows[e.row]) < e.column+columns {
		e.rows[e.row] = append(e.rows[e.row], ' ')
	}
	e.rows[e.row][e.column] = r
	if columns == 2 {
		e.rows[e.row][e.column+1] = 0
	}
	e.column += columns
}

func (e *emulator) escape(p []byte) int {
	end := bytes.IndexAny(p, "ABCDHJKm")
	if end < 2 || p[1] != '[' {
		e.t.Fatalf("unknown escape in %q", p)
	}
	n, err := strconv.Atoi(string(p[2:end]))
	if err != nil {
		n = 1
	}
	switch p[end] {
	case 'A':
		e.row = max(e.row-n, e.top) // a terminal stops at its margin
	case 'B':
		e.row = min(e.row+n, min(e.top+e.height, len(e.rows))-1)
	case 'C':
		e.column = min(e.column+n, e.width-1)
	case 'D':
		e.column = max(e.column-n, 0)
	case 'K':
		e.rows[e.row] = e.rows[e.row][:min(e.column, len(e.rows[e.row]))]
	case 'J':
		first := e.row + 1
		if n == 2 { // the whole screen
			first = e.top
		} else {
			e.rows[e.row] = e.rows[e.row][:min(e.column, len(e.rows[e.row]))]
		}
		for i := first; i < len(e.rows); i++ {
			e.rows[i] = nil
		}
	case 'H':
		e.row, e.column = e.top, 0
	}
	return end + 1
}

// content is every row, without trailing blanks and empty rows at the end.
func (e *emulator) content() (list []string) {
	for _, row := range e.rows {
		list = append(list, strings.TrimRight(strings.ReplaceAll(string(row), "\x00", ""), " "))
	}
	for len(list) > 0 && list[len(list)-1] == "" {
		list = list[:len(list)-1]
	}
	return list
}

// keyboard gives the editor what was typed and then errPause, on which ReadLine returns in the middle of a line.
type keyboard struct{ typed []byte }

var errPause = errors.New("nothing typed")

func (k *keyboard) Read(p []byte) (int, error) {
	if len(k.typed) == 0 {
		return 0, errPause
	}
	n := copy(p, k.typed)
	k.typed = k.typed[n:]
	return n, nil
}

// screenWorld is a terminalScreen on an emulator, and what should be on it.
type screenWorld struct {
	t        *testing.T
	width    int
	terminal *emulator
	keys     keyboard
	screen   *terminalScreen

	want  []string // rows
	lines []wantedLine
	input string
}

type wantedLine struct {
	id   lineID
	text string
	row  int
	rows int
}

func newScreenWorld(t *testing.T, width, height int) *screenWorld {
	w := &screenWorld{t: t, width: width, terminal: newEmulator(t, width, height)}
	w.screen = newTerminalScreen(&w.keys, w.terminal, func() (int, int) { return w.width, height }, false)
	w.typeKeys("")
	return w
}

func (w *screenWorld) typeKeys(keys string) (entered string, done bool) {
	w.keys.typed = []byte(keys)
	entered, err := w.screen.term.ReadLine()
	switch {
	case err == nil:
		w.input = ""
		return entered, true
	case !errors.Is(err, errPause):
		w.t.Fatal(err)
	}
	w.input += keys
	return "", false
}

// wrap cuts text as a terminal of narrow characters does.
func (w *screenWorld) wrap(text string) (rows []string) {
	all := []rune(text)
	for len(all) > w.width {
		rows = append(rows, string(all[:w.width]))
		all = all[w.width:]
	}
	return append(rows, string(all))
}

func (w *screenWorld) print(text string) {
	id := w.screen.print(line{text: text})
	rows := w.wrap(text)
	w.lines = append(w.lines, wantedLine{id, text, len(w.want), len(rows)})
	w.want = append(w.want, rows...)
}

// change puts a text of the same length in a line's place.
func (w *screenWorld) change(i int, text string) bool {
	l := &w.lines[i]
	if !w.screen.change(l.id, line{text: text}) {
		return false
	}
	l.text = text
	copy(w.want[l.row:], w.wrap(text))
	return true
}

func (w *screenWorld) check(what string) {
	w.t.Helper()
	want := append(slices.Clone(w.want), w.wrap(w.screen.label+w.input)...)
	for i := range want {
		want[i] = strings.TrimRight(want[i], " ")
	}
	for len(want) > 0 && want[len(want)-1] == "" {
		want = want[:len(want)-1]
	}
	if got := w.terminal.content(); !slices.Equal(got, want) {
		w.t.Fatalf("after %s:\n%s\nwant\n%s", what, strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// TestScreenChangesTheRightLine prints, types and changes at random: whatever happens, every line holds its own text.
func TestScreenChangesTheRightLine(t *testing.T) {
	changed, refused := 0, 0
	for seed := range uint64(200) {
		rng := rand.New(rand.NewPCG(seed, 7))
		w := newScreenWorld(t, 20+rng.IntN(30), 5+rng.IntN(10))
		text := func(mark string) string {
			return mark + " " + strings.Repeat(string(rune('a'+rng.IntN(26))), rng.IntN(60))
		}
		for step := range 120 {
			what := fmt.Sprintf("seed %d, step %d: ", seed, step)
			switch n := rng.IntN(10); {
			case n < 3:
				w.print(text(markWaiting))
				what += "print"
			case n < 6 && len(w.lines) > 0:
				i := rng.IntN(len(w.lines))
				old := []rune(w.lines[i].text)
				if w.change(i, markSent+string(old[2:])) {
					changed++
				} else {
					refused++
				}
				what += "change"
			case n < 9 && len(w.screen.label+w.input)+25 < w.width*(w.terminal.height-2): // the editor cannot show more
				w.typeKeys(strings.Repeat(string(rune('A'+rng.IntN(26))), 1+rng.IntN(25)))
				what += "type"
			default:
				typed := w.input
				if entered, done := w.typeKeys("\r"); !done || entered != typed {
					t.Fatalf("entered %q, typed %q", entered, typed)
				}
				w.screen.eraseInput(typed)
				w.print(markWaiting + " " + typed)
				w.typeKeys("")
				what += "enter"
			}
			w.check(what)
		}
	}
	if changed < 1000 || refused < 1000 {
		t.Fatalf("%d changes, %d refused: the test does not test much", changed, refused)
	}
}

// TestScreenWithWideCharacters: as long as an input of unknown width surely fits its row, everything is as with a narrow one.
func TestScreenWithWideCharacters(t *testing.T) {
	w := newScreenWorld(t, 40, 10)
	w.print(".. first")
	w.typeKeys("Привет, 世界")
	if !w.change(0, "✓  first") {
		t.Fatal("a line above a short input was not changed")
	}
	w.check("a change above a wide input")
	w.print("bob: hi")
	w.check("a line above a wide input")
	if entered, done := w.typeKeys("\r"); !done || entered != "Привет, 世界" {
		t.Fatalf("entered %q, %v", entered, done)
	}
	w.screen.eraseInput("Привет, 世界")
	w.print(".. Привет, 世界")
	w.typeKeys("")
	w.check("a wide input")
	if !w.change(0, "✓✓ first") {
		t.Fatal("a line above an erased input was not changed")
	}
	w.check("a change above an erased input")
}

// TestScreenIsCarefulWithWideCharacters: after an input that the terminal may have broken where the editor did not, it leaves earlier
// lines and the input alone.
func TestScreenIsCarefulWithWideCharacters(t *testing.T) {
	w := newScreenWorld(t, 40, 10)
	w.print(".. first")
	typed := strings.Repeat("世", 19) // fills the row, or half of it
	w.typeKeys(typed)
	if w.change(0, "✓  first") {
		t.Fatal("changed a line after an input of unknown width")
	}
	if _, done := w.typeKeys("\r"); !done {
		t.Fatal("not entered")
	}
	w.want = append(w.want, "> "+typed)
	w.screen.eraseInput(typed)
	w.typeKeys("")
	w.check("a wide input")
	w.print(".. second")
	if !w.change(1, "✓  second") {
		t.Fatal("a line after it cannot be changed")
	}
	w.check("a change")
	w.typeKeys("plain\r")
	w.screen.eraseInput("plain")
	w.typeKeys("")
	w.check("a plain input")
}

// TestScreenKeepsLinesAboveWideInput types, edits and enters text of all widths at random: what stands above it is never touched but by
// a change of that very line.
func TestScreenKeepsLinesAboveWideInput(t *testing.T) {
	changed, erased := 0, 0
	keys := []string{"a", "й", "世", "é", "…", "\x7f", "\x02", "\x06", "\x15"} // and backspace, left, right, erase to the left
	for seed := range uint64(200) {
		rng := rand.New(rand.NewPCG(seed, 11))
		w := newScreenWorld(t, 24+rng.IntN(30), 8+rng.IntN(10))
		var want []string // the lines, in their order; inputs that could not be erased stand between
		for step := range 80 {
			switch n := rng.IntN(10); {
			case n < 2:
				text := fmt.Sprintf("%s #%d", markWaiting, step)
				w.print(text)
				want = append(want, text)
			case n < 5 && len(w.lines) > 0:
				i := rng.IntN(len(w.lines))
				text := []string{markSent, markDelivered}[rng.IntN(2)] + want[i][strings.IndexByte(want[i], '#')-1:]
				if w.change(i, text) {
					want[i] = text
					changed++
				}
			case n < 9:
				for range 1 + rng.IntN(8) {
					w.typeKeys(keys[rng.IntN(len(keys))])
				}
			default:
				before := len(w.terminal.content())
				entered, done := w.typeKeys("\r")
				if !done {
					t.Fatal("not entered")
				}
				w.screen.eraseInput(entered)
				w.typeKeys("")
				if strings.ContainsRune(entered, '世') && len(w.terminal.content()) <= before {
					erased++
				}
			}
			var got []string
			for _, row := range w.terminal.content() {
				if strings.ContainsRune(row, '#') { // which nobody types
					got = append(got, row)
				}
			}
			if !slices.Equal(got, want) {
				t.Fatalf("seed %d, step %d: lines %q, want %q, in\n%s", seed, step, got, want, strings.Join(w.terminal.content(), "\n"))
			}
		}
	}
	if changed < 1000 || erased < 100 {
		t.Fatalf("%d changes, %d wide inputs erased: the test does not test much", changed, erased)
	}
}

// TestScreenFollowsAClear: after Ctrl-L the lines above are gone, and those below it are where the screen begins.
func TestScreenFollowsAClear(t *testing.T) {
	w := newScreenWorld(t, 40, 10)
	w.print(".. first")
	w.print(".. second")
	w.typeKeys("half")
	w.typeKeys("\x0c")
	w.input = "half"
	w.want, w.lines = nil, w.lines[:1]
	w.check("a clear")
	if w.change(0, "✓  first") {
		t.Fatal("changed a line that is gone")
	}
	w.print(".. third")
	if !w.change(1, "✓  third") {
		t.Fatal("a line after the clear cannot be changed")
	}
	w.check("a change after the clear")
}

// TestScreenForgetsOnResize: where lines are after a terminal has wrapped them anew is anybody's guess.
func TestScreenForgetsOnResize(t *testing.T) {
	w := newScreenWorld(t, 40, 10)
	w.print(".. first")
	w.width = 30
	if w.change(0, "✓  first") {
		t.Fatal("changed a line after a resize")
	}
	w.print(".. second")
	if !w.change(1, "✓  second") {
		t.Fatal("a line after the resize cannot be changed")
	}
	w.check("a resize")
}

// TestScreenLeavesInputThatIsNotLast: a message that came between the enter key and its processing stays.
func TestScreenLeavesInputThatIsNotLast(t *testing.T) {
	w := newScreenWorld(t, 40, 10)
	w.typeKeys("hello\r")
	w.want = append(w.want, "> hello")
	w.print("bob: hi")
	w.screen.eraseInput("hello")
	w.typeKeys("")
	w.check("a message in between")
}

// TestScreenCloses: who leaves in the middle of a line finds the shell's prompt where the line began.
func TestScreenCloses(t *testing.T) {
	for _, typed := range []string{"", "half a line", strings.Repeat("long ", 20), "世界", strings.Repeat("世", 18)} {
		w := newScreenWorld(t, 40, 10)
		w.print("✓  first")
		w.typeKeys(typed)
		w.screen.close()
		w.screen.print(line{text: "too late"})
		if got := w.terminal.content(); !slices.Equal(got, w.want) || w.terminal.row != 1 || w.terminal.column != 0 {
			t.Errorf("after %q: %q, cursor at row %d, column %d", typed, got, w.terminal.row, w.terminal.column)
		}
	}
}

func TestPlainScreen(t *testing.T) {
	var out bytes.Buffer
	s, next, restore, err := openScreen(strings.NewReader("one\r\n\ntwo"), &out)
	if err != nil || s.terminal() {
		t.Fatalf("%v, terminal %v", err, s.terminal())
	}
	defer restore()
	if s.change(s.print(line{text: "* x"}), line{text: "* y"}) || out.String() != "* x\n" {
		t.Fatalf("printed %q", out.String())
	}
	for _, want := range []string{"one", "", "two"} {
		if got, err := next(); got != want || err != nil {
			t.Fatalf("read %q, %v; want %q", got, err, want)
		}
	}
	if _, err := next(); !errors.Is(err, io.EOF) {
		t.Fatalf("at the end: %v", err)
	}
}

func TestPipeLinesAreBounded(t *testing.T) {
	next := pipeLines(strings.NewReader(strings.Repeat("x", 3*maxChatLine) + "\nshort\n"))
	if text, err := next(); !errors.Is(err, errChatLine) || text != "" {
		t.Fatalf("%d bytes, %v", len(text), err)
	}
	if text, err := next(); text != "short" || err != nil {
		t.Fatalf("%q, %v", text, err)
	}
}
