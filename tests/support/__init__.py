# SPDX-License-Identifier: MIT
"""Helpers of the tests: cases, oracles, emulators, and processes that tests start."""
