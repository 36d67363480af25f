# SPDX-License-Identifier: MIT
"""The model call, with classifier-free guidance or without it.

The two outputs of guidance are combined in the fused step; here they are only obtained.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from ..errors import checked_callable, checked_type, error_message, parse_choice
from ..ops.checks import DTYPES
from ..ops.fallback import callers_level
from ..row_layout import compute_dtype

#: Not empty after the warning that zeros are taken for a missing negative condition.
_warned: set[str] = set()

#: (x, t[, encoder_hidden_states]) -> a tensor, a tuple, a dict with "sample" or an object with .sample
Model = Callable[..., Any]


class GuidanceMode(str, Enum):
    """The model calls that give the two outputs of guidance."""

    #: One call on a batch of twice the size, the unconditional half first.
    BATCHED = "batched"
    #: Two calls: less memory, and the unconditional call may go without embeddings.
    SEQUENTIAL = "sequential"

    @classmethod
    def parse(cls, value: str | GuidanceMode) -> GuidanceMode:
        return parse_choice(cls, "SamplingConfig", "guidance_mode", value)


@dataclass(frozen=True)
class GuidedModel:
    """A model with its conditions: called once a step for the outputs that the step combines.

    Args:
        model: any callable ``(x, t)`` or ``(x, t, encoder_hidden_states)``; t has shape ``[B]``.
        prompt_embeds: the condition, ``[B, ...]`` of any dtype, or None for a model without one.
        negative_prompt_embeds: the condition of the unconditional output, like `prompt_embeds`.  None in a doubled
            batch: zeros for embeddings, with one warning a process; labels have no such default.
        guidance_scale: 1 (or no `prompt_embeds`) asks for no unconditional output; a tensor ``[B]``, a scale a sample,
            asks for it without being looked at.
        mode: one doubled batch or two calls.
        channels: how many times the sample's channels the model returns: 2 with a learned variance.
        check_finite: look for NaN and infinity in every output, at the cost of a host sync on a GPU.
        model_kwargs: passed on with every call.
        model_dtype: what the model is called in, the samples' own where None.

    Raises:
        ValueError: guidance needs a negative condition that is missing or does not match.
        UserWarning: where the caller's filters turn the warning into an error.
    """

    model: Model
    prompt_embeds: Tensor | None = None
    negative_prompt_embeds: Tensor | None = None
    guidance_scale: float | Tensor = 1.0
    mode: GuidanceMode = GuidanceMode.BATCHED
    channels: int = 1
    check_finite: bool = True
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)
    model_dtype: torch.dtype | None = None
    #: True where zeros were taken for a missing negative condition.
    negative_is_zeros: bool = field(default=False, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._check_types()
        if not self.guided or self.prompt_embeds is None:
            return
        if self.mode is GuidanceMode.BATCHED and self.negative_prompt_embeds is None:
            object.__setattr__(self, "negative_prompt_embeds", self._zeros())
            object.__setattr__(self, "negative_is_zeros", True)
        negative = self.negative_prompt_embeds
        if negative is not None and negative.shape != self.prompt_embeds.shape:
            raise ValueError(
                error_message(
                    "sample",
                    "negative_prompt_embeds",
                    f"has shape {list(negative.shape)}",
                    f"{list(self.prompt_embeds.shape)} like prompt_embeds",
                    "expand or pad it to match",
                )
            )

    def _zeros(self) -> Tensor:
        """Return zeros in place of a negative condition, and warn once a process.

        Raises:
            ValueError: the condition is labels, among which zero is one like any other.
        """
        assert self.prompt_embeds is not None
        scale = self.guidance_scale
        at_scale = "with a guidance_scale a sample" if isinstance(scale, Tensor) else f"at guidance_scale {scale:g}"
        if not self.prompt_embeds.is_floating_point():
            raise ValueError(
                error_message(
                    "sample",
                    "negative_prompt_embeds",
                    "is missing",
                    f"a condition for the unconditional half {at_scale}",
                    "pass it, or set guidance_mode='sequential' to call the model without one",
                )
            )
        if not _warned:
            _warned.add("zeros")  # first, so that another thread does not warn as well
            message = error_message(
                "sample",
                "negative_prompt_embeds",
                f"is missing {at_scale}, and zeros are taken",
                "a condition for the unconditional half",
                "pass it, pass zeros to say so, or set guidance_scale=1 for no guidance",
            )
            try:
                warnings.warn(message, UserWarning, stacklevel=callers_level())
            except UserWarning:
                _warned.clear()  # an error that is passed over once stays an error
                raise
        return torch.zeros_like(self.prompt_embeds)

    def _check_types(self) -> None:
        expected = "a callable (x, t[, encoder_hidden_states])"
        checked_callable("sample", "model", self.model, expected, "pass a function or a torch.nn.Module")
        for name in ("prompt_embeds", "negative_prompt_embeds"):
            embeds = getattr(self, name)
            if embeds is not None:
                remedy = "pass one tensor; what else the model takes goes into model_kwargs"
                checked_type("sample", name, embeds, Tensor, "a tensor [B, ...] or None", remedy)
        checked_type("sample", "model_kwargs", self.model_kwargs, Mapping, "a dict", "pass keyword arguments by name")
        if self.model_dtype is not None and self.model_dtype not in DTYPES:
            expected = "torch.float16, bfloat16, float32 or float64, or None"
            remedy = "convert in the model for another precision"
            raise TypeError(error_message("sample", "model_dtype", f"is {self.model_dtype!r}", expected, remedy))

    @property
    def guided(self) -> bool:
        scale = self.guidance_scale
        return self.prompt_embeds is not None and (isinstance(scale, Tensor) or scale != 1.0)

    @functools.cached_property
    def both_embeds(self) -> Tensor:
        """The condition of the doubled batch, ``[2·B, ...]``, the unconditional half first: made once, then kept."""
        assert self.prompt_embeds is not None
        assert self.negative_prompt_embeds is not None
        return torch.cat([self.negative_prompt_embeds, self.prompt_embeds])

    @property
    def copies(self) -> int:
        """The number of copies of the samples in one model call's batch."""
        return 2 if self.guided and self.mode is GuidanceMode.BATCHED else 1

    def prepare(self, x: Tensor) -> Tensor | None:
        """A tensor to hold the model's input throughout a loop, filled for the first call; None where x itself will do.

        Args:
            x: ``[B, ...]``, dense.

        Returns:
            ``[B, ...]`` or ``[2·B, ...]`` in the model's dtype; the step writes it for the calls that follow.
        """
        dtype = self.model_dtype or x.dtype
        if self.copies == 1 and dtype == x.dtype:
            return None
        return torch.cat([x.to(dtype)] * self.copies)

    def __call__(
        self, x: Tensor, timestep: Tensor, prepared: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Call the model at one timestep.

        Args:
            x: ``[B, ...]``.
            timestep: ``[]``, int64 or float32, on the device of x.
            prepared: what `prepare` gave for this x, or the step has written since.

        Returns:
            The conditional output, the unconditional one or None, and the variance output or None; like x.
        """
        inputs = self.prepare(x) if prepared is None else prepared
        inputs = x if inputs is None else inputs
        if not self.guided:
            output, variance = self._split(self._call(inputs, timestep, self.prompt_embeds, x.dtype), x)
            return output, None, variance
        if self.mode is GuidanceMode.SEQUENTIAL:
            uncond, _ = self._split(self._call(inputs, timestep, self.negative_prompt_embeds, x.dtype), x)
            output, variance = self._split(self._call(inputs, timestep, self.prompt_embeds, x.dtype), x)
            return output, uncond, variance
        both = self._call(inputs, timestep, self.both_embeds, x.dtype)
        uncond, output = both.chunk(2)
        (uncond, _), (output, variance) = self._split(uncond, x), self._split(output, x)
        return output, uncond, variance

    def _call(self, x: Tensor, timestep: Tensor, embeds: Tensor | None, dtype: torch.dtype) -> Tensor:
        arguments = (x, timestep.expand(x.shape[0])) if embeds is None else (x, timestep.expand(x.shape[0]), embeds)
        output = unwrap(self.model(*arguments, **self.model_kwargs))
        expected = x.shape
        if self.channels > 1:
            expected = torch.Size([x.shape[0], self.channels * x.shape[1], *x.shape[2:]])
        if output.shape != expected:
            remedy = "return one output like the sample"
            if self.channels > 1:
                remedy = "return the variance as the second half of the channels, or choose a fixed variance_type"
            elif x.dim() > 1 and list(output.shape) == [x.shape[0], 2 * x.shape[1], *x.shape[2:]]:
                remedy = "set variance_type='learned_range' if the model predicts a variance"
            raise ValueError(
                error_message("sample", "model", f"returned shape {list(output.shape)}", f"{list(expected)}", remedy)
            )
        if output.layout != torch.strided or output.device != x.device:
            got, wanted = f"returned layout {output.layout} on {output.device}", f"dense numbers on {x.device}"
            raise TypeError(error_message("sample", "model", got, wanted, "convert or move them in the model"))
        if output.dtype != dtype:
            if output.is_complex():
                got, wanted = f"returned {output.dtype}", "real numbers, like the sample's"
                raise TypeError(
                    error_message("sample", "model", got, wanted, "return the real part if it is all there is")
                )
            output = output.to(dtype)  # a half model, or one under autocast, answers in its own precision
        if self.check_finite and not bool(torch.isfinite(output).all()):
            what = "NaN" if bool(torch.isnan(output).any()) else "infinity"
            raise ValueError(
                error_message(
                    "sample",
                    "model",
                    f"returned {what} at timestep {float(timestep):g}",
                    "finite numbers",
                    "check the model and its precision; a half-precision overflow is the usual cause",
                )
            )
        return output

    def _split(self, output: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.channels == 1:
            return output, None
        mean, variance = output.chunk(2, dim=1)
        return mean, variance


def write_model_input(model_input: Tensor, x: Tensor, scale: float = 1.0) -> None:
    """Write the model's input for the samples x, with the bits that the step writes: scale·x, rounded once.

    Args:
        model_input: what `GuidedModel.prepare` gave for such samples: once or twice along the batch, in any dtype.
        x: ``[B, ...]``.
        scale: of the row whose step has made x.
    """
    if x.numel() == 0:
        return
    scaled = x if scale == 1.0 else x.to(compute_dtype(x.dtype)) * scale
    model_input.view(-1, *x.shape).copy_(scaled)


def unwrap(result: Any) -> Tensor:
    """The tensor that a model returned: itself, first of a tuple, under "sample" of a dict, or as `.sample`."""
    if isinstance(result, Tensor):
        return result
    if isinstance(result, Mapping) and isinstance(result.get("sample"), Tensor):
        sample: Tensor = result["sample"]
        return sample
    if isinstance(getattr(result, "sample", None), Tensor):
        return result.sample
    if isinstance(result, (tuple, list)) and result and isinstance(result[0], Tensor):
        return result[0]
    raise TypeError(
        error_message(
            "sample",
            "model",
            f"returned a {type(result).__name__}",
            "a tensor, a tuple that begins with one, a dict with 'sample' or an object with .sample",
            "return the prediction in one of these forms",
        )
    )
