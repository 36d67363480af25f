# SPDX-License-Identifier: MIT
"""What several tests use: cases, oracles, emulators, and the processes that tests start."""
