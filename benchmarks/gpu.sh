#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# Build, test and measure on a machine with an NVIDIA GPU in nine minutes: `make gpu`; everything: `make gpu-full`. Installs
# nothing and needs no network: it uses the packages of that Python and builds into build/gpu. After a stage that fails the
# next ones still run; the script ends with the names of the failed stages and status 1. Each stage has a time limit, can be
# run alone, and stores its results as they come:
#   build     the extension with CUDA kernels for the local GPU
#   test      the tests that need a GPU, and the parity tests on every backend
#   bench     host time beside torch.add, device time beside a copy and torch.compile, drop-ins beside diffusers, loops end to end
#   noise     noise of CPU and GPU, compared bit by bit
#   sanitize  a call of each kind of kernel under compute-sanitizer (gpu_checks.sh)
# Variables:
#   STAGES="build test bench noise sanitize"
#   FULL=1        all cases, all examples of the tests, the timeline, the tests under compute-sanitizer: an hour
#   DRY=1         a dry run on the CPU: every stage as far as possible without a GPU; three minutes beside the first build
#   LIMITS=       time limits that differ from the table below, in seconds: LIMITS="test=300 bench=400"
#   PYTHON=       default: python3 if its torch sees a GPU, else .venv/bin/python
#   WORKERS=      test processes, if pytest-xdist is installed; default: all cores but two, at most 14
#   RESULTS=      folder of the results' JSON, the tests' log and the timeline; default benchmarks/results (dry run: build/gpu)
#   FASTDIFF_COMMIT=  the commit, if there is no git checkout
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

refuse() {  # GOT EXPECTED REMEDY
    echo "gpu: $1, expected $2; $3" >&2
    exit 2
}

dry=${DRY:-0}
full=${FULL:-0}
[[ $dry == 0 || $dry == 1 ]] || refuse "DRY is '$dry'" "0 or 1" "set DRY=1 for a rehearsal"
[[ $full == 0 || $full == 1 ]] || refuse "FULL is '$full'" "0 or 1" "set FULL=1 for all cases"
read -r -a stages <<<"${STAGES:-build test bench noise sanitize}"
# 540 seconds together. The build took 43 s on 16 cores; it may take longer, since nothing can be measured without it.
declare -A limits=([build]=100 [test]=150 [bench]=200 [noise]=15 [sanitize]=60)
if [[ $full == 1 ]]; then limits=([build]=600 [test]=1800 [bench]=1200 [noise]=90 [sanitize]=1800); fi
if [[ $dry == 1 ]]; then limits=([build]=540 [test]=540 [bench]=540 [noise]=120 [sanitize]=120); fi
for stage in "${stages[@]}"; do
    [[ -n ${limits[$stage]:-} ]] || refuse "STAGES names '$stage'" "some of build test bench noise sanitize" "correct it"
done
for limit in ${LIMITS:-}; do
    stage=${limit%%=*} seconds=${limit#*=}
    [[ -n ${limits[$stage]:-} && $seconds =~ ^[1-9][0-9]*$ ]] ||
        refuse "LIMITS has '$limit'" "a stage and whole seconds, such as test=300" "correct it"
    limits[$stage]=$seconds
done

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
    # For the local GPU only, which takes a third of the time of all architectures.
    TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$("$PYTHON" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')}
    export TORCH_CUDA_ARCH_LIST
else
    rehearse=(--rehearse)
    mode=cpu
    export TRITON_INTERPRET=1
fi

lib=$PWD/build/gpu/$mode
# The built package comes first, then the checkout with benchmarks and tests. -P keeps the current folder off the path,
# whose fastdiff has no kernels.
export PYTHONPATH=$lib:$PWD${PYTHONPATH:+:$PYTHONPATH}
export PYTHONUNBUFFERED=1
python=("$PYTHON" -P)
folder=${RESULTS:-$([[ $dry == 1 ]] && echo build/gpu || echo benchmarks/results)}
mkdir -p "$folder" build/gpu || refuse "RESULTS, '$folder', cannot be made" "a folder to write to" "name another"
name=$("${python[@]}" - "$dry" <<'PY'
import re
import sys

import torch

dry = sys.argv[1] == "1"
print("rehearsal" if dry else re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(0).lower()).strip("-"))
PY
) || refuse "$PYTHON cannot name the GPU" "torch to work" "read its message above"
results=$folder/$name.json
[[ $dry == 0 ]] || rm -f "$results"
bench=("${python[@]}" -m benchmarks.gpu)
json=("${rehearse[@]}" --json "$results")
# The same command in a process that has no extension, like an install without a compiler.
without_extension=("${python[@]}" -c 'import sys; sys.modules["fastdiff._C"] = None; import benchmarks.gpu.__main__ as b; sys.exit(b.main())')

# Run a command for at most so many seconds; one that is stopped has stored what it has measured.
limited() { timeout -k 5 "$1" "${@:2}"; }
# The option that lets no part begin in the last seconds of a limit.
begin_before_last() { echo "--seconds $(($1 > $2 ? $1 - $2 : 1))"; }  # LIMIT LAST

pytest=("${python[@]}" -m pytest -p no:cacheprovider)
workers=()
# Workers compile Triton kernels, so they need cores; each has a CUDA context, so their number is limited.
if "$PYTHON" -c 'import xdist' 2>/dev/null && [[ $dry == 0 ]]; then
    cores=$(nproc)
    workers=(-n "${WORKERS:-$((cores > 16 ? 14 : cores > 3 ? cores - 2 : 1))}" --dist worksteal)
elif [[ $dry == 0 ]]; then
    echo "gpu: pytest-xdist is not installed: the tests run in one process and may need LIMITS=test=1800"
fi

stage_build() {
    if [[ $dry == 1 ]] && command -v nvcc >/dev/null; then
        echo "gpu: nvcc is here: the kernels are compiled to objects by tests/kernels/test_cuda_compile.py, not linked"
    fi
    # Builds of one mode share a folder, so that ninja recompiles only changed files.
    FASTDIFF_BUILD=$mode limited "${limits[build]}" \
        "$PYTHON" setup.py --quiet build --build-base "build/gpu/objects-$mode" --build-lib "$lib" && check_import
}

check_import() {  # check that the built package is imported, with its kernels
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
    assert chosen in ("cuda", "triton"), f"{chosen} would answer on the GPU"
    assert not backends.why_missing("triton"), backends.why_missing("triton")
PY
}

stage_test() {
    local log=${RESULTS:-build/gpu}/$name-tests.log
    local chosen=(-m "gpu or checks_backend") files
    # Collecting the other files takes longer than many of their tests. gpu: a test that needs a GPU; checks_backend: one
    # whose parameter names the backend that has to compute.
    read -r -a files <<<"$(grep -rlE 'mark\.(gpu|checks_backend)' tests --include='test_*.py' | sort | tr '\n' ' ')"
    # Fewer, fixed examples of each property: the whole number is for FULL=1.
    local profile=sanitize
    [[ $full == 0 || $dry == 1 ]] || profile=fresh
    if [[ $dry == 1 ]]; then
        chosen=(-k "gpu or named_row or nan_in_a_used or in_place or row_in_a_tensor or known_answers or degenerate or every_quantile")
        files=(tests/gpu/test_gpu*.py tests/ops/test_step_parity.py tests/ops/test_rows.py tests/noise/test_philox.py tests/ops/test_reductions.py)
    fi
    # Each outcome is in the log when it is known. No test is skipped for a missing backend: the build has checked that both
    # are there.
    HYPOTHESIS_PROFILE=$profile limited "${limits[test]}" "${pytest[@]}" -v --continue-on-collection-errors "${workers[@]}" "${chosen[@]}" "${files[@]}" >"$log" 2>&1
    sed -n '/= FAILURES =/,$p' "$log" | tail -n 60
    "${bench[@]}" tests "$log" "${json[@]}"
}

stage_noise() {
    local seconds=4  # beside the start of Python, of torch and of the device
    [[ $full == 0 ]] || seconds=60
    local options=(--seconds "$seconds")
    [[ $dry == 0 ]] || options=()
    limited "${limits[noise]}" "${bench[@]}" noise "${json[@]}" "${options[@]}"
}

stage_bench() {
    # Shares of the stage's time.
    local all=${limits[bench]} failed=0
    local host=$((all * 16 / 100)) pure=$((all * 8 / 100)) cases=$((all * 38 / 100)) dropins=$((all * 23 / 100)) loops=$((all * 15 / 100))
    local rounds=() options=()
    if [[ $dry == 1 ]]; then rounds=(--rounds 2); fi
    if [[ $full == 1 ]]; then options=(--full); fi
    limited "$host" "${bench[@]}" host "${json[@]}" "${rounds[@]}" $(begin_before_last "$host" 8) || failed=1
    limited "$pure" "${without_extension[@]}" host --pure "${json[@]}" "${rounds[@]}" $(begin_before_last "$pure" 8) || failed=1
    limited "$cases" "${bench[@]}" bench "${json[@]}" "${rounds[@]}" "${options[@]}" $(begin_before_last "$cases" 10) || failed=1
    limited "$dropins" "${bench[@]}" dropins "${json[@]}" "${rounds[@]}" $(begin_before_last "$dropins" 10) || failed=1
    # Whole loops with small models, into a file of their own.
    options=(--device cuda --rounds 7)
    if [[ $full == 1 ]]; then options=(--device cuda); fi
    if [[ $dry == 1 ]]; then options=(--only policy --rounds 1); fi
    limited "$loops" "${python[@]}" -m benchmarks.end_to_end "${options[@]}" --json "$folder/$name-end-to-end.json" || failed=1
    if [[ $full == 1 || $dry == 1 ]]; then
        limited 60 "${bench[@]}" timeline "${json[@]}" ${RESULTS:+--picture "$RESULTS/timeline.png"} || failed=1
    fi
    return $failed
}

stage_sanitize() {
    PYTHON=$PYTHON DRY=$dry FULL=$full LIMIT=$((full == 1 ? limits[sanitize] / 2 : limits[sanitize])) benchmarks/gpu_checks.sh
}

failed=()
for stage in "${stages[@]}"; do
    echo "== $stage (at most ${limits[$stage]} s)"
    started=$SECONDS
    if "stage_$stage"; then outcome=passed; else outcome=failed; failed+=("$stage"); fi
    taken=$((SECONDS - started))
    if ((taken >= limits[$stage])); then outcome="$outcome, stopped at its limit of ${limits[$stage]} s,"; fi
    echo "== $stage $outcome after $taken s"
    # Storing the outcome fails without a build; that does not change the outcome.
    "${bench[@]}" stage "$stage" "$outcome after $taken s" "${json[@]}" || true
done
"${bench[@]}" show "${json[@]}" || failed+=("show")
if ((${#failed[@]})); then
    echo "gpu: failed: ${failed[*]}" >&2
    exit 1
fi
echo "gpu: passed: ${stages[*]}"
