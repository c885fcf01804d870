# The front door. `make demo` and `make test` do all their own set-up on a fresh Debian with rustup, git and make.
SHELL := /bin/bash
PREFIX ?= /usr/local
PG_CONFIG ?= pg_config
.PHONY: demo test check bench install package soak clean help

help:
	@echo 'make demo      set up, then: a private cluster, real traffic, a disaster, one tenant restored, proof'
	@echo 'make test      set up, then every test, against PostgreSQL 15 and 18, SeaweedFS and the file system'
	@echo 'make check     formatting, lints, documentation'
	@echo 'make bench     the side-by-side benchmarks; writes target/bench.json'
	@echo 'make install   the extension into the PostgreSQL of PG_CONFIG=$(PG_CONFIG), coffer into PREFIX=$(PREFIX)'
	@echo 'make package   the same files below target/dist'

demo:
	@tests/setup.sh demo
	@. target/env.sh && $$COFFER_BIN demo $(DEMO_ARGS)

test:
	@tests/setup.sh test
	@. target/env.sh && cargo test -q --features coffer/failpoints -- --test-threads=2
	@. target/env.sh && tests/regress.sh

check:
	@tests/setup.sh demo
	cargo fmt --all --check
	cargo clippy -q --all-targets --features coffer/failpoints -- -D warnings
	PGRX_HOME=$$PWD/target/pgrx cargo clippy -q -p pg_coffer -- -D warnings
	RUSTDOCFLAGS='-D warnings' cargo doc -q --no-deps
	cargo test -q --doc

clean:
	cargo clean
