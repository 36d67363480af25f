# SPDX-License-Identifier: MIT
"""Benchmarks: the time of a step, compared with its peers and with the machine's memory bandwidth.

cases.py               the cases: samplers, shapes, dtypes, and the tensors of a case
traffic.py             the bytes that a step must move
peers.py               the implementations of a loop: fastdiff, its reference, and other libraries
compiled_peer.py       the reference's formula under torch.compile
diffusers_peer.py      diffusers' schedulers
k_diffusion_peer.py    k-diffusion's sampling functions
copy_bandwidth.py      a copy of as many bytes as a step moves; the size of the caches
timing.py              timing of all implementations, alternating round by round in one process
base_commit.py, worker.py    comparison with another commit, in alternating processes
options.py, report.py, plots.py, conditions.py    command-line arguments, table, picture, machine and versions
cache_levels.py        time of a drop-in loop with each cache emptied; a command of its own
end_to_end.py          time of whole loops with small models, before and after; a command of its own, as is the
end_to_end_table.py    table of its runs in README.md and docs/performance.md
forward_process.py     noisy samples, targets and the training loss beside diffusers and torch; a command of its own
log_prob.py            a log-probability, its replay and gradient beside torch; a command of its own
step_gradient.py       a step under autograd and its gradient beside torch; a command of its own
gpu_configs.py         search for the best block sizes on a GPU; a command of its own
__main__.py            ``fastdiff bench``; from a checkout also ``python -m benchmarks``
test_step.py           the same cases under pytest-benchmark; test_reductions.py: reductions and noise

Installed as ``fastdiff.benchmarks``; imports within the package are relative, so that it runs under either name.
"""
