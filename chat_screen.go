package main

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"golang.org/x/term"
)

// lineID names a line on a screen; 0 is none.
type lineID uint64

// line is what a chat shows: a message with time, mark and person, or a note (no person). All strings are printable.
type line struct {
	at      time.Time
	mark    string
	who     string
	text    string
	foreign bool // somebody else's message
}

// screen is where a chat shows its lines. One goroutine uses it.
type screen interface {
	terminal() bool
	// print adds a line.
	print(l line) lineID
	// change replaces a line that is still in reach, and reports whether it was.
	change(id lineID, l line) bool
	// prompt says whom the input goes to.
	prompt(peer string)
	// eraseInput removes what the user has just typed, if it is the last thing on the screen.
	eraseInput(text string)
}

// openScreen prepares in and out: a line editor when both are a terminal that can move its cursor, else plain lines.
func openScreen(in io.Reader, out io.Writer) (screen, lineReader, func(), error) {
	input, ok := in.(*os.File)
	output, ok2 := out.(*os.File)
	name := os.Getenv("TERM")
	if !ok || !ok2 || !isTerminal(in) || !isTerminal(out) || name == "" || name == "dumb" {
		return &plainScreen{out}, pipeLines(in), func() {}, nil
	}
	old, err := term.MakeRaw(int(input.Fd()))
	if err != nil {
		return nil, nil, nil, fmt.Errorf("prepare terminal: %w", err)
	}
	size := func() (int, int) {
		width, height, err := term.GetSize(int(output.Fd()))
		if err != nil || width <= 0 || height <= 0 {
			return 80, 24
		}
		return width, height
	}
	s := newTerminalScreen(in, out, size, os.Getenv("NO_COLOR") == "")
	restore := func() {
		s.close()
		_ = term.Restore(int(input.Fd()), old)
	}
	return s, s.term.ReadLine, restore, nil
}

// plainScreen prints lines, for a pipe or a file.
type plainScreen struct{ out io.Writer }

func (s *plainScreen) terminal() bool { return false }

func (s *plainScreen) print(l line) lineID {
	fmt.Fprintln(s.out, l.format(false)) // a reader that went away ends the program by SIGPIPE
	return 0
}

func (s *plainScreen) change(lineID, line) bool { return false }
func (s *plainScreen) prompt(string)            {}
func (s *plainScreen) eraseInput(string)        {}

// Colours.
const (
	colourReset = "\x1b[0m"
	colourDim   = "\x1b[2m"
	colourBold  = "\x1b[1m"
	colourGreen = "\x1b[32m"
	colourRed   = "\x1b[31m"
)

// format is the line as text.
func (l line) format(colour bool) string {
	paint := func(code, text string) string {
		if !colour {
			return text
		}
		return code + text + colourReset
	}
	if l.who == "" {
		return paint(colourDim, l.text)
	}
	mark := l.mark
	switch mark {
	case markDelivered:
		mark = paint(colourGreen, mark)
	case markFailed:
		mark = paint(colourRed, mark)
	}
	who := l.who
	if l.foreign {
		who = paint(colourBold, who)
	}
	return fmt.Sprintf("%s %s %s: %s", paint(colourDim, clockTime(l.at, time.Now())), mark, who, l.text)
}

// clockTime is a time as short as it can be without being taken for another day's.
func clockTime(at, now time.Time) string {
	at, now = at.Local(), now.Local()
	if at.YearDay() == now.YearDay() && at.Year() == now.Year() {
		return at.Format("15:04")
	}
	return at.Format("2006-01-02 15:04")
}

// terminalScreen is a line editor below the lines of a chat. The editor (x/term) and the chat write to one terminal, and both pass
// through a cursorWriter, which knows where every line is.
type terminalScreen struct {
	term   *term.Terminal
	cursor *cursorWriter
	size   func() (width, height int)
	colour bool
	label  string
	last   lineID
}

func newTerminalScreen(in io.Reader, out io.Writer, size func() (int, int), colour bool) *terminalScreen {
	s := &terminalScreen{size: size, colour: colour}
	width, height := size()
	s.cursor = &cursorWriter{out: out, width: width, height: height, inputRow: -1}
	s.term = term.NewTerminal(struct {
		io.Reader
		io.Writer
	}{in, s.cursor}, "")
	_ = s.term.SetSize(width, height) // fails only with its writer
	s.prompt("")
	return s
}

func (s *terminalScreen) terminal() bool { return true }

func (s *terminalScreen) prompt(peer string) {
	s.label = "> "
	if peer != "" {
		s.label = peer + "> "
	}
	s.term.SetPrompt(s.label)
}

func (s *terminalScreen) print(l line) lineID {
	s.last++
	s.command(cursorPrint, uint64(s.last), l.format(s.colour))
	return s.last
}

func (s *terminalScreen) change(id lineID, l line) bool {
	s.command(cursorChange, uint64(id), l.format(s.colour))
	return s.cursor.changed
}

func (s *terminalScreen) eraseInput(text string) {
	s.command(cursorErase, uint64(utf8.RuneCountInString(s.label+text)), "")
}

// close removes the prompt and what was typed at it. Nothing is shown afterwards.
func (s *terminalScreen) close() { s.command(cursorClose, 0, "") }

// command goes through the editor, which moves its input line out of the way and draws it again below.
func (s *terminalScreen) command(op byte, n uint64, text string) {
	if width, height := s.size(); width != s.cursor.width || height != s.cursor.height {
		s.cursor.resize = [2]int{width, height}
		_ = s.term.SetSize(width, height)
	}
	b := append([]byte{cursorCommand, op}, strconv.FormatUint(n, 10)...)
	b = append(append(b, cursorCommand), text...)
	_, _ = s.term.Write(b) // a terminal that went away ends the input too
}

// A command to a cursorWriter is a NUL, the operation, a number, a NUL and text. No other output holds a NUL.
const (
	cursorCommand = 0
	cursorPrint   = 'P' // print text as line number n
	cursorChange  = 'C' // put text in the place of line n
	cursorErase   = 'E' // erase the input line of n columns that was just entered
	cursorClose   = 'Q' // pass nothing on any more
)

// cursorWriter passes output on to a terminal and keeps account of the row of the cursor, so that a line printed
// earlier can be changed. It trusts only what it can be sure of: an input whose rows depend on how wide the terminal draws it, or a new
// size, makes it forget where the earlier lines are. It is called under the editor's lock, one call at a time.
type cursorWriter struct {
	out    io.Writer
	width  int
	height int
	resize [2]int // set before a write: the new size

	row      int           // of the cursor; 0 is where the chat began, which only a scroll can move off the screen
	lowest   int           // the lowest row ever
	column   int           // of the cursor, or right of it by as much as characters of unknown width may be narrower
	lines    []printedLine // ascending, at most height of them
	inputRow int           // the row below an input line that was just entered; −1: something else was printed since
	wide     bool          // the input line holds characters of unknown width
	unsure   bool          // and may have reached the margin, where the terminal begins a new row that the editor does not know of
	changed  bool          // the last change succeeded
	closed   bool
}

type printedLine struct {
	id   uint64
	row  int
	rows int
}

func (c *cursorWriter) Write(p []byte) (int, error) {
	if c.closed {
		return len(p), nil
	}
	if c.resize[0] != 0 {
		c.width, c.height, c.lines, c.resize, c.inputRow = c.resize[0], c.resize[1], nil, [2]int{}, -1
	}
	if len(p) == 0 || p[0] != cursorCommand {
		c.follow(p)
		return c.out.Write(p)
	}
	number, text, _ := bytes.Cut(p[2:], []byte{cursorCommand})
	n, _ := strconv.ParseUint(string(number), 10, 63)
	var err error
	if c.wide { // the editor believes in one column a character: it has not come all the way back, nor cleared all
		_, err = io.WriteString(c.out, "\r\x1b[J")
	}
	if err != nil {
		return 0, err
	}
	c.column = 0
	switch p[1] {
	case cursorPrint:
		err = c.print(n, string(text))
	case cursorChange:
		err = c.change(n, string(text))
	case cursorErase:
		err = c.erase(int(n))
	case cursorClose:
		c.closed = true
	}
	return len(p), err
}

// follow keeps account of what the editor writes: text, CR, LF, and cursor movements. The editor takes a character for one column and
// breaks a line that reaches the margin, so that the terminal never does unless there are wider ones.
func (c *cursorWriter) follow(p []byte) {
	for len(p) > 0 {
		r, size := utf8.DecodeRune(p)
		switch {
		case r == '\r':
			c.column = 0
		case r == '\n':
			c.down(1)
			c.inputRow = c.row
		case r == 0x1b:
			size = c.escape(p)
		case r == '\a':
		case r < 0x20 || r == 0x7f:
			c.forget()
			c.wide, c.unsure = true, true
		default:
			least, most := columnsOf(r)
			c.column += most
			c.wide = c.wide || least != most
			if c.wide && c.column >= c.width {
				c.forget()
				c.unsure = true
			}
		}
		p = p[size:]
	}
}

// escape follows one control sequence and returns its length.
func (c *cursorWriter) escape(p []byte) int {
	if len(p) < 2 || p[1] != '[' {
		return 1
	}
	i := 2
	for i < len(p) && (p[i] < 0x40 || p[i] > 0x7e) {
		i++
	}
	if i == len(p) {
		return i
	}
	n, err := strconv.Atoi(string(p[2:i]))
	if err != nil {
		n = 1
	}
	switch p[i] {
	case 'A':
		c.row -= n
		if top := c.top(); c.row < top { // an input taller than the screen: the terminal stops at its margin
			c.row = top
			c.forget()
		}
	case 'B':
		c.down(n)
	case 'C':
		c.column += n
	case 'D':
		c.column = max(c.column-n, 0)
	case 'H': // the editor clears the screen and begins again at its top
		c.forget()
		c.row, c.lowest, c.column, c.inputRow, c.wide, c.unsure = 0, 0, 0, -1, false, false
	}
	return i + 1
}

func (c *cursorWriter) down(n int) {
	c.row += n
	c.lowest = max(c.lowest, c.row)
}

func (c *cursorWriter) forget() { c.lines = c.lines[:0] }

func (c *cursorWriter) print(id uint64, text string) error {
	rows, sure := rowsOf(text, c.width)
	if !sure {
		c.forget()
	} else {
		c.lines = append(c.lines, printedLine{id, c.row, rows})
		if len(c.lines) > c.height {
			c.lines = append(c.lines[:0], c.lines[1:]...)
		}
	}
	c.inputRow, c.wide, c.unsure = -1, false, false
	c.down(rows)
	_, err := io.WriteString(c.out, text+"\r\n")
	return err
}

// change rewrites a line in its place, if it is on the screen and keeps its rows.
func (c *cursorWriter) change(id uint64, text string) error {
	c.changed = false
	rows, sure := rowsOf(text, c.width)
	for _, l := range c.lines {
		if l.id != id || !sure || l.rows != rows || l.row < c.top() {
			continue
		}
		c.changed = true
		up := c.row - l.row
		down := up - (rows - 1)
		b := fmt.Sprintf("\x1b[%dA\r%s\x1b[K\r", up, text)
		if down > 0 {
			b += fmt.Sprintf("\x1b[%dB", down)
		}
		_, err := io.WriteString(c.out, b)
		return err
	}
	return nil
}

// top is the first row that is surely on the screen: the lowest row ever written is at the bottom at the latest after height rows.
func (c *cursorWriter) top() int { return max(c.lowest-(c.height-1), 0) }

// erase removes an input line of n columns that was just entered, and stands where it began.
func (c *cursorWriter) erase(n int) error {
	sure := !c.unsure && c.inputRow == c.row
	c.wide, c.unsure = false, false
	rows := n/c.width + 1 // the editor breaks a line that reaches the margin
	if !sure || c.row-rows < c.top() {
		return nil
	}
	c.inputRow = -1
	c.row -= rows
	_, err := fmt.Fprintf(c.out, "\x1b[%dA\r\x1b[J", rows)
	return err
}

// columnsOf bounds how wide terminals draw a character: one column for most alphabets, while for the rest (combining marks, East Asian,
// emoji) it depends on the terminal.
func columnsOf(r rune) (least, most int) {
	const firstUnsure, firstDash, lastDots = 0x300, 0x2010, 0x2027
	switch {
	case r < firstUnsure, firstDash <= r && r <= lastDots, r == '✓', r == '✗',
		unicode.IsLetter(r) && unicode.In(r, unicode.Greek, unicode.Cyrillic, unicode.Armenian, unicode.Georgian, unicode.Hebrew):
		return 1, 1
	}
	return 0, 2
}

// rowsOf is how many rows a line takes. sure is false when that depends on the terminal: on characters of unknown
// width, or on where the cursor stands after the last column.
func rowsOf(text string, width int) (rows int, sure bool) {
	least, most := 0, 0
	for i := 0; i < len(text); {
		r, size := utf8.DecodeRuneInString(text[i:])
		i += size
		switch {
		case r == 0x1b: // a colour: up to its m
			end := strings.IndexByte(text[i:], 'm')
			i += end + 1
		default:
			narrow, wide := columnsOf(r)
			least += narrow
			most += wide
		}
	}
	rows = max((least+width-1)/width, 1)
	full := least > 0 && (least%width == 0 || most%width == 0)
	return rows, rows == max((most+width-1)/width, 1) && !full
}

// printable makes foreign text harmless and honest on a terminal: control characters, bidirectional overrides, invisible
// characters and bytes that are not UTF-8 become visible escapes, and the text stays on one line. Joiners stay, since emoji and several scripts need them.
func printable(text string) string {
	if !strings.ContainsFunc(text, hidden) && utf8.ValidString(text) {
		return text
	}
	var b strings.Builder
	for i := 0; i < len(text); {
		r, size := utf8.DecodeRuneInString(text[i:])
		switch {
		case r == utf8.RuneError && size == 1:
			fmt.Fprintf(&b, `\x%02x`, text[i])
		case r == '\n':
			b.WriteString(`\n`)
		case r == '\t':
			b.WriteByte(' ')
		case hidden(r) && r < 0x80:
			fmt.Fprintf(&b, `\x%02x`, r)
		case hidden(r) && r > 0xffff:
			fmt.Fprintf(&b, `\U%08x`, r)
		case hidden(r):
			fmt.Fprintf(&b, `\u%04x`, r)
		default:
			b.WriteRune(r)
		}
		i += size
	}
	return b.String()
}

// hidden reports whether a character must not reach a terminal as it is.
func hidden(r rune) bool {
	const zeroWidthNonJoiner, zeroWidthJoiner = 0x200c, 0x200d
	return !unicode.IsGraphic(r) && r != zeroWidthNonJoiner && r != zeroWidthJoiner
}
