# SPDX-License-Identifier: MIT
"""Analysis of a model: parameters, memory, operations, speed of samplers with it."""
