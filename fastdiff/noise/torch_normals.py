# SPDX-License-Identifier: MIT
"""torch.randn on the CPU, several times faster: the same bits, and the same generator state afterwards.

torch's CPU generator is a Mersenne Twister that produces one word at a time.  The extension has a loop that produces
the same words many at a time and turns them into the same numbers (csrc/torch_bits/torch_normal_loop.inc).  It serves
float32 on the CPU, 16 numbers or more, where torch runs its AVX2 code; torch draws everything else.

The equality is verified, not assumed: the first draw of a process draws a few thousand numbers both ways from equal
generators, and unless bits and states agree, torch draws from then on.  `why_by_torch` gives the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..device_copy import to_device
from ..extension import cpu_build, extension, extension_error

#: Sizes of the draws that are compared: multiples of 16 and others, below and above the 624 words of a generator's
#: state, starting with none, all or some of the state's words used.
_TRIAL_SIZES = (16, 17, 591, 624, 31, 2 * 624, 1000, 4096, 16 + 623)
_TRIAL_SEEDS = (0, 2**63 - 25)

#: Draw the numbers of torch.randn in the extension; return None and draw nothing if the call is not plain eager.
_draw: Callable[[Sequence[int], Any], Any] = (lambda *_: None) if extension is None else extension.torch_randn
_is_compiling = torch.compiler.is_compiling
_get_default_device = torch._C._get_default_device


def torch_randn(
    shape: Sequence[int],
    generator: torch.Generator | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return ``torch.randn(shape, generator=generator, device=device, dtype=dtype)``, with the same generator state.

    Args:
        shape: shape of the result.
        generator: the generator to draw from; None for torch's default.
        device, dtype: device and dtype of the result; None for torch's defaults.

    Raises:
        RuntimeError, TypeError: as torch.randn raises them.
    """
    drawn = _draw_in_extension(shape, generator, device, dtype)
    return torch.randn(shape, generator=generator, device=device, dtype=dtype) if drawn is None else drawn


def batched_randn(
    shape: Sequence[int],
    generator: torch.Generator | list[torch.Generator] | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Draw a batch on `device` with one generator, or with a list whose i-th generator draws the i-th sample.

    Args:
        shape: shape of the result; its first dimension is the batch.
        generator: generators of that type of device.
        device, dtype: device and dtype of the result; None for torch's defaults.

    Raises:
        IndexError: the list has fewer generators than there are samples.
        RuntimeError, TypeError: as torch.randn raises them.
    """
    if not isinstance(generator, list):
        return torch_randn(shape, generator, device=device, dtype=dtype)
    one = (1,) + shape[1:]  # type: ignore[operator]  # a list is a TypeError, like in diffusers
    return torch.cat([torch_randn(one, generator[i], device=device, dtype=dtype) for i in range(shape[0])])


def randn_like_diffusers(
    shape: Sequence[int],
    generator: torch.Generator | list[torch.Generator] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return ``diffusers.utils.torch_utils.randn_tensor(shape, generator, device, dtype)`` without importing diffusers.

    The one difference is diffusers' log message about moving a CPU generator's numbers, which is left out.

    Args:
        shape: shape of the result; its first dimension is the batch.
        generator: one for the batch, or a list of one per sample, whose draws are concatenated; a list of one is used
            for the whole batch.  CPU generators draw on the CPU, and the result is moved.
        device: device of the result; None for the CPU.
        dtype: dtype of the result; None for torch's default.

    Raises:
        ValueError: a CUDA generator is given for another type of device.
        IndexError: there are fewer generators than samples.
        RuntimeError, TypeError: as torch.randn raises them.
    """
    drawn = _draw_in_extension(shape, generator, device, dtype)
    if drawn is not None:
        return drawn
    _ = shape[0]  # an empty shape is an IndexError, like in diffusers
    if isinstance(device, str):
        device = torch.device(device)
    drawn_on: torch.device | str | None = device
    device = device or torch.device("cpu")
    if device.type == "neuron":  # has no generator
        drawn_on = torch.device("cpu")
    if generator is not None:
        drawn_by = (generator[0] if isinstance(generator, list) else generator).device.type
        if drawn_by != device.type and drawn_by == "cpu":
            drawn_on = "cpu"
        elif drawn_by != device.type and drawn_by == "cuda":
            raise ValueError(f"Cannot generate a {device} tensor from a generator of type {drawn_by}.")
    if isinstance(generator, list) and len(generator) == 1:
        generator = generator[0]
    return to_device(batched_randn(shape, generator, device=drawn_on, dtype=dtype), device)


def why_by_torch() -> str:
    """Return why torch draws float32 numbers on the CPU here, as a clause; empty if the extension draws them.

    torch also draws within a mode, tracer or transform that has to see its operators; called there, this says so.
    """
    return "" if _trial.passes() else _trial.problem or "something around this call has to see torch's operators"


def _draw_in_extension(
    shape: Sequence[int],
    generator: torch.Generator | list[torch.Generator] | None,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> Tensor | None:
    """Draw the numbers of torch.randn in the extension; return None and draw nothing if torch has to draw."""
    if (
        not _is_compiling()  # a tracer has to see torch's operator
        and (dtype is torch.float32 or (dtype is None and torch.get_default_dtype() is torch.float32))
        and (device.type if isinstance(device, torch.device) else device or _get_default_device()) == "cpu"
        and (_trial.passed or _trial.passes())
    ):
        drawn: Tensor | None = _draw(shape, generator)
        return drawn
    return None


class _Trial:
    """One-time comparison of the extension's draws with torch's, made by the first plain eager call."""

    def __init__(self) -> None:
        self.passed = False
        self.problem = _why_impossible()

    def passes(self) -> bool:
        if self.passed or self.problem or _draw((16,), torch.Generator("cpu")) is None:
            return self.passed
        self.problem = _difference()
        self.passed = not self.problem
        if self.passed:
            extension.trust_torch_randn()  # type: ignore[union-attr]  # there is one, or it would be the problem
        return self.passed


def _why_impossible() -> str:
    """Return why the extension cannot draw here, as a clause; empty if it may."""
    if extension is None:
        return extension_error
    if cpu_build() == "generic":
        return "the extension's generic build has no loop for it"
    if torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        return "torch runs without its AVX2 code"
    return ""


def _difference() -> str:
    """Compare the extension's draws with torch's from equal generators; return the difference as a clause, or ""."""
    for seed in _TRIAL_SEEDS:
        own, torchs = (torch.Generator("cpu").manual_seed(seed) for _ in range(2))
        for size in _TRIAL_SIZES:
            drawn = _draw((size,), own)
            expected = torch.randn((size,), generator=torchs, dtype=torch.float32, device="cpu")
            if not torch.equal(drawn.view(torch.int32), expected.view(torch.int32)):
                return f"torch {torch.__version__} makes other bits of a generator's words"
            if not torch.equal(own.get_state(), torchs.get_state()):
                return f"torch {torch.__version__} leaves a generator in another state"
    return ""


_trial = _Trial()
