# SPDX-License-Identifier: MIT
# Every target first creates .venv and installs its requirements, if that is not done yet. Variables and their defaults:
#   PYTHON=python3        the interpreter that .venv is made with
#   FASTDIFF_BUILD=auto   what is compiled: auto, cpu, cuda or none (see setup.py)
#   PIP_ARGS=             more options for pip install
#   PYTEST_ARGS=          more options for pytest, such as PYTEST_ARGS="-n 4 -k philox"
#   BENCH_ARGS=           more options for the benchmarks
#   SOAK_ARGS=            more options for the soak, such as SOAK_ARGS="--steps 5000 --only eta"
#   VERSIONS=             the versions of torch that `make compat` tests the package with
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
# Stamps: empty files with the time of the last run of a step. The build's has the mode in its name, so that another mode
# is built again.
PACKAGES := $(VENV)/.stamp-packages
INSTALL := $(VENV)/.stamp-install
BUILD := $(VENV)/.stamp-build-$(FASTDIFF_BUILD)

# The extension with sanitizers is built into a separate folder, with a copy of the package. SANITIZE_TESTS: the tests that
# run the C++ code on every kind of call; files that do not exist are left out.
SANITIZED := build/sanitize
SANITIZE_TESTS ?= $(sort $(shell find tests -false $(patsubst %,-o -name 'test_%.py',step_parity step_layout step_overlap \
  step_mask step_parts step_functional step_checks step_dtypes step_properties step_memory step_allocation step_streaming blocks binding_fuzz* \
  reductions reductions_ops gram log_prob diffusion_loss philox* rows seeds copy_kernel torch_noise dropin_loop \
  dropin_beginnings dropin_brownian)))

# The property-based tests.
FUZZ_TESTS ?= $(sort $(shell find tests -name 'test_*.py' -exec grep -l '^from hypothesis' {} +))

CSRC := $(shell find csrc -type f \( -name '*.cpp' -o -name '*.h' -o -name '*.inc' -o -name '*.cu' -o -name '*.cuh' \) 2>/dev/null | sort)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup versions sample test fuzz sanitize lint format docs bench soak gpu gpu-full compat wheels clean

help:  ## show this list
	@sed -n 's/^\([a-z-]*\):.*  ## /\1|/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "  make %-9s %s\n", $$1, $$2 }'

sample: $(BUILD)  ## draw 100 digits with the small model that ships, into samples.png
	$(BIN)/fastdiff sample --sampler dpmsolver++ --steps 20 --guidance-scale 3 --classes 0-9 --n 100 --seed 0 --out samples.png

test: $(BUILD)  ## run the tests
	$(PY) -m pytest $(PYTEST_ARGS)

fuzz: $(BUILD)  ## run the property-based tests on thousands of new examples: half an hour or more
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

# Uses the notebooks' figures as they come out: both are executed, and an error in one fails the build, as a broken link does.
docs: $(BUILD)  ## build the documentation into build/site, notebooks executed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: $(BUILD)  ## print the time of a step, compared with its peers
	$(PY) -m benchmarks $(BENCH_ARGS)

soak: $(BUILD)  ## take 100000 steps of each kind and fail if memory grows: a quarter of an hour or more
	$(PY) -m benchmarks.soak $(SOAK_ARGS)

# Uses neither .venv nor pip, only packages installed on the machine with the GPU. The script lists its variables.
gpu:  ## on a machine with an NVIDIA GPU, in 9 minutes: build, test, measure; DRY=1 for a dry run on the CPU, STAGES="build test" picks
	@benchmarks/gpu.sh

gpu-full:  ## the same with all cases and all examples of the tests: an hour
	@FULL=1 benchmarks/gpu.sh

# Does not use .venv: each version of torch has its own environment under build/compat, of half a gigabyte or more.
compat:  ## test the package with other versions of torch: VERSIONS="2.6.0 2.14.1", COMPAT_ARGS="--tests tests/ops/test_compile.py"
	$(PYTHON) tools/compat.py $(COMPAT_ARGS) $(VERSIONS)

wheels: $(PACKAGES)  ## build the sdist, the pure wheel, and wheels with the extension for each of PYTHONS, into dist
	PATH="$(CURDIR)/$(BIN):$$PATH" FASTDIFF_BUILD=$(if $(filter cuda,$(FASTDIFF_BUILD)),cuda,cpu) tools/build_wheels.sh $(PYTHONS)

setup: $(BUILD)  ## make .venv and build the extension

versions: $(PACKAGES)  ## print the versions of the packages that matter
	@$(PY) -m pip list --format=freeze 2>/dev/null | grep -iE '^(torch|triton|diffusers|numpy|setuptools|pytest|hypothesis|ruff|mypy|clang-format)=='

clean:  ## remove all generated files, including .venv
	rm -rf $(VENV) build dist *.egg-info samples.png .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -f fastdiff/_C*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# An existing .venv is kept.
$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "make: $(PYTHON) is missing or older than 3.10, expected Python 3.10 or newer; name one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) && $(PY) -m pip --version >/dev/null || { rm -rf $(VENV); \
	  echo "make: $(PYTHON) cannot make a virtual environment with pip, expected the modules venv and ensurepip;" \
	       "install them (on Debian and Ubuntu: apt-get install python3-venv)" >&2; exit 1; }

$(PACKAGES): requirements-dev.txt requirements-no-deps.txt | $(PY)
	@echo "installing requirements-dev.txt into $(VENV): a minute or two"
	@$(PY) -m pip install --disable-pip-version-check --quiet $(PIP_ARGS) -r requirements-dev.txt
	@$(PY) -m pip install --disable-pip-version-check --quiet $(PIP_ARGS) --no-deps -r requirements-no-deps.txt
	@touch $@

# Installing and compiling are separate: pip compiles in a new folder each time, while an in-place build lets ninja
# recompile only changed files, and shows the compiler's messages.
$(INSTALL): pyproject.toml setup.py $(PACKAGES)
	FASTDIFF_BUILD=none $(PY) -m pip install --disable-pip-version-check --quiet --no-build-isolation --no-deps -e .
	@touch $@

# The folders are prerequisites too, so that a removed source counts as a change. So does another torch in .venv.
$(BUILD): setup.py $(CSRC) $(sort $(dir $(CSRC))) $(INSTALL) $(wildcard $(VENV)/lib/python*/site-packages/torch-*.dist-info/RECORD)
	@command -v $(firstword $(or $(CXX),c++)) >/dev/null || \
	  echo "make: there is no C++ compiler; the reference backend in plain torch will do the work, and slower" >&2
	@rm -f fastdiff/_C*.so $(VENV)/.stamp-build-*
	$(PY) setup.py --quiet build_ext --inplace
	@touch $@
