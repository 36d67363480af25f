# SPDX-License-Identifier: MIT
"""The seed of a test run: fresh in every run, fixed in CI, given by ``FASTDIFF_TEST_SEED`` to reproduce a failure."""

from __future__ import annotations

import os
import random
import zlib

import torch

VARIABLE = "FASTDIFF_TEST_SEED"

# Set in the environment, so that workers of pytest-xdist and child processes get the same seed. Under fixed profiles
# the result of a run depends on the change alone.
if VARIABLE not in os.environ:
    fixed = os.environ.get("HYPOTHESIS_PROFILE") in ("ci", "sanitize")
    os.environ[VARIABLE] = "0" if fixed else str(random.SystemRandom().randrange(2**31))

#: For what a module draws when it is imported; a test draws from `random` and `torch`, seeded by `seed_test`.
TEST_SEED = int(os.environ[VARIABLE])


def seed_test(name: str) -> None:
    """Seed Python's and torch's generators for one test, whatever other tests ran before it in this process."""
    seed = zlib.crc32(f"{TEST_SEED} {name}".encode())
    random.seed(seed)
    torch.manual_seed(seed)
