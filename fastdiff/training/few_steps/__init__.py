# SPDX-License-Identifier: MIT
"""Training for few steps: progressive distillation, consistency distillation and training."""
