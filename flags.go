package main

import (
	"fmt"
	"reflect"
	"strings"

	"github.com/alecthomas/kong"
)

// configFlags gives a command some settings as flags, and --config. The flags are built from the settings
// table: the library wants a struct, so one is made at run time.
type configFlags struct {
	kong.Plugins
	File string `name:"config" placeholder:"FILE" help:"Configuration file in TOML (MILLRACE_CONFIG)."`
}

func newConfigFlags(names ...string) configFlags {
	fields := make([]reflect.StructField, len(names))
	for i, name := range names {
		s := findSetting(name)
		fields[i] = reflect.StructField{
			Name: fmt.Sprintf("Flag%d", i),
			Type: reflect.TypeFor[*string](), // nil: not given
			Tag: reflect.StructTag(fmt.Sprintf(`name:%q placeholder:%q help:%q`,
				name, s.expects, s.help())),
		}
	}
	return configFlags{Plugins: kong.Plugins{reflect.New(reflect.StructOf(fields)).Interface()}}
}

// help is the usage as a sentence, with the default and the environment variable.
func (s *setting) help() string {
	fallback := s.fallback
	if fallback == "" {
		fallback = "none"
	}
	return fmt.Sprintf("%s%s (%s; default %s).", strings.ToUpper(s.usage[:1]), s.usage[1:], s.variable(), fallback)
}

func allSettings() []string {
	names := make([]string, len(settings))
	for i := range settings {
		names[i] = settings[i].name()
	}
	return names
}

// load joins these flags with the environment, the file and the defaults.
func (f *configFlags) load(environ []string) (*configuration, error) {
	given := make(map[string]string)
	flags := reflect.ValueOf(f.Plugins[0]).Elem()
	for i := range flags.NumField() {
		if text := flags.Field(i).Interface().(*string); text != nil {
			name := flags.Type().Field(i).Tag.Get("name")
			given[name] = *text
		}
	}
	return loadConfig(given, f.File, environ)
}
