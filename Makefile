# The commands of this repository. They only name what `cargo xtask` does; see CONTRIBUTING.md.

COMMANDS := bench build check demo dev down images lab setup soak test up

.DEFAULT_GOAL := help
.PHONY: help toolchain $(COMMANDS)

help:
	@echo 'make demo    set up what is missing, run a program in a microVM, show what took how long'
	@echo 'make test    set up what is missing, run all tests'
	@echo 'make lab     the tests that need a kernel of their own, in an emulated machine'
	@echo 'make check   format, lints, docs, dependencies, repository rules'
	@echo 'make dev     the stack in the foreground, on 127.0.0.1:8000'
	@echo 'make up      the same in the background; make down stops it'
	@echo 'make bench   measurements, into bench/RESULTS.md, GUEST.md and PERSISTENCE.md; ARGS=firecracker: FIRECRACKER.md'
	@echo 'make soak    the full counts of the long tests, into bench/SOAK.md'
	@echo 'make setup   only the Debian packages; ARGS=--firecracker: also a release of Firecracker'
	@echo 'make images  also kernel and templates; make build: also programs'

# What must be there before cargo can build xtask, which looks after everything else.
toolchain:
	@command -v cargo >/dev/null || { echo 'cargo is missing: install Rust $(shell sed -n "s/^rust-version = //p" Cargo.toml) or newer' >&2; exit 1; }
	@command -v cc >/dev/null || { echo '==> installing gcc and libc6-dev, to link Rust programs with'; \
	  install='apt-get install --yes -qq --no-install-recommends gcc libc6-dev'; export DEBIAN_FRONTEND=noninteractive; \
	  { $$install || { apt-get update -qq && $$install; }; } </dev/null >/dev/null; }

$(COMMANDS): toolchain
	@xtask/run $@ $(ARGS)
