# SPDX-License-Identifier: Apache-2.0
# A thin layer over CMake. `make run` and `make test` do all the set-up on a fresh Debian 12, as root.
PRESET ?= release
PREFIX ?= /usr/local
JOBS   ?= $(shell nproc)
CMD    ?=
export PRESET

.PHONY: help build run test unit fuzz bench asan tsan install clean packages
help:
	@echo "make run               boot a small Debian and leave you at its shell"
	@echo "make run CMD='uname -a'  run a command in it, print what it says, power off"
	@echo "make test              build and run every test"
	@echo "make unit              the quick tests only: no guest kernel is booted"
	@echo "make fuzz              feed broken images, packets and messages to their parsers, a minute each (SECONDS=…)"
	@echo "make bench             measure against QEMU"
	@echo "make asan | make tsan  the quick tests under the sanitizers"
	@echo "make install PREFIX=…  install (default: /usr/local)"

packages:
	@scripts/install-packages

build: packages
	@mkdir -p build && { cmake --preset $(PRESET) >build/configure.log 2>&1 || { cat build/configure.log; exit 1; }; }
	@cmake --build build/$(PRESET) -j $(JOBS)

run: build
	@scripts/run-debian '$(subst ','\'',$(value CMD))'

test: packages
	@scripts/test

unit: build
	@scripts/test --quick

fuzz: packages
	@scripts/fuzz $(or $(SECONDS),60)

bench: build
	@scripts/bench

asan tsan: packages
	@PRESET=$@ scripts/test --quick

install: build
	@cmake --install build/$(PRESET) --prefix '$(PREFIX)'

clean:
	@rm -rf build out
