# The binaries are static and need no C compiler.
export CGO_ENABLED = 0

BIN = build/nftwl
BENCH = build/bench
# Runs a command in new user, network and mount namespaces: it cannot reach the
# host's ruleset, and needs no root.
NAMESPACE = unshare --user --map-root-user --net --mount

.PHONY: build packages demo test test-deps race lint generate bench soak storm fuzz clean

build:
	go build -trimpath -o build/ ./cmd/nftwl ./cmd/nftwld

# A .deb, an .rpm and an .apk for amd64 and for arm64, in build/packages. The
# version comes from git, or from `make packages VERSION=1.2.3`.
packages:
	sh contrib/packaging/build.sh

# Shows connections through the firewall before and after a login and a ban, in
# namespaces, without root.
demo: build
	PATH=$(CURDIR)/build:$$PATH go run ./testdata/demo

# Everything: unit tests, the kernel in namespaces, real Dovecot, systemd and
# nft of two Debian releases. As root on Debian, it installs what it needs.
test: test-deps lint
	go test -timeout 40m ./...

test-deps:
	sh testdata/deps.sh

# The same under the race detector, which needs a C compiler.
race: test-deps
	CGO_ENABLED=1 go test -race -timeout 60m ./...

# ./... does not include testdata.
LINTED = ./... ./testdata/bench/... ./testdata/demo
lint:
	test -z "$$(gofmt -l .)" || { gofmt -d .; exit 1; }
	go vet $(LINTED)
	go tool staticcheck $(LINTED)

# The manual pages of the commands, and docs/faults.md.
generate:
	go generate ./cmd/...

# The performance tables of docs/measurements.md, in one run. Listing a set of a
# million elements takes the kernel a minute: MOST=65535 leaves it out.
MOST = 1000000
bench: test-deps build
	go build -trimpath -o $(BENCH)/ ./testdata/bench/...
	$(NAMESPACE) $(BENCH)/login -nftwl $(BIN) -empty $(BENCH)/empty -library $(BENCH)/library \
		-script testdata/bench/login/trust.sh -rules contrib/nftables/sets.nft
	@test "$$(id -u)" = 0 || echo "bench: whole logins, saving and restoring are measured by root alone: Dovecot needs its users, and nft a large socket"
	go test -run '^$$' -bench . -benchtime 1x -timeout 30m ./cmd/nftwl/e2e/dovecot ./cmd/nftwld/e2e ./cmd/nftwld/e2e/cluster
	test "$$(id -u)" != 0 || PATH=$(CURDIR)/build:$$PATH unshare --net $(BENCH)/snapshot -most $(MOST)

# Random logins, bans, saves and restores, compared with a model; the same on three
# machines that share the sets, with an engine that is cut off, killed and emptied;
# and reloads, restarts, saves, reboots and power cuts in random orders, under systemd
# and OpenRC.
SOAK = 10m
soak: test-deps
	SOAK=$(SOAK) go test -count=1 -timeout 2h -run TestSoak -v ./cmd/nftwl
	SOAK=$(SOAK) go test -count=1 -timeout 2h -run TestSoak -v ./cmd/nftwld/e2e/cluster
	SOAK=$(SOAK) go test -count=1 -timeout 2h -run Steps -v ./cmd/nftwl/e2e/systemd

# Thousands of logins at once, and hundreds through a real Dovecot.
storm: test-deps
	STORM=5000 go test -count=1 -run TestStorm -v ./cmd/nftwl
	STORM=500 go test -count=1 -run TestStorm -v ./cmd/nftwl/e2e/dovecot

# Each parser for FUZZTIME of wall time.
FUZZTIME = 1m
fuzz:
	go test -run '^$$' -fuzz FuzzParse -fuzztime $(FUZZTIME) -fuzzminimizetime 1x ./pkg/config
	go test -run '^$$' -fuzz FuzzParse -fuzztime $(FUZZTIME) -fuzzminimizetime 1x ./pkg/snapshot
	go test -run '^$$' -fuzz FuzzParseTimeout -fuzztime $(FUZZTIME) -fuzzminimizetime 1x ./pkg/nftset
	go test -run '^$$' -fuzz FuzzDecide -fuzztime $(FUZZTIME) -fuzzminimizetime 1x ./pkg/trust
	go test -run '^$$' -fuzz FuzzParsePostLogin -fuzztime $(FUZZTIME) -fuzzminimizetime 1x ./pkg/install
	go test -run '^$$' -fuzz FuzzRecord -fuzztime $(FUZZTIME) -fuzzminimizetime 1x ./pkg/cluster

clean:
	rm -rf build
