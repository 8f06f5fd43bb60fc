package main

import (
	"errors"
	"fmt"
	"slices"
	"strings"
)

// envPrefix starts the name of every environment variable that millrace reads.
const envPrefix = "MILLRACE_"

// tokenVariable holds the access token of a chat.
const tokenVariable = envPrefix + "TOKEN"

// otherVariables are read by millrace but are no settings.
var otherVariables = map[string]string{
	"MILLRACE_CONFIG": "path of the configuration file, if --config is not given",
	"MILLRACE_CRASH":  "crash point of test builds",
	tokenVariable:     "access token of a chat, if --token and --token-file are not given",
}

// configuration is a Config together with where each value comes from.
type configuration struct {
	Config
	// origins says, by setting name: default, flag --x, environment X, or file:line.
	origins map[string]string
	// warnings are worth a line in the log but do not stop anything.
	warnings []string
	// token is the access token in the environment. It is no setting and never shown.
	token string
}

// newConfiguration holds the defaults.
func newConfiguration() *configuration {
	c := &configuration{Config: defaultConfig(), origins: make(map[string]string, len(settings))}
	for i := range settings {
		c.origins[settings[i].name()] = "default"
	}
	return c
}

// usageError is a mistake on the command line or in the configuration: exit code 2.
type usageError struct{ error }

func (e usageError) Unwrap() error { return e.error }

// loadConfig joins the sources: flags (by setting name) win over the environment, the environment over the file,
// the file over the defaults. It reports every mistake of a source at once, as a usageError, and does not
// validate the whole.
func loadConfig(flags map[string]string, file string, environ []string) (*configuration, error) {
	c := newConfiguration()
	env := c.readEnvironment(environ)
	c.token = env[tokenVariable]
	if file == "" {
		file = env["MILLRACE_CONFIG"]
	}
	var problems []error
	if file != "" {
		if err := c.applyFile(file); err != nil {
			problems = append(problems, err)
		}
	}
	for i := range settings {
		s := &settings[i]
		if text, ok := env[s.variable()]; ok {
			problems = append(problems, c.apply(s, text, "environment "+s.variable()))
		}
		if text, ok := flags[s.name()]; ok {
			problems = append(problems, c.apply(s, text, "flag --"+s.name()))
		}
	}
	if err := errors.Join(problems...); err != nil {
		return nil, usageError{err}
	}
	return c, nil
}

func (c *configuration) apply(s *setting, text, origin string) error {
	if err := s.value(&c.Config).set(text); err != nil {
		return fmt.Errorf("%s: %w", origin, err)
	}
	c.origins[s.name()] = origin
	return nil
}

// check validates the whole and reads what must be there before a server starts. Errors are usageErrors.
func (c *configuration) check() error {
	if err := c.validate(); err != nil {
		return usageError{err}
	}
	if err := checkTokens(c.Config); err != nil {
		return usageError{err}
	}
	if err := checkCertificate(c.Config); err != nil {
		return usageError{err}
	}
	return nil
}

// readEnvironment returns the variables with our prefix and warns about those that nothing reads. An
// empty variable counts as not set, as compose files and unit files produce them.
func (c *configuration) readEnvironment(environ []string) map[string]string {
	known := make([]string, 0, len(settings)+len(otherVariables))
	for i := range settings {
		known = append(known, settings[i].variable())
	}
	for name := range otherVariables {
		known = append(known, name)
	}
	env := make(map[string]string)
	for _, entry := range environ {
		name, text, _ := strings.Cut(entry, "=")
		if !strings.HasPrefix(name, envPrefix) || text == "" {
			continue
		}
		if !slices.Contains(known, name) {
			c.warnings = append(c.warnings, fmt.Sprintf("environment variable %s is not read by millrace%s", name, didYouMean(name, known)))
			continue
		}
		env[name] = text
	}
	return env
}

// show prints every value as a configuration file that would set it, with its origin as a comment.
// Secrets are in files of their own and are never printed.
func (c *configuration) show() string {
	var b strings.Builder
	width := 0
	lines := make([]string, len(settings))
	for i := range settings {
		lines[i] = settings[i].key + " = " + settings[i].value(&c.Config).toml()
		width = max(width, len(lines[i]))
	}
	section := ""
	for i := range settings {
		s := &settings[i]
		if s.section != section {
			if section != "" {
				b.WriteByte('\n')
			}
			section = s.section
			fmt.Fprintf(&b, "[%s]\n", section)
		}
		fmt.Fprintf(&b, "%-*s  # %s\n", width, lines[i], c.origins[s.name()])
	}
	return b.String()
}
