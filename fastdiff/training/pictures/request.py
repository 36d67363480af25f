# SPDX-License-Identifier: MIT
"""What a pipeline is asked for: prompts, steps, guidance, seed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...errors import checked_float, checked_integer, checked_type, error_message


@dataclass(frozen=True)
class PictureRequest:
    """One picture to make; None leaves a choice to the model or the pipeline.

    Attributes:
        operation: for messages.
        prompt, negative_prompt: texts.
        num_inference_steps: steps of the whole loop.
        guidance_scale: of classifier-free guidance.
        width, height: of the picture, in pixels.
        seed: of all noise.
        strength: of a variation, the part of the loop that is run.
        options: further arguments of a pipeline of diffusers.
    """

    operation: str
    prompt: str | None = None
    negative_prompt: str | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    width: int | None = None
    height: int | None = None
    seed: int | None = None
    strength: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        operation = self.operation
        for name in ("prompt", "negative_prompt"):
            if getattr(self, name) is not None:
                remedy = "ask for one picture after the other"
                checked_type(operation, name, getattr(self, name), str, "one text", remedy)
        for name, least in (("num_inference_steps", 1), ("width", 1), ("height", 1), ("seed", 0)):
            if getattr(self, name) is not None:
                checked_integer(operation, name, getattr(self, name), least)
        if self.guidance_scale is not None:
            checked_float(operation, "guidance_scale", self.guidance_scale, float("-inf"))
        if self.strength is not None and checked_float(operation, "strength", self.strength, 0.0, strict=True) > 1.0:
            expected, remedy = "a number above 0, up to 1", "take 1 for the whole loop, less to keep more of the image"
            raise ValueError(error_message(operation, "strength", f"is {self.strength}", expected, remedy))
