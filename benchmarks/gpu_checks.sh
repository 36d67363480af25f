#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# Run the kernels under NVIDIA's compute-sanitizer: out-of-bounds and misaligned accesses (memcheck), races in shared
# memory (racecheck). A call of each kind of kernel (benchmarks/gpu/sanitizer_calls.py), or with FULL=1 the GPU tests.
# Needs a GPU, the CUDA toolkit and an extension built with FASTDIFF_BUILD=cuda. `make gpu` calls it. Variables:
#   PYTHON=.venv/bin/python       the interpreter of the tests
#   FULL=1                        the tests instead of the calls, under memcheck and racecheck
#   TOOLS="memcheck"              also: racecheck; initcheck, which reports torch's own kernels too; synccheck
#   LIMIT=                        time limit per tool in seconds; unlimited by default
#   DRY=1                         without a GPU: make the calls on the CPU, or list the tests
#   PYTEST_ARGS=                  more options for pytest
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-.venv/bin/python}
full=${FULL:-0}
read -r -a tools <<<"${TOOLS:-$([[ $full == 1 ]] && echo memcheck racecheck || echo memcheck)}"
read -r -a pytest_args <<<"${PYTEST_ARGS:-}"

refuse() {  # GOT EXPECTED REMEDY
    echo "gpu_checks: $1, expected $2; $3" >&2
    exit 2
}

# Tests of the kernels with a fixed number of calls. Not the property-based tests: a hundred examples, each compiled by Triton,
# under a tool that slows a kernel down a hundred times take hours. No graph capture: it needs torch's memory pool. No
# profiling: a process can have one tool at a time.
tests=(tests/gpu/test_gpu*.py)
chosen="(step_on_gpu or randn_on_gpu or noise_drawn or mixed_solvers or any_rows or row_beyond or model_input or reductions or quantile) and not captured and not graph and not one_kernel and not waits and not loop and not launch"

# Use -P if Python has it: the fastdiff in the current folder is not the one that `make gpu` has built.
isolated=()
if "$python" -P -c '' 2>/dev/null && [[ -n ${PYTHONPATH:-} ]]; then isolated=(-P); fi
if [[ $full == 1 ]]; then
    checked=("$python" "${isolated[@]}" -m pytest -q -p no:cacheprovider -m gpu -k "$chosen" "${tests[@]}" "${pytest_args[@]}")
else
    checked=("$python" "${isolated[@]}" -m benchmarks.gpu.sanitizer_calls)
fi

if [[ ${DRY:-0} == 1 ]]; then
    # pytest ends with 5 if no test is selected.
    if [[ $full == 1 ]]; then "${checked[@]}" --collect-only | tail -n 1; else "${checked[@]}" --device cpu; fi
    echo "gpu_checks: a rehearsal: this would run under ${tools[*]}"
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

# Without torch's memory pool each tensor ends where its allocation ends, so that an access beyond it is detected.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
limited=()
if [[ -n ${LIMIT:-} ]]; then limited=(timeout -k 10 "$LIMIT"); fi

failed=()
for tool in "${tools[@]}"; do
    echo "== compute-sanitizer --tool $tool"
    # The test process only: Triton also starts ptxas and a C compiler, which do not use the GPU.
    options=(--tool "$tool" --error-exitcode 99 --launch-timeout 0 --target-processes application-only)
    status=0
    "${limited[@]}" "$sanitizer" "${options[@]}" "${checked[@]}" || status=$?
    case $status in
        0) ;;
        99) failed+=("$tool (it has something to report)") ;;
        124 | 137) failed+=("$tool (not done after $LIMIT s: no proof either way)") ;;
        *) failed+=("$tool (what it checks fails under it, status $status)") ;;
    esac
done
if ((${#failed[@]})); then
    printf 'gpu_checks: failed: %s\n' "${failed[@]}" >&2
    exit 1
fi
echo "gpu_checks: ${tools[*]}: nothing to report"
