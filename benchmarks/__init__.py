# SPDX-License-Identifier: MIT
"""Benchmarks: what a step costs, beside its peers and beside what the machine's memory allows.

cases.py               what is measured: samplers, shapes, dtypes, and the tensors of a case
traffic.py             the bytes that a step must move
peers.py               who takes the steps: fastdiff, its reference, and whom they are held against
compiled_peer.py       the reference's formula under torch.compile
diffusers_peer.py      diffusers' schedulers
k_diffusion_peer.py    k-diffusion's sampling functions
copying.py             the copy that a step's bytes are held against; how large the caches are
measure.py             all of them in turn, round by round, in one process
base.py, worker.py     this code beside that of another commit, in processes that take turns
options.py, report.py, plots.py, conditions.py    the command's arguments, its table, its picture, its circumstances
gpu_configs.py         which sizes of blocks a GPU takes best; a command of its own
__main__.py            ``fastdiff bench``; from a checkout also ``python -m benchmarks``
test_step.py           the same cases under pytest-benchmark; test_reductions.py reductions and noise there

Installed as ``fastdiff.benchmarks``; within, imports are relative, so that it runs under either name.
"""
