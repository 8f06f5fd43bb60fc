# millrace: `make` lists the targets. Everything needs Go only; the race detector also a C compiler.

BINARY      := millrace
STATICCHECK := honnef.co/go/tools/cmd/staticcheck@v0.8.2

# The race detector needs cgo, which Go turns off by itself where no C compiler is found.
RACE := $(if $(filter 1,$(shell go env CGO_ENABLED)),-race)
# The version comes from git; a tree that git will not read (an archive, another owner) builds without one.
VCS  := -buildvcs=$(shell git rev-parse HEAD >/dev/null 2>&1 && echo auto || echo false)

ARGS     ?=
FUZZTIME ?= 20s
SEEDS    ?= 20000
SEED     ?=
KILLS    ?= 50
BENCH    ?= .

.DEFAULT_GOAL := help
.PHONY: help run build test vet lint fuzz sim test-crash test-flood bench clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

run: build ## build and serve on this machine (ARGS="--edge-addr 127.0.0.1:9000")
	@exec ./$(BINARY) serve $(ARGS)

build: ## build the static binary ./millrace
	CGO_ENABLED=0 go build -trimpath $(VCS) -o $(BINARY) .

test: ## every test that needs nothing but Go, with the race detector where a C compiler is found
	$(if $(RACE),,@echo "no C compiler: testing without the race detector")
	go test $(RACE) -timeout 10m ./...
	go test $(RACE) -tags echo -run "Autobahn|Echo" ./edge # the echo path is in no other build
	go test -run "Alloc|Garbage" ./backend ./edge ./protocol/token # what the race detector would falsify

vet: ## go vet, with and without the crash points and the echo path
	go vet ./...
	go vet -tags crashpoints ./...
	go vet -tags echo ./edge

lint: ## staticcheck
	go run $(STATICCHECK) ./...
	go run $(STATICCHECK) -tags crashpoints ./...
	go run $(STATICCHECK) -tags echo ./edge

# Before Go 1.27 the end of -fuzztime can fail with nothing but its own expired deadline (go.dev/issue/75804). A hang looks the same, but
# comes again.
fuzz: ## each fuzz target for FUZZTIME (20s)
	@set -e; log=$$(mktemp); trap 'rm -f $$log' EXIT; \
	fuzz() { go test -run '^$$' -fuzz "^$$2$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 10x "$$1" </dev/null >$$log 2>&1; }; \
	expired() { grep -q 'context deadline exceeded' $$log && ! grep -q 'Failing input written' $$log; }; \
	grep -rn --include='*_test.go' -o '^func Fuzz[A-Za-z0-9_]*' . | sort | while IFS=: read -r file _ target; do \
		dir=$$(dirname $$file); target=$${target#func }; echo "fuzz $$dir $$target"; \
		fuzz $$dir $$target || { expired && echo "past its deadline: once more" && fuzz $$dir $$target; } || { cat $$log; exit 1; }; \
		grep 'execs:' $$log | tail -1 || true; \
	done

sim: ## the simulation with SEEDS seeds (20000), or with the one SEED and its transcript
	go test -run '^TestSimulation$$' -count=1 -timeout 0 . -args $(if $(SEED),-sim.seed=$(SEED),-sim.seeds=$(SEEDS))

test-crash: ## kill the real server KILLS times (50), at random and at each crash point, and check what is left
	go test -tags crashpoints -run '^TestKill' -count=1 -timeout 60m -v . -args -kills=$(KILLS)

test-flood: ## the floods in their long form, against the real server (5 minutes; a silent network takes root)
	go test -run '^TestFlood' -count=1 -timeout 20m -v . -args -floods

bench: ## the benchmarks (BENCH=regexp)
	go test -run '^$$' -bench '$(BENCH)' -benchmem ./...

clean: ## remove what was built; the data directory stays
	rm -f $(BINARY) *.test *.out *.prof
