# SPDX-License-Identifier: MIT
"""The Triton kernels; imported only when Triton is asked for."""
