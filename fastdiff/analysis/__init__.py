# SPDX-License-Identifier: MIT
"""The analysis of samples: images."""
