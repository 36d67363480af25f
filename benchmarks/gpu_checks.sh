#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# The GPU tests of the kernels under NVIDIA's compute-sanitizer: reads and writes out of bounds and off their alignment
# (memcheck), races in shared memory (racecheck). Needs a GPU, the CUDA toolkit and an extension built with
# FASTDIFF_BUILD=cuda. `make gpu` calls it. Variables:
#   PYTHON=.venv/bin/python       the interpreter of the tests
#   TOOLS="memcheck racecheck"    also: initcheck, which reports torch's own kernels too; synccheck
#   LIMIT=                        seconds a tool may take; none where it is not set
#   DRY=1                         without a GPU: only whether the tests that would run are there
#   PYTEST_ARGS=                  more options for pytest
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-.venv/bin/python}
read -r -a tools <<<"${TOOLS:-memcheck racecheck}"
read -r -a pytest_args <<<"${PYTEST_ARGS:-}"

refuse() {  # what it got, what was expected, what to do
    echo "gpu_checks: $1, expected $2; $3" >&2
    exit 2
}

# Each test of the kernels with a fixed number of calls. Not those of properties: a hundred examples under a tool that slows a
# kernel down a hundred times, each compiled anew by Triton, take hours. Not what captures a graph: without torch's pool of
# memory there is nothing to capture an allocation with. Not what profiles: a process has one tool at a time.
tests=(tests/gpu/test_gpu*.py)
chosen="(step_on_gpu or randn_on_gpu or noise_drawn or mixed_solvers or any_rows or row_beyond or model_input or reductions or quantile) and not captured and not graph and not one_kernel and not waits and not loop and not launch"

# -P where there is one: the current folder's fastdiff is not what `make gpu` has built.
isolated=()
if "$python" -P -c '' 2>/dev/null && [[ -n ${PYTHONPATH:-} ]]; then isolated=(-P); fi
pytest=("$python" "${isolated[@]}" -m pytest -q -p no:cacheprovider -m gpu -k "$chosen" "${tests[@]}" "${pytest_args[@]}")

if [[ ${DRY:-0} == 1 ]]; then
    # pytest ends with 5 where nothing was chosen.
    "${pytest[@]}" --collect-only | tail -n 1
    echo "gpu_checks: a rehearsal: these tests would run under ${tools[*]}"
    exit 0
fi

sanitizer=$(command -v compute-sanitizer || echo "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer")
[[ -x $sanitizer ]] ||
    refuse "compute-sanitizer is neither on PATH nor in ${CUDA_HOME:-/usr/local/cuda}/bin" "the one of the CUDA toolkit" \
        "install cuda-sanitizer, or set CUDA_HOME"
"$python" "${isolated[@]}" -c 'import torch; raise SystemExit(not torch.cuda.is_available())' ||
    refuse "torch finds no CUDA device" "a GPU" "run this where there is one"
"$python" "${isolated[@]}" -c 'from fastdiff.ops.backends import why_missing; raise SystemExit(bool(why_missing("cuda")))' ||
    refuse "the extension has no CUDA kernels" "backend 'cuda'" "build with FASTDIFF_BUILD=cuda"

# torch keeps freed memory and hands it out again: without that, each tensor ends where its allocation ends, and what a
# kernel reads beyond is nobody's.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
limited=()
if [[ -n ${LIMIT:-} ]]; then limited=(timeout -k 10 "$LIMIT"); fi

failed=()
for tool in "${tools[@]}"; do
    echo "== compute-sanitizer --tool $tool"
    # The tests alone: Triton starts ptxas and a C compiler, and nothing of theirs runs on the GPU.
    options=(--tool "$tool" --error-exitcode 99 --launch-timeout 0 --target-processes application-only)
    status=0
    "${limited[@]}" "$sanitizer" "${options[@]}" "${pytest[@]}" || status=$?
    case $status in
        0) ;;
        99) failed+=("$tool (it has something to report)") ;;
        124 | 137) failed+=("$tool (not done after $LIMIT s: no proof either way)") ;;
        *) failed+=("$tool (the tests fail under it, status $status)") ;;
    esac
done
if ((${#failed[@]})); then
    printf 'gpu_checks: failed: %s\n' "${failed[@]}" >&2
    exit 1
fi
echo "gpu_checks: ${tools[*]}: nothing to report"
