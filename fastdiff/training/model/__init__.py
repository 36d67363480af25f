# SPDX-License-Identifier: MIT
"""Models of a configuration: networks, scheduler, conditions, text encoder."""
