# SPDX-License-Identifier: MIT
"""What a step costs on a GPU, and the proof that its noise is the CPU's: ``python -m benchmarks.gpu``.

machine.py      the GPU, the driver, the versions, the commit
cases.py        what is measured: samplers, shapes, dtypes
launchers.py    the ways from Python to our kernels
ways.py         everybody who takes the steps of a case, each as a unit that a clock can time
clock.py        device time by events, host time without waiting; on the CPU the host's clock for both
counting.py     kernels, launches, copies and waits of a step, as the profiler sees them
ceiling.py      the copy that a step's bytes are held against
pieces.py       noise and reductions beside torch's
bench.py        all of it in one run
verdict.py      the targets: met, not met, not measured
noise.py        the noise of all backends, compared bit by bit
timeline.py     one picture: host and device over a few steps
results.py      the one JSON file
table.py        its Markdown, for docs/performance.md

Without a GPU `--rehearse` runs every line that does not need one, on small tensors and the host's clock; what it writes
is marked and refused by the table.
"""
