# braggflux: set-up, demo and tests. Every target first makes what it needs; a second make is quick.
#
#   make env     environment in .venv (and DIALS by apt, where that is allowed; make test, chromium too)
#   make demo    simulate frames, process them beside DIALS, end with the peak table
#   make test    all tests; make test-fast leaves out the slow ones
#   make fuzz    damaged files to every reader: make fuzz FUZZ_CASES=1000
#   make bench   cost of the extraction beside that of decompression
#   make docs    the documents as a site, in build/docs
#   make lock    .ci/requirements.lock of what .venv holds now
#   make lint    ruff and mypy (.ci/run calls it, then the tests)
#
# A smaller torch for a machine without a GPU:
#   make env TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := env

VENV ?= .venv
TORCH ?= torch==2.13.0
PYTHON ?=
PYTEST_ARGS ?=
BENCH_ARGS ?=
FUZZ_CASES ?= 100000
FUZZ_ARGS ?=
# Each worker holds its own torch, a GB at worst; a file's tests share what its fixtures made.
PYTEST_JOBS ?= --numprocesses auto --maxprocesses 4 --dist loadfile
DEMO ?= demo

BIN := $(VENV)/bin
# The versions that the tests were last seen to pass with, by the hash of each file.
LOCK_FITS := import platform, sys; \
    sys.exit((sys.version_info[:2], sys.platform, platform.machine()) != ((3, 11), "linux", "x86_64"))
STAMP := $(VENV)/.installed
DEMO_NAME := hewl-iodide
# The edges of the simulated detector; beyond, only its corners record anything.
DEMO_D_MIN := 2.5

.PHONY: env dials browser demo test test-fast fuzz bench lock lint docs reference-config

env: $(STAMP)

# Debian's DIALS brings dxtbx for the system Python, which the environment must then be able to see.
$(STAMP): pyproject.toml .ci/requirements.lock
	@$(MAKE) --no-print-directory dials
	@python="$(PYTHON)"; \
	if [ -z "$$python" ] && /usr/bin/python3 -c 'import importlib.util as u, sys; \
	    sys.exit(sys.version_info < (3, 11) or u.find_spec("dxtbx") is None)' 2>/dev/null; then \
	  python="/usr/bin/python3"; options="--system-site-packages"; \
	else \
	  python="$${python:-python3}"; options=""; \
	fi; \
	if [ ! -x "$(BIN)/python" ]; then \
	  echo "make env: $$python -m venv $$options $(VENV)"; \
	  "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	    || { echo "make env: $$python is older than 3.11; give another one: make env PYTHON=..." >&2; exit 1; }; \
	  "$$python" -m venv $$options "$(VENV)" \
	    || { rm -rf "$(VENV)"; echo "make env: $$python cannot make environments; install python3-venv" >&2; exit 1; }; \
	fi
	"$(BIN)/python" -m pip install --quiet $(TORCH)
	@if "$(BIN)/python" -c '$(LOCK_FITS)'; then \
	  "$(BIN)/python" -m pip install --quiet --no-deps --require-hashes -r .ci/requirements.lock; \
	else \
	  echo "make env: .ci/requirements.lock is for Python 3.11 on x86-64 Linux; versions by the ranges of pyproject.toml"; \
	fi
	"$(BIN)/python" -m pip install --quiet --editable ".[dev,docs]"
	@"$(BIN)/braggflux" --version
	@touch "$@"

# Optional: everything but `braggflux process`, .cbf frames and the tests against DIALS works without.
dials:
	@command -v dials.import >/dev/null \
	|| $(call apt_install,DIALS,dials python3-venv,'braggflux process'$(COMMA) .cbf frames and the DIALS row)

# Optional: the tests of report and viewer skip without one.
browser:
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null \
	|| $(call apt_install,chromium,chromium,the tests of report and viewer)

COMMA := ,
# $(call apt_install,NAME,PACKAGES,WHAT NEEDS IT): install, or say what is missing and go on.
define apt_install
{ \
	if ! command -v apt-get >/dev/null; then \
	  echo "make env: no $(1) and no apt-get; skipped. It is for $(3); see docs/install.md"; \
	  exit 0; \
	fi; \
	if [ "$$(id -u)" = 0 ]; then root=""; \
	elif sudo -n true 2>/dev/null; then root="sudo -n"; \
	else \
	  echo "make env: no $(1) and no right to install it; skipped. For $(3): sudo apt install $(2)"; \
	  exit 0; \
	fi; \
	echo "make env: apt-get install $(2)"; \
	{ $$root apt-get update -qq \
	  && $$root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(2); \
	} >/dev/null || echo "make env: apt-get could not install $(1); going on without it"; \
	}
endef

# Resuming makes a second `make demo` go on where the first one stopped, or just show its table.
demo: $(STAMP) $(DEMO)/frames/model.pdb
	@frames="$(DEMO)/frames"; \
	truth=$$(ls "$$frames"/*truth*.mtz); \
	if command -v dials.import >/dev/null; then \
	  "$(BIN)/braggflux" process "$$frames"/*_master.h5 --model "$$frames/model.pdb" \
	    --space-group P43212 --d-min $(DEMO_D_MIN) --truth "$$truth" --out "$(DEMO)/run" --resume; \
	else \
	  echo "make demo: no DIALS, so the true geometry is used and the DIALS row is missing"; \
	  "$(BIN)/braggflux" run "$$frames"/*.expt "$$frames"/*.refl --model "$$frames/model.pdb" --d-min $(DEMO_D_MIN) \
	    --out "$(DEMO)/run" --resume; \
	fi

# What an interrupted simulation has left stands in the way of the next: nothing is written over.
$(DEMO)/frames/model.pdb: | $(STAMP)
	@rm -f "$(DEMO)"/frames/*_master.h5 "$(DEMO)"/frames/truth.*
	"$(BIN)/braggflux" simulate --out "$(DEMO)/frames" --preset $(DEMO_NAME)

test: $(STAMP) browser
	"$(BIN)/python" -m pytest $(PYTEST_JOBS) $(PYTEST_ARGS)

test-fast: $(STAMP) browser
	"$(BIN)/python" -m pytest $(PYTEST_JOBS) -m "not slow" $(PYTEST_ARGS)

fuzz: $(STAMP)
	"$(BIN)/python" tests/fuzz/campaign.py --cases $(FUZZ_CASES) $(FUZZ_ARGS)

bench: $(STAMP)
	"$(BIN)/python" benchmarks/extraction.py $(BENCH_ARGS)

lock: $(STAMP)
	"$(BIN)/python" .ci/lock.py > .ci/requirements.new && mv .ci/requirements.new .ci/requirements.lock

lint: $(STAMP)
	"$(BIN)/ruff" check .
	"$(BIN)/ruff" format --check .
	"$(BIN)/mypy"

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 "$(BIN)/mkdocs" build --quiet --strict

# After an option has been added or changed.
reference-config: $(STAMP)
	"$(BIN)/python" -c 'from braggflux.pipelines.config.run import write_reference_config; write_reference_config()'
