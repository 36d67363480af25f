# SPDX-License-Identifier: MIT
"""Data of training: data sets, batches, their order, augmentation."""
