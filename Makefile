# SPDX-License-Identifier: MIT
# Every target sets up what it needs in .venv first; a second call finds it done. Variables, with their defaults:
#   PYTHON=python3        the interpreter that .venv is made with
#   FASTDIFF_BUILD=auto   what is compiled: auto, cpu, cuda or none (see setup.py)
#   PIP_ARGS=             more options for pip install
#   PYTEST_ARGS=          more options for pytest, such as PYTEST_ARGS="-n 4 -k philox"
#   BENCH_ARGS=           more options for the benchmarks
#   SOAK_ARGS=            more options for the soak, such as SOAK_ARGS="--steps 5000 --only eta"
#   VERSIONS=             the versions of torch that `make compat` proves the package with
#   PYTHONS=              interpreters, each with its torch, that `make wheels` builds for

PYTHON ?= python3
FASTDIFF_BUILD ?= auto
PIP_ARGS ?=
PYTEST_ARGS ?=
BENCH_ARGS ?=
SOAK_ARGS ?=
VERSIONS ?= 2.6.0 2.7.1 2.11.0 2.12.1 2.13.0 2.14.1
PYTHONS ?= $(PY)
COMPAT_ARGS ?=
export FASTDIFF_BUILD

VENV := .venv
BIN := $(VENV)/bin
PY := $(BIN)/python
# Stamps: empty files, as old as the step that they stand for. The build's carries its mode, so that another mode builds.
PACKAGES := $(VENV)/.stamp-packages
INSTALL := $(VENV)/.stamp-install
BUILD := $(VENV)/.stamp-build-$(FASTDIFF_BUILD)

# An extension with sanitizers has a folder of its own, beside a copy of the package. SANITIZE_TESTS: the tests that run
# our C++ on every kind of call; what is not there yet, or not any more, is left out.
SANITIZED := build/sanitize
SANITIZE_TESTS ?= $(sort $(shell find tests -false $(patsubst %,-o -name 'test_%.py',step_parity step_layout step_overlap \
  step_functional step_checks step_dtypes step_properties step_memory step_allocation step_streaming blocks binding_fuzz* \
  reductions reductions_ops philox* rows seeds copy_kernel torch_noise dropin_loop \
  dropin_beginnings dropin_brownian)))

# The tests that draw their examples.
FUZZ_TESTS ?= $(sort $(shell find tests -name 'test_*.py' -exec grep -l '^from hypothesis' {} +))

CSRC := $(shell find csrc -type f \( -name '*.cpp' -o -name '*.h' -o -name '*.inc' -o -name '*.cu' -o -name '*.cuh' \) 2>/dev/null | sort)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup versions sample test fuzz sanitize lint format bench soak gpu compat wheels clean

help:  ## show this list
	@sed -n 's/^\([a-z]*\):.*  ## /\1|/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "  make %-9s %s\n", $$1, $$2 }'

sample: $(BUILD)  ## draw 100 digits with the small model that ships, into samples.png
	$(BIN)/fastdiff sample --sampler dpmsolver++ --steps 20 --guidance-scale 3 --classes 0-9 --n 100 --seed 0 --out samples.png

test: $(BUILD)  ## run the tests
	$(PY) -m pytest $(PYTEST_ARGS)

fuzz: $(BUILD)  ## run the properties on thousands of fresh examples: half an hour or more
	HYPOTHESIS_PROFILE=thorough $(PY) -m pytest $(PYTEST_ARGS) $(FUZZ_TESTS)

sanitize: $(INSTALL)  ## run the tests of the step over a build with address and undefined-behaviour sanitizers
	@rm -rf $(SANITIZED)/lib
	FASTDIFF_SANITIZE=1 FASTDIFF_BUILD=cpu $(PY) setup.py --quiet build --build-base $(SANITIZED) --build-lib $(SANITIZED)/lib
	$(PY) tests/support/sanitize.py $(SANITIZED)/lib $(SANITIZE_TESTS)

lint: $(PACKAGES)  ## check format, lint and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(if $(CSRC),$(BIN)/clang-format --dry-run -Werror $(CSRC))

format: $(PACKAGES)  ## rewrite the sources in the house format
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	$(if $(CSRC),$(BIN)/clang-format -i $(CSRC))

bench: $(BUILD)  ## print what a step costs beside its peers
	$(PY) -m benchmarks $(BENCH_ARGS)

soak: $(BUILD)  ## take 100000 steps of each kind and fail where memory grows: a quarter of an hour or more
	$(PY) -m benchmarks.soak $(SOAK_ARGS)

# No .venv and no pip: the machine with the GPU has what it has. The script says which variables it takes.
gpu:  ## on a machine with an NVIDIA GPU: build, prove, measure; DRY=1 rehearses on the CPU, STAGES="build test" picks
	@benchmarks/gpu.sh

# No .venv either: each version of torch has an environment of its own under build/compat, of half a gigabyte and more.
compat:  ## prove the package beside other versions of torch: VERSIONS="2.6.0 2.14.1", COMPAT_ARGS="--tests tests/ops/test_compile.py"
	$(PYTHON) tools/compat.py $(COMPAT_ARGS) $(VERSIONS)

wheels: $(PACKAGES)  ## build the sdist, the pure wheel, and wheels with the extension for each of PYTHONS, into dist
	PATH="$(CURDIR)/$(BIN):$$PATH" FASTDIFF_BUILD=$(if $(filter cuda,$(FASTDIFF_BUILD)),cuda,cpu) tools/build_wheels.sh $(PYTHONS)

setup: $(BUILD)  ## make .venv and build the extension

versions: $(PACKAGES)  ## print the versions of the packages that matter
	@$(PY) -m pip list --format=freeze 2>/dev/null | grep -iE '^(torch|triton|diffusers|numpy|setuptools|pytest|hypothesis|ruff|mypy|clang-format)=='

clean:  ## remove everything that was made, .venv too
	rm -rf $(VENV) build dist *.egg-info samples.png .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -f fastdiff/_C*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A .venv that is there already is kept.
$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "make: $(PYTHON) is missing or older than 3.10, expected Python 3.10 or newer; name one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) && $(PY) -m pip --version >/dev/null || { rm -rf $(VENV); \
	  echo "make: $(PYTHON) cannot make a virtual environment with pip, expected the modules venv and ensurepip;" \
	       "install them (on Debian and Ubuntu: apt-get install python3-venv)" >&2; exit 1; }

$(PACKAGES): requirements-dev.txt | $(PY)
	@echo "installing requirements-dev.txt into $(VENV): a minute or two"
	@$(PY) -m pip install --disable-pip-version-check --quiet $(PIP_ARGS) -r requirements-dev.txt
	@touch $@

# Installing and compiling are two steps: pip compiles in a new folder each time, while building in place lets ninja
# compile again only what changed, and shows the compiler's messages.
$(INSTALL): pyproject.toml setup.py $(PACKAGES)
	FASTDIFF_BUILD=none $(PY) -m pip install --disable-pip-version-check --quiet --no-build-isolation --no-deps -e .
	@touch $@

# The folders stand beside their files so that a removed source counts as a change. Another torch in .venv is a change too.
$(BUILD): setup.py $(CSRC) $(sort $(dir $(CSRC))) $(INSTALL) $(wildcard $(VENV)/lib/python*/site-packages/torch-*.dist-info/RECORD)
	@command -v $(firstword $(or $(CXX),c++)) >/dev/null || \
	  echo "make: there is no C++ compiler; the reference backend in plain torch will do the work, and slower" >&2
	@rm -f fastdiff/_C*.so $(VENV)/.stamp-build-*
	$(PY) setup.py --quiet build_ext --inplace
	@touch $@
