# SPDX-License-Identifier: MIT
"""Benchmarks: what a step costs beside the reference and beside diffusers' schedulers.

cases.py        what is measured: samplers, shapes, and the peers that take the same steps
run.py          measures peers in turn, round by round, in one process
plots.py        draws the result
__main__.py     ``python -m benchmarks``: the table, the JSON under results/, the picture
test_step.py    the same cases under pytest-benchmark
"""
