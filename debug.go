package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/pprof"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// Limits of the admin server. It serves a handful of tools on a private address.
const (
	adminHeaderTimeout = 5 * time.Second
	adminReadTimeout   = 10 * time.Second
	adminWriteTimeout  = 30 * time.Second // of an answer; that of a profile begins when the profile is complete
	adminIdleTimeout   = time.Minute
	adminHeaderBytes   = 8 << 10
	adminConnections   = 32 // a part of reservedDescriptors
	adminScrapes       = 4  // at once
	adminProfiles      = 4  // at once
	adminProfileTime   = 2 * time.Minute
)

// Check is one condition of readiness.
type Check struct {
	Name string // as shown by /readyz?verbose: store, edge, …
	Err  error  // nil: good
}

// source is what the admin server shows of the running program. All methods are called from any goroutine
// and must not block for long.
type source interface {
	// Metrics calls emit for each value. Labels are pairs of key and value; equal names must come with
	// equal label keys, kind and help. Values of equal name and labels are added up.
	Metrics(emit func(name, help string, counter bool, value float64, labels ...string))
	// Ready lists what must hold for new clients to be sent here.
	Ready() []Check
	// Alive is an error when only a restart can help.
	Alive() error
	// Draining reports whether the server is going away.
	Draining() bool
	// Disconnect ends the sessions of a user and tells how many there were.
	Disconnect(user string) int
}

// adminServer answers on the admin address.
type adminServer struct {
	listener *adminListener
	http     http.Server
	failed   chan error
	cancel   context.CancelFunc // ends the profiles that are being taken
}

// openAdmin binds addr and serves src until Close. The error names the address.
func openAdmin(addr string, src source, log *slog.Logger) (*adminServer, error) {
	bound, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("listen for admin: %w", err)
	}
	listener := newAdminListener(bound, adminConnections)
	requests, cancel := context.WithCancel(context.Background())
	a := &adminServer{
		listener: listener,
		cancel:   cancel,
		http: http.Server{
			BaseContext:       func(net.Listener) context.Context { return requests },
			Handler:           guard(bound.Addr(), adminHandler(src, listener, log)),
			ConnContext:       withConn,
			ConnState:         listener.track,
			ReadHeaderTimeout: adminHeaderTimeout,
			ReadTimeout:       adminReadTimeout,
			WriteTimeout:      adminWriteTimeout,
			IdleTimeout:       adminIdleTimeout,
			MaxHeaderBytes:    adminHeaderBytes,
			ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelWarn),
		},
		failed: make(chan error, 1),
	}
	go func() {
		if err := a.http.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
			a.failed <- fmt.Errorf("serve admin: %w", err)
		}
	}()
	return a, nil
}

// Addr is what was bound.
func (a *adminServer) Addr() string { return a.listener.Addr().String() }

// Done receives the failure that ended the server, if it was not Close.
func (a *adminServer) Done() <-chan error { return a.failed }

// Close frees the address, ends profiles and waits at most for ctx for requests being answered, then cuts them off.
func (a *adminServer) Close(ctx context.Context) error {
	a.cancel()
	if err := a.http.Shutdown(ctx); err != nil {
		return a.http.Close()
	}
	return nil
}

const adminIndex = `millrace admin

/metrics          Prometheus metrics
/livez            200 while running makes sense
/readyz           200 while new clients are welcome; ?verbose lists the checks
/debug/pprof/     profiles
/edge/disconnect  POST with ?user=NAME ends the sessions of a user
`

func adminHandler(src source, l *adminListener, log *slog.Logger) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, r *http.Request) { answer(w, http.StatusOK, adminIndex) })
	mux.Handle("GET /metrics", l.gate(adminScrapes, metricsHandler(src, l, log)))
	mux.HandleFunc("GET /livez", func(w http.ResponseWriter, r *http.Request) {
		answerChecks(w, r, []Check{{"process", src.Alive()}})
	})
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, r *http.Request) {
		answerChecks(w, r, readiness(src))
	})
	mux.Handle("POST "+disconnectPath, disconnectHandler(src))
	profiles := http.NewServeMux()
	profiles.HandleFunc("/debug/pprof/", pprof.Index)
	profiles.HandleFunc("/debug/pprof/cmdline", pprof.Cmdline)
	profiles.HandleFunc("/debug/pprof/profile", pprof.Profile)
	profiles.HandleFunc("/debug/pprof/symbol", pprof.Symbol)
	profiles.HandleFunc("/debug/pprof/trace", pprof.Trace)
	mux.Handle("GET /debug/pprof/", boundProfileTime(l.gate(adminProfiles, profiles)))
	return mux
}

func readiness(src source) []Check {
	var shutdown error
	if src.Draining() {
		shutdown = errors.New("draining")
	}
	checks := append([]Check{{"process", src.Alive()}}, src.Ready()...)
	return append(checks, Check{"shutdown", shutdown})
}

// answerChecks writes what Kubernetes' own components write: ok, or one line a check.
func answerChecks(w http.ResponseWriter, r *http.Request, checks []Check) {
	status, verdict := http.StatusOK, "ok"
	var lines strings.Builder
	for _, c := range checks {
		if c.Err == nil {
			fmt.Fprintf(&lines, "[+]%s ok\n", c.Name)
			continue
		}
		status, verdict = http.StatusServiceUnavailable, "failed"
		fmt.Fprintf(&lines, "[-]%s failed: %s\n", c.Name, strings.ReplaceAll(c.Err.Error(), "\n", "; "))
	}
	if !r.URL.Query().Has("verbose") && status == http.StatusOK {
		answer(w, status, "ok\n")
		return
	}
	fmt.Fprintf(&lines, "%s check %s\n", strings.TrimPrefix(r.URL.Path, "/"), verdict)
	answer(w, status, lines.String())
}

func answer(w http.ResponseWriter, status int, text string) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	io.WriteString(w, text)
}

// boundProfileTime refuses what would take a place at the gate for long. net/http/pprof extends the write timeout by the seconds
// that it is asked for, whatever they are.
func boundProfileTime(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		for _, text := range r.URL.Query()["seconds"] {
			if n, err := strconv.ParseFloat(text, 64); err == nil && !(n <= adminProfileTime.Seconds()) { // NaN too
				answer(w, http.StatusBadRequest, fmt.Sprintf("seconds: at most %d.\n", int(adminProfileTime.Seconds())))
				return
			}
		}
		next.ServeHTTP(w, r)
	})
}

// metricsHandler has a registry of its own, so that two servers in one process (tests) do not share counters.
func metricsHandler(src source, l *adminListener, log *slog.Logger) http.Handler {
	registry := prometheus.NewRegistry()
	registry.MustRegister(
		collectors.NewGoCollector(collectors.WithGoCollectorRuntimeMetrics(collectorCPU)),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
		buildInfo(readBuildVersion()),
		prometheus.NewCounterFunc(prometheus.CounterOpts{
			Name: "millrace_admin_evicted_connections_total",
			Help: "Connections to the admin address that were closed to make room for others.",
		}, func() float64 { return float64(l.Evicted()) }),
		collector{src},
	)
	return promhttp.HandlerFor(registry, promhttp.HandlerOpts{
		ErrorLog:      slog.NewLogLogger(log.Handler(), slog.LevelError),
		ErrorHandling: promhttp.ContinueOnError, // one bad metric must not blind the operator
	})
}

// collectorCPU adds what the garbage collector takes.
var collectorCPU = collectors.GoRuntimeMetricsRule{Matcher: regexp.MustCompile(`^/cpu/classes/gc/`)}

func buildInfo(v buildVersion) prometheus.Collector {
	info := prometheus.NewGauge(prometheus.GaugeOpts{
		Name:        "millrace_build_info",
		Help:        "Always 1; the labels say which program this is.",
		ConstLabels: prometheus.Labels{"version": v.version, "commit": v.commit, "goversion": v.goVers},
	})
	info.Set(1)
	return info
}

// collector asks the islands when it is scraped: they count per event loop and add up only then. It is
// unchecked (describes nothing), since only a scrape tells which labels exist.
type collector struct{ src source }

func (collector) Describe(chan<- *prometheus.Desc) {}

// violations ends the names under which islands count what would have broken a promise. Whoever is alarmed
// by them does not care where: they become one metric, with the promise as label.
const violations = "_invariant_violations_total"

// sample is one value being added up.
type sample struct {
	name, help string
	counter    bool
	value      float64
	keys       []string
	values     []string
}

func (c collector) Collect(out chan<- prometheus.Metric) {
	var order []*sample
	byKey := make(map[string]*sample)
	c.src.Metrics(func(name, help string, counter bool, value float64, labels ...string) {
		if len(labels)%2 != 0 {
			panic("metric " + name + " has a label without a value")
		}
		if strings.HasSuffix(name, violations) {
			name, help = "millrace"+violations, "Promises that were about to be broken. Anything but 0 is a fault of the program."
		}
		key := name + "\xff" + strings.Join(labels, "\xff")
		if s := byKey[key]; s != nil {
			s.value += value
			return
		}
		s := &sample{name: name, help: help, counter: counter, value: value}
		for i := 0; i < len(labels); i += 2 {
			s.keys = append(s.keys, labels[i])
			s.values = append(s.values, labels[i+1])
		}
		byKey[key] = s
		order = append(order, s)
	})
	for _, s := range order {
		out <- s.metric()
	}
}

func (s *sample) metric() prometheus.Metric {
	kind := prometheus.GaugeValue
	if s.counter {
		kind = prometheus.CounterValue
	}
	desc := prometheus.NewDesc(s.name, s.help, s.keys, nil)
	m, err := prometheus.NewConstMetric(desc, kind, s.value, s.values...)
	if err != nil {
		return prometheus.NewInvalidMetric(desc, err)
	}
	return m
}
