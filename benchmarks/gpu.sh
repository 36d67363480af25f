#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# Builds, proves and measures on a machine with an NVIDIA GPU: `make gpu`. It installs nothing and needs no network: what
# Python has there is what is used, and the package is built into build/gpu. A stage that fails does not keep the next ones
# from running; the script ends with their names and 1. Each is held to four minutes, so that stages can be run one by one:
#   build     the extension with CUDA kernels, for the GPU that is there
#   test      the tests that need a GPU, and the parity tests on every backend
#   noise     noise of CPU and GPU, compared bit by bit
#   bench     what a step costs, the verdict on the targets, the timeline
#   sanitize  the parity tests under compute-sanitizer (gpu_checks.sh)
# Variables:
#   STAGES="build test noise bench sanitize"
#   PYTHON=       else the python3 whose torch sees a GPU, else .venv/bin/python
#   DRY=1         a rehearsal on the CPU: every stage as far as it goes without a GPU, in under three minutes
#   LIMIT=230     seconds a stage may take (540 in a rehearsal); what bench has not measured by then its JSON names
#   WORKERS=      processes of the tests, where pytest-xdist is installed; else all cores but two, 14 at most
#   RESULTS=      a folder for the results' JSON and the timeline's picture, else benchmarks/results (a rehearsal's: build/gpu)
#   FASTDIFF_COMMIT=  the commit, where there is no git
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

refuse() {  # what it got, what was expected, what to do
    echo "gpu: $1, expected $2; $3" >&2
    exit 2
}

dry=${DRY:-0}
limit=${LIMIT:-$([[ $dry == 1 ]] && echo 540 || echo 230)}
read -r -a stages <<<"${STAGES:-build test noise bench sanitize}"
known=" build test noise bench sanitize "
for stage in "${stages[@]}"; do
    [[ $known == *" $stage "* ]] || refuse "STAGES names '$stage'" "some of$known" "correct it"
done
[[ $dry == 0 || $dry == 1 ]] || refuse "DRY is '$dry'" "0 or 1" "set DRY=1 for a rehearsal"
[[ $limit =~ ^[0-9]+$ ]] && ((limit >= 120)) || refuse "LIMIT is '$limit'" "whole seconds, 120 or more" "raise it"

sees_gpu() { "$1" -c 'import torch; raise SystemExit(not torch.cuda.is_available())' 2>/dev/null; }
if [[ -z ${PYTHON:-} ]]; then
    PYTHON=.venv/bin/python
    if command -v python3 >/dev/null && sees_gpu python3; then PYTHON=$(command -v python3); fi
fi
"$PYTHON" -c 'import torch' 2>/dev/null || refuse "$PYTHON cannot import torch" "a Python with torch" "name one: make gpu PYTHON=..."
"$PYTHON" -c 'import sys; raise SystemExit(sys.version_info < (3, 11))' ||
    refuse "$PYTHON is older than 3.11" "one that has the option -P" "name one: make gpu PYTHON=..."
if [[ $dry == 0 ]]; then
    sees_gpu "$PYTHON" || refuse "torch of $PYTHON finds no CUDA device" "a GPU" "run this where there is one, or rehearse: make gpu DRY=1"
    rehearse=()
    mode=cuda
    # For the GPU that is there alone: a third of the time that all architectures take.
    TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$("$PYTHON" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')}
    export TORCH_CUDA_ARCH_LIST
else
    rehearse=(--rehearse)
    mode=cpu
    export TRITON_INTERPRET=1
fi

lib=$PWD/build/gpu/$mode
# What was built comes first, then what lies beside it in the checkout: benchmarks, tests. -P keeps the current folder, whose
# fastdiff has no kernels beside it, off the path.
export PYTHONPATH=$lib:$PWD${PYTHONPATH:+:$PYTHONPATH}
export PYTHONUNBUFFERED=1
python=("$PYTHON" -P)
[[ -z ${RESULTS:-} ]] || mkdir -p "$RESULTS"
results=$("${python[@]}" - "$dry" "${RESULTS:-}" <<'PY'
import re
import sys

import torch

dry, folder = sys.argv[1] == "1", sys.argv[2]
name = "rehearsal" if dry else re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(0).lower()).strip("-")
print(f"{folder or ('build/gpu' if dry else 'benchmarks/results')}/{name}.json")
PY
) || refuse "$PYTHON cannot name the GPU" "torch to work" "read its message above"
[[ $dry == 0 ]] || rm -f "$results"
bench=("${python[@]}" -m benchmarks.gpu)
json=("${rehearse[@]}" --json "$results")

pytest=("${python[@]}" -m pytest -q -p no:cacheprovider)
workers=()
# Workers compile Triton's kernels, so they want cores; each has a CUDA context, so there is a most.
if "$PYTHON" -c 'import xdist' 2>/dev/null && [[ $dry == 0 ]]; then
    cores=$(nproc)
    workers=(-n "${WORKERS:-$((cores > 16 ? 14 : cores > 3 ? cores - 2 : 1))}")
elif [[ $dry == 0 ]]; then
    echo "gpu: pytest-xdist is not installed: the tests run in one process and may need LIMIT=1800"
fi
# Every test file whose tests take a backend by name.
parity=(tests/ops/test_step_parity.py tests/ops/test_rows.py tests/noise/test_philox.py tests/ops/test_reductions.py)

stage_build() {
    if [[ $dry == 1 ]] && command -v nvcc >/dev/null; then
        echo "gpu: nvcc is here: the kernels are compiled to objects by tests/kernels/test_cuda_compile.py, not linked"
    fi
    # One build of a mode serves the next: ninja compiles again what has changed.
    FASTDIFF_BUILD=$mode "$PYTHON" setup.py --quiet build --build-base "build/gpu/objects-$mode" --build-lib "$lib" &&
        check_import
}

check_import() {  # that what runs is what was built, with the kernels in it
    "${python[@]}" - "$lib" "$mode" <<'PY'
import pathlib
import sys

import torch

import fastdiff
import fastdiff.kernels.step
from fastdiff.ops import backends

lib, mode = sys.argv[1:]
for module in (fastdiff, fastdiff.kernels.step, backends.extension):
    assert module is not None, backends.extension_error
    assert pathlib.Path(module.__file__).is_relative_to(lib), f"{module.__file__} is imported, not what lies in {lib}"
print("gpu: built and imported:", fastdiff.ops.backend_status())
if mode == "cuda":
    assert backends.extension.cuda, "the extension was built without CUDA"
    chosen = fastdiff.ops.backend_for(torch.empty(0, device="cuda"))
    assert chosen == "cuda", f"{chosen} would answer on the GPU"
    assert not backends.why_missing("triton"), backends.why_missing("triton")
PY
}

stage_test() {
    if [[ $dry == 1 ]]; then
        HYPOTHESIS_PROFILE=sanitize timeout -k 10 "$limit" "${pytest[@]}" tests/gpu/test_gpu*.py "${parity[@]}" \
            -k "gpu or named_row or nan_in_a_used or in_place or row_in_a_tensor or known_answers or degenerate or every_quantile"
        return
    fi
    local failed=0 until=$((SECONDS + limit))
    # No test may pass by being skipped for want of a backend: build has seen to it that both are there.
    timeout -k 10 "$limit" "${pytest[@]}" "${workers[@]}" -m gpu tests || failed=1
    # `timeout 0` would set no limit.
    timeout -k 10 "$((until > SECONDS ? until - SECONDS : 1))" "${pytest[@]}" "${workers[@]}" -m "not gpu" "${parity[@]}" ||
        failed=1
    return $failed
}

stage_noise() {
    local options=(--seconds 45)
    [[ $dry == 0 ]] || options=()
    timeout -k 10 "$limit" "${bench[@]}" noise "${json[@]}" "${options[@]}"
}

stage_bench() {
    # No part begins after --seconds; the last one and the timeline have the rest.
    local options=(--seconds "$((limit - 90))")
    [[ $dry == 0 ]] || options=(--rounds 2 --no-compile)
    local failed=0
    timeout -k 10 "$((limit - 45))" "${bench[@]}" bench "${json[@]}" "${options[@]}" || failed=1
    timeout -k 10 45 "${bench[@]}" timeline "${json[@]}" ${RESULTS:+--picture "$RESULTS/timeline.png"} || failed=1
    return $failed
}

stage_sanitize() { PYTHON=$PYTHON DRY=$dry LIMIT=$((limit / 2 - 10)) benchmarks/gpu_checks.sh; }

failed=()
for stage in "${stages[@]}"; do
    echo "== $stage"
    started=$SECONDS
    if "stage_$stage"; then outcome=passed; else outcome=failed; failed+=("$stage"); fi
    echo "== $stage $outcome after $((SECONDS - started)) s"
    # The record is not the proof: where it cannot be kept, for want of a build, the stage's outcome still counts.
    "${bench[@]}" stage "$stage" "$outcome after $((SECONDS - started)) s" "${json[@]}" || true
done
if [[ " ${stages[*]} " == *" bench "* || " ${stages[*]} " == *" noise "* ]]; then
    "${bench[@]}" show "${json[@]}" || failed+=("show")
fi
if ((${#failed[@]})); then
    echo "gpu: failed: ${failed[*]}" >&2
    exit 1
fi
echo "gpu: passed: ${stages[*]}"
