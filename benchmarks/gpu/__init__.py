# SPDX-License-Identifier: MIT
"""GPU benchmarks (``python -m benchmarks.gpu``): time of a step, and bitwise comparison of its noise with the CPU's.

machine.py           the GPU, the driver, the versions, the commit
cases.py             the cases: samplers, shapes, dtypes
launchers.py         the ways to launch fastdiff's kernels from Python
implementations.py   all implementations of a case's steps, each as a unit that a clock can time
clock.py             device time by events, host time without waiting; on the CPU the host's clock for both
counting.py          kernels, launches, copies and waits of a step, from the profiler
copy_bandwidth.py    a copy of as many bytes as a step moves
mixed_rows.py        batches whose samples use rows of different solvers
standalone_ops.py    noise and reductions compared with torch's
host.py              host time of a call beside torch.add
dropins.py           loops of the drop-in schedulers beside diffusers'
bench.py             the cases: device and host time of a step
targets.py           the targets: met, not met, not measured
sanitizer_calls.py   a call of each kind of kernel, for compute-sanitizer
pytest_log.py        the outcome of the tests, from their log
noise.py             the noise of all backends, compared bit by bit
timeline.py          picture of host and device over a few steps
results.py           the JSON file of results
table.py             the results as Markdown, for docs/performance.md

Without a GPU `--rehearse` does a dry run, on small tensors with the host's clock; its results are marked, and table.py
refuses them.
"""
