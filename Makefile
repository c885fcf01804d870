# The front door. `make demo` and `make test` do all their own set-up on a fresh Debian with rustup, git and make.
SHELL := /bin/bash
PREFIX ?= /usr/local
PG_CONFIG ?= pg_config
# As tests/setup.sh builds it, so that nothing is built twice.
FEATURES := coffer/failpoints,coffer/parquet
.PHONY: demo test check bench install package soak clean help

help:
	@echo 'make demo      set up, then: a private cluster, real traffic, a disaster, one tenant restored, proof'
	@echo 'make test      set up, then every test, against PostgreSQL 15 and 18, SeaweedFS and the file system'
	@echo 'make check     formatting, lints, documentation'
	@echo 'make soak      random schemas and workloads against restores for MINUTES=10, from SEED=n on'
	@echo 'make bench     the side-by-side benchmarks; writes target/bench.json'
	@echo 'make install   the extension into the PostgreSQL of PG_CONFIG=$(PG_CONFIG), coffer into PREFIX=$(PREFIX)'
	@echo 'make package   the same files below target/dist'

demo:
	@tests/setup.sh demo
	@. target/env.sh && $$COFFER_BIN demo $(DEMO_ARGS)

test:
	@tests/setup.sh test
	@. target/env.sh && cargo test -q --features $(FEATURES) -- --test-threads=4
	@. target/env.sh && tests/regress.sh

# A failure names its seed and its script; SEED=n without MINUTES repeats one case of `make test`.
MINUTES ?= 10
SEED ?= 1000
soak:
	@tests/setup.sh test
	@. target/env.sh && COFFER_TEST_MINUTES=$(MINUTES) SEED=$(SEED) \
	  cargo test -q --features $(FEATURES) --test main -- oracle:: --nocapture --test-threads=2

check:
	@tests/setup.sh demo
	cargo fmt --all --check
	cargo clippy -q --all-targets --features $(FEATURES) -- -D warnings
	PGRX_HOME=$$PWD/target/pgrx cargo clippy -q -p pg_coffer -- -D warnings
	RUSTDOCFLAGS='-D warnings -A rustdoc::private_intra_doc_links' cargo doc -q --no-deps
	cargo test -q --doc

# BENCH='decode' runs the benchmarks whose name contains the word.
bench:
	@tests/setup.sh demo
	@tests/benches/run.sh $(BENCH)

# What install and package share. The extension is built for the PostgreSQL that PG_CONFIG names, in release; a home of
# its own keeps cargo-pgrx's configuration of the tests as it is. SUDO=sudo writes with sudo what an ordinary user built.
SUDO ?=
PG_CONFIG_PATH = $(shell command -v $(PG_CONFIG))
PG_MAJOR = $(shell $(PG_CONFIG) --version | sed -E 's/^PostgreSQL ([0-9]+).*/\1/')
PGRX = PATH="$$PWD/target/tools/bin:$$PATH" PGRX_HOME="$$PWD/target/pgrx-install" CARGO_PGRX_DISABLE_GC_SECTIONS_WORKAROUND=1 cargo pgrx
PGRX_ARGS = -p pg_coffer --manifest-path pg_extension/Cargo.toml --no-default-features --features pg$(PG_MAJOR) --pg-config $(PG_CONFIG_PATH)

install: release
	$(PGRX) install --release $(if $(SUDO),--sudo) $(PGRX_ARGS)
	$(call install-agent,)

package: release
	rm -rf target/dist
	$(PGRX) package $(PGRX_ARGS) --out-dir target/dist
	$(call install-agent,target/dist)
	@echo "packaged below target/dist: $$(cd target/dist && find . -type f | wc -l) files"

define install-agent
	$(SUDO) install -Dm 755 target/release/coffer $(1)$(PREFIX)/bin/coffer
	$(SUDO) install -Dm 644 target/release/coffer.1 $(1)$(PREFIX)/share/man/man1/coffer.1
	$(SUDO) install -Dm 644 target/release/coffer.bash $(1)$(PREFIX)/share/bash-completion/completions/coffer
	$(SUDO) install -Dm 644 target/release/coffer.zsh $(1)$(PREFIX)/share/zsh/site-functions/_coffer
	$(SUDO) install -Dm 644 target/release/coffer.fish $(1)$(PREFIX)/share/fish/vendor_completions.d/coffer.fish
	$(SUDO) install -Dm 644 docker/coffer.service $(1)$(PREFIX)/lib/systemd/system/coffer.service
endef

.PHONY: release
release:
	@test -n "$(PG_MAJOR)" || { echo "PG_CONFIG=$(PG_CONFIG) does not run; name the pg_config of your server" >&2; exit 2; }
	@target/tools/bin/cargo-pgrx pgrx --version 2>/dev/null | grep -q ' 0\.18\.1' || \
	  cargo install cargo-pgrx --version =0.18.1 --locked --debug --root target/tools --target-dir target/cargo-pgrx
	@mkdir -p target/pgrx-install
	@test -e target/pgrx-install/.pg$(PG_MAJOR) || { $(PGRX) init --pg$(PG_MAJOR) $(PG_CONFIG_PATH) && touch target/pgrx-install/.pg$(PG_MAJOR); }
	cargo build --release -p coffer
	@target/release/coffer man >target/release/coffer.1
	@for s in bash zsh fish; do target/release/coffer completions $$s >target/release/coffer.$$s; done

clean:
	cargo clean
