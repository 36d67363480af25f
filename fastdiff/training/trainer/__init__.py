# SPDX-License-Identifier: MIT
"""The trainer: steps, learning rate, reports, validation, state, and the job of ``fastdiff train``."""
