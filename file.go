package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"github.com/pelletier/go-toml/v2"
	"github.com/pelletier/go-toml/v2/unstable"
)

// maxConfigBytes is far more than all settings need; it keeps a wrong path (a disk, a log) from being read whole.
const maxConfigBytes = 1 << 20

// tomlType names the TOML types that settings use.
type tomlType string

const (
	tomlText    tomlType = "a string"
	tomlInteger tomlType = "an integer"
	tomlList    tomlType = "a list of strings"
)

// configFile is a file while it is applied: a walk over the syntax tree, since only that knows the
// line of every key and value.
type configFile struct {
	path     string
	parser   unstable.Parser
	target   *configuration
	seen     map[*setting]int // line where it was set
	problems []error
}

// applyFile sets what the file says. Every unknown key and wrong value is reported with line and column.
func (c *configuration) applyFile(path string) error {
	data, err := readLimited(path, maxConfigBytes)
	if err != nil {
		return fmt.Errorf("read configuration: %w", err)
	}
	return c.applyTOML(path, data)
}

// applyTOML sets what data, the content of the file at path, says.
func (c *configuration) applyTOML(path string, data []byte) error {
	// The tree is built without some checks of the specification (a table opened twice, bad escapes), so the
	// decoder reads the file too. What it cannot place is told only if the walk has nothing better.
	whole := toml.Unmarshal(data, new(map[string]any))
	var syntax *toml.DecodeError
	if errors.As(whole, &syntax) {
		line, column := syntax.Position()
		return fmt.Errorf("%s:%d:%d: %s", path, line, column, strings.TrimPrefix(syntax.Error(), "toml: "))
	}
	f := configFile{path: path, target: c, seen: make(map[*setting]int)}
	f.parser.Reset(data)
	f.walk()
	if len(f.problems) == 0 && whole != nil {
		return fmt.Errorf("%s: %w", path, whole)
	}
	return errors.Join(f.problems...)
}

func readLimited(path string, limit int64) ([]byte, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	data, err := io.ReadAll(io.LimitReader(file, limit+1))
	if err != nil {
		return nil, err
	}
	if int64(len(data)) > limit {
		return nil, fmt.Errorf("%s is longer than %d bytes", path, limit)
	}
	return bytes.TrimPrefix(data, []byte("\xef\xbb\xbf")), nil // some editors write a byte order mark
}

func (f *configFile) walk() {
	var section []string
	ignore := false // inside a section that was refused: its keys would only repeat the message
	for f.parser.NextExpression() {
		node := f.parser.Expression()
		switch node.Kind {
		case unstable.Table, unstable.ArrayTable:
			at := node.Child()
			section = keyParts(node.Key())
			ignore = !f.section(section, node.Kind == unstable.ArrayTable, at)
		case unstable.KeyValue:
			if !ignore {
				f.entry(section, node)
			}
		}
	}
	if err := f.parser.Error(); err != nil {
		f.problems = append(f.problems, fmt.Errorf("%s: %w", f.path, err))
	}
}

// section checks the header of a table.
func (f *configFile) section(name []string, list bool, at *unstable.Node) bool {
	if known := sections(); len(name) != 1 || !slices.Contains(known, name[0]) {
		f.refuse(at, "unknown section [%s]%s", strings.Join(name, "."), didYouMean(strings.Join(name, "."), known))
		return false
	}
	if list {
		f.refuse(at, "section [[%s]] is a list: expected [%s]", name[0], name[0])
		return false
	}
	return true
}

// entry applies one key = value; dotted keys and inline tables lead to the same settings.
func (f *configFile) entry(prefix []string, node *unstable.Node) {
	path := append(prefix[:len(prefix):len(prefix)], keyParts(node.Key())...)
	key := lastKey(node.Key())
	v := node.Value()
	if v.Kind == unstable.InlineTable && len(path) == 1 && slices.Contains(sections(), path[0]) {
		for children := v.Children(); children.Next(); {
			f.entry(path, children.Node())
		}
		return
	}
	s := findSetting(strings.Join(path, "-"))
	if s == nil || len(path) != 2 {
		f.refuse(key, "unknown key %s%s", strings.Join(path, "."), suggestKey(path))
		return
	}
	f.set(s, key, v)
}

func (f *configFile) set(s *setting, key, v *unstable.Node) {
	if line, twice := f.seen[s]; twice {
		f.refuse(key, "%s.%s is set already in line %d", s.section, s.key, line)
		return
	}
	f.seen[s] = f.line(key)
	text, kind := literal(v)
	field := s.value(&f.target.Config)
	if !slices.Contains(field.accepts(), kind) {
		f.refuse(f.valueOr(v, key), "%s.%s is %s: expected %s (%s)", s.section, s.key, kind, field.accepts()[0], s.expects)
		return
	}
	if err := field.set(text); err != nil {
		f.refuse(f.valueOr(v, key), "%s.%s: %w", s.section, s.key, err)
		return
	}
	f.target.origins[s.name()] = fmt.Sprintf("%s:%d", f.path, f.line(key))
}

// literal is a value as text and its type.
func literal(v *unstable.Node) (text string, kind tomlType) {
	switch v.Kind {
	case unstable.String:
		return string(v.Data), tomlText
	case unstable.Integer:
		return strings.ReplaceAll(string(v.Data), "_", ""), tomlInteger
	case unstable.Array:
		var list []string
		for children := v.Children(); children.Next(); {
			element := children.Node()
			if element.Kind != unstable.String {
				return "", "a list of other things"
			}
			if bytes.ContainsRune(element.Data, ',') { // would be two entries
				return "", "a list with a comma in an entry"
			}
			list = append(list, string(element.Data))
		}
		return strings.Join(list, ","), tomlList
	case unstable.Bool:
		return "", "a boolean"
	case unstable.Float:
		return "", "a number with a fraction"
	case unstable.InlineTable:
		return "", "a table"
	default:
		return "", "a date or time"
	}
}

// valueOr is the node whose place an error names: the parser records it for strings and numbers only.
func (f *configFile) valueOr(v, key *unstable.Node) *unstable.Node {
	if v.Raw.Length > 0 {
		return v
	}
	return key
}

func (f *configFile) refuse(at *unstable.Node, format string, args ...any) {
	start := f.parser.Shape(at.Raw).Start
	f.problems = append(f.problems, fmt.Errorf("%s:%d:%d: %w", f.path, start.Line, start.Column, fmt.Errorf(format, args...)))
}

func (f *configFile) line(at *unstable.Node) int { return f.parser.Shape(at.Raw).Start.Line }

func keyParts(key unstable.Iterator) (parts []string) {
	for key.Next() {
		parts = append(parts, string(key.Node().Data))
	}
	return parts
}

// lastKey is the part of a dotted key that names the setting: where an error points.
func lastKey(key unstable.Iterator) (last *unstable.Node) {
	for key.Next() {
		last = key.Node()
	}
	return last
}

// sections lists the sections in the order of the table.
func sections() (list []string) {
	for i := range settings {
		if !slices.Contains(list, settings[i].section) {
			list = append(list, settings[i].section)
		}
	}
	return list
}

// suggestKey looks for the nearest key, in its section first: adr in [edge] means addr, not the nearest
// word of all.
func suggestKey(path []string) string {
	var here, all []string
	for i := range settings {
		s := &settings[i]
		if path[0] == s.section {
			here = append(here, s.section+"."+s.key)
		}
		all = append(all, s.section+"."+s.key)
	}
	word := strings.Join(path, ".")
	if hint := didYouMean(word, here); hint != "" {
		return hint
	}
	return didYouMean(word, all)
}
