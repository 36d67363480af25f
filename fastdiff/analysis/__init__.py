# SPDX-License-Identifier: MIT
"""What is made of samples: images."""
