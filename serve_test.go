package main

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"os"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// fakeServer takes as long as it is told.
type fakeServer struct {
	drainFor time.Duration // longer than the context: returns its error
	closeFor time.Duration
	closeErr error
	done     chan error

	drained bool
	closed  bool
}

func (s *fakeServer) Drain(ctx context.Context) error {
	s.drained = true
	select {
	case <-time.After(s.drainFor):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (s *fakeServer) Close() error {
	time.Sleep(s.closeFor) // fake time
	s.closed = true
	return s.closeErr
}

func (s *fakeServer) Done() <-chan error { return s.done }

// supervised runs supervise in fake time; drive acts as the outside world once the server runs.
func supervised(t *testing.T, s *fakeServer, drive func(signals chan os.Signal)) (code int, took time.Duration, log string) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		var lines bytes.Buffer
		s.done = make(chan error, 1)
		signals := make(chan os.Signal, 2)
		running := make(chan struct{})
		go func() {
			<-running
			drive(signals)
		}()
		begun := time.Now()
		err := supervise(
			func(context.Context) (*fakeServer, error) { return s, nil },
			func(*fakeServer) { close(running) },
			signals, slog.New(slog.NewTextHandler(&lines, nil)))
		code, took = (&program{err: &lines}).fail(err), time.Since(begun)
		time.Sleep(time.Hour) // fake time: lets a close that was left behind finish
		synctest.Wait()
		log = lines.String()
	})
	return code, took, log
}

func TestSignalDrainsAndExitsWithZero(t *testing.T) {
	s := &fakeServer{drainFor: 3 * time.Second, closeFor: time.Second}
	code, took, log := supervised(t, s, func(signals chan os.Signal) { signals <- syscall.SIGTERM })
	if code != exitOK || took != 4*time.Second || !s.drained || !s.closed {
		t.Errorf("code %d after %v, drained %v, closed %v\n%s", code, took, s.drained, s.closed, log)
	}
}

func TestSlowDrainIsCutAndStillExitsWithZero(t *testing.T) {
	s := &fakeServer{drainFor: time.Hour, closeFor: time.Second}
	code, took, log := supervised(t, s, func(signals chan os.Signal) { signals <- syscall.SIGINT })
	if code != exitOK || took > 10*time.Second || !s.closed || !strings.Contains(log, "drain ended early") {
		t.Errorf("code %d after %v, closed %v\n%s", code, took, s.closed, log)
	}
}

func TestHangingCloseIsLeftBehind(t *testing.T) {
	s := &fakeServer{closeFor: time.Minute}
	code, took, log := supervised(t, s, func(signals chan os.Signal) { signals <- syscall.SIGTERM })
	if code != exitFailure || took > 10*time.Second || !strings.Contains(log, "did not stop in time") {
		t.Errorf("code %d after %v\n%s", code, took, log)
	}
}

func TestFailedCloseIsAFailure(t *testing.T) {
	s := &fakeServer{closeErr: errors.New("disk on fire")}
	code, _, log := supervised(t, s, func(signals chan os.Signal) { signals <- syscall.SIGTERM })
	if code != exitFailure || !strings.Contains(log, "disk on fire") {
		t.Errorf("code %d\n%s", code, log)
	}
}

func TestSecondSignalExitsAtOnce(t *testing.T) {
	s := &fakeServer{drainFor: time.Hour}
	code, took, log := supervised(t, s, func(signals chan os.Signal) {
		signals <- syscall.SIGTERM
		time.Sleep(time.Second) // fake time
		signals <- syscall.SIGTERM
	})
	if code != exitFailure || took != time.Second || !strings.Contains(log, "second signal") {
		t.Errorf("code %d after %v\n%s", code, took, log)
	}
}

func TestServerThatStopsByItselfIsFatal(t *testing.T) {
	for _, failure := range []error{errors.New("accept: too many open files"), nil} {
		s := &fakeServer{}
		code, _, log := supervised(t, s, func(chan os.Signal) { s.done <- failure })
		if code != exitFailure || !s.closed || s.drained || !strings.Contains(log, "fatal") {
			t.Errorf("%v: code %d, closed %v, drained %v\n%s", failure, code, s.closed, s.drained, log)
		}
	}
}

func TestFailedStartIsLoggedOnce(t *testing.T) {
	var lines bytes.Buffer
	err := supervise(
		func(context.Context) (*fakeServer, error) { return nil, errors.New("data directory is in use") },
		func(*fakeServer) { t.Error("told as started") },
		nil, slog.New(slog.NewTextHandler(&lines, nil)))
	if code := (&program{err: &lines}).fail(err); code != exitFailure || strings.Count(lines.String(), "in use") != 1 {
		t.Errorf("code %d\n%s", code, lines.String())
	}
}

func TestSignalWhileStartingCancelsTheStart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		signals := make(chan os.Signal, 2)
		signals <- syscall.SIGTERM
		err := supervise(
			func(ctx context.Context) (*fakeServer, error) {
				<-ctx.Done()
				return nil, ctx.Err()
			},
			func(*fakeServer) { t.Error("told as started") },
			signals, slog.New(slog.DiscardHandler))
		if err != nil {
			t.Errorf("got %v", err)
		}
	})
}

func TestSignalWhileStartingStopsWhatStartedAnyway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		signals := make(chan os.Signal, 2)
		signals <- syscall.SIGTERM
		s := &fakeServer{}
		err := supervise(
			func(ctx context.Context) (*fakeServer, error) {
				<-ctx.Done()
				return s, nil
			},
			func(*fakeServer) {}, signals, slog.New(slog.DiscardHandler))
		if err != nil || !s.closed {
			t.Errorf("got %v, closed %v", err, s.closed)
		}
	})
}

func TestWelcomeHasCommandsThatWork(t *testing.T) {
	c, err := loadConfig(map[string]string{"data-dir": "/var/lib/my data", "edge-addr": "127.0.0.1:0"}, "", nil)
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	welcome(&out, c, "127.0.0.1:43211", "127.0.0.1:43212", "./millrace")
	for _, want := range []string{
		"ws://127.0.0.1:43211/ws\n",
		"http://127.0.0.1:43212 ",
		"./millrace token alice --data-dir '/var/lib/my data'\n",
		"./millrace chat --as bob --with alice --data-dir '/var/lib/my data' --url ws://127.0.0.1:43211/ws\n",
		"--auth-secret-file millrace.secret",
	} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("%q is missing in\n%s", want, out.String())
		}
	}

	c, err = loadConfig(nil, "", nil)
	if err != nil {
		t.Fatal(err)
	}
	out.Reset()
	welcome(&out, c, "127.0.0.1:8080", "127.0.0.1:8082", "./millrace")
	if want := "./millrace chat --as alice --with bob\n"; !strings.Contains(out.String(), want) {
		t.Errorf("%q is missing in\n%s", want, out.String())
	}
}

func TestEndpoint(t *testing.T) {
	for addr, want := range map[string]string{
		"127.0.0.1:1": "ws://127.0.0.1:1/ws", ":1": "ws://127.0.0.1:1/ws", "0.0.0.0:1": "ws://127.0.0.1:1/ws", "[::]:1": "ws://[::1]:1/ws", "chat.example:1": "ws://chat.example:1/ws",
	} {
		if got := endpoint(addr); got != want {
			t.Errorf("%s: got %s, want %s", addr, got, want)
		}
	}
}
