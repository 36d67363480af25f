# SPDX-License-Identifier: MIT
"""The model under classifier-free guidance.

The modules::

    guided_model.py  the model call, with its conditions
    rescale.py       the rescaling factor of the guided output
"""

from .guided_model import GuidanceMode, GuidedModel, Model, unwrap, write_model_input
from .rescale import rescaling_of, rows_with_scaled_output

__all__ = [
    "GuidanceMode",
    "GuidedModel",
    "Model",
    "rescaling_of",
    "rows_with_scaled_output",
    "unwrap",
    "write_model_input",
]
