# SPDX-License-Identifier: MIT
"""The runtime of drop-in schedulers: guards, caches, and the execution of plans."""
