# SPDX-License-Identifier: MIT
"""The model under classifier-free guidance."""

from .guided_model import GuidanceMode, GuidedModel, Model, unwrap, write_model_input

__all__ = [
    "GuidanceMode",
    "GuidedModel",
    "Model",
    "unwrap",
    "write_model_input",
]
