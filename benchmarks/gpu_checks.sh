#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# The parity tests of the GPU backends under NVIDIA's compute-sanitizer: reads and writes out of bounds (memcheck), races
# in shared memory (racecheck), reads of memory that nobody wrote (initcheck). Needs a GPU, the CUDA toolkit and an
# extension built with FASTDIFF_BUILD=cuda. Variables:
#   PYTHON=.venv/bin/python       the interpreter of the tests
#   TOOLS="memcheck racecheck initcheck"
#   PYTEST_ARGS=                  more options for pytest
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-.venv/bin/python}
read -r -a tools <<<"${TOOLS:-memcheck racecheck initcheck}"
read -r -a pytest_args <<<"${PYTEST_ARGS:-}"

refuse() {  # what it got, what was expected, what to do
    echo "gpu_checks: $1, expected $2; $3" >&2
    exit 2
}

sanitizer=$(command -v compute-sanitizer || echo "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer")
[[ -x $sanitizer ]] ||
    refuse "compute-sanitizer is neither on PATH nor in ${CUDA_HOME:-/usr/local/cuda}/bin" "the one of the CUDA toolkit" \
        "install cuda-sanitizer, or set CUDA_HOME"
"$python" -c 'import torch; raise SystemExit(not torch.cuda.is_available())' ||
    refuse "torch finds no CUDA device" "a GPU" "run this where there is one"
"$python" -c 'from fastdiff.ops.backends import why_missing; raise SystemExit(bool(why_missing("cuda")))' ||
    refuse "the extension has no CUDA kernels" "backend 'cuda'" "build with FASTDIFF_BUILD=cuda"

# Slow is what the tools are: one example finds an address that is wrong, and racecheck takes minutes for a hundred.
export HYPOTHESIS_PROFILE=${HYPOTHESIS_PROFILE:-sanitize}
# torch keeps freed memory and hands it out again: without that, each tensor ends where its allocation ends, and what a
# kernel reads beyond is nobody's.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1

failed=()
for tool in "${tools[@]}"; do
    echo "== compute-sanitizer --tool $tool"
    options=(--tool "$tool" --error-exitcode 99 --launch-timeout 0 --target-processes all)
    # A process that fails without a report is the tests' failure and counts as well.
    "$sanitizer" "${options[@]}" "$python" -m pytest -q -p no:cacheprovider -m gpu -k "parity or step_on_gpu" "${pytest_args[@]}" ||
        failed+=("$tool")
done
if ((${#failed[@]})); then
    echo "gpu_checks: failed: ${failed[*]}" >&2
    exit 1
fi
echo "gpu_checks: ${tools[*]}: nothing to report"
