# SPDX-License-Identifier: MIT
"""torch's own normal numbers, drawn several times faster: the same bits, and the generator left in the same state.

Whoever draws noise as torch and diffusers do pays for a Mersenne Twister that makes one word at a time.  The extension
has a loop that makes the same words many at a time and turns them into the same numbers
(csrc/torch_bits/torch_normal_loop.inc).  It takes float32 on the CPU, 16 numbers or more, where torch runs its AVX2
code; everything else is torch's to draw, and since both give the same bits nobody can tell which one did.

That this torch draws so is not assumed: at the first draw of a process both draw a few thousand numbers from equal
generators, and unless bits and states agree, torch draws from then on.  `why_by_torch` says which it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..extension import cpu_build, extension, extension_error

#: The draws by which a torch is known: whole groups of 16 and others, less and more than the 624 words that a generator
#: makes at a time, from one that has none left, all of them, or some.
_TRIAL_SIZES = (16, 17, 591, 624, 31, 2 * 624, 1000, 4096, 16 + 623)
_TRIAL_SEEDS = (0, 2**63 - 25)

#: What torch would draw; None, and nothing drawn, where the call is not plain or there is no loop.
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
    """``torch.randn(shape, generator=generator, device=device, dtype=dtype)``: its bits and its refusals, and the
    generator in the state that it leaves.

    Args:
        shape: of the result.
        generator: what to draw from; torch's default for None.
        device, dtype: of the result; torch's defaults for None.

    Raises:
        RuntimeError, TypeError: what torch raises.
    """
    drawn = _draw_here(shape, generator, device, dtype)
    return torch.randn(shape, generator=generator, device=device, dtype=dtype) if drawn is None else drawn


def randn_like_diffusers(
    shape: Sequence[int],
    generator: torch.Generator | list[torch.Generator] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``diffusers.utils.torch_utils.randn_tensor(shape, generator, device, dtype)`` without diffusers, which would also
    log that a CPU generator's numbers are moved.

    Args:
        shape: of the result; its first dimension is the batch.
        generator: one for all, or a list of one a sample, whose draws are put together; a list of one is that one for
            all.  Generators on the CPU draw there, and the result is moved.
        device: of the result; the CPU for None.
        dtype: of the result; torch's default for None.

    Raises:
        ValueError: a CUDA generator is to draw for another type of device.
        IndexError: there are fewer generators than samples.
        RuntimeError, TypeError: what torch raises.
    """
    drawn = _draw_here(shape, generator, device, dtype)
    if drawn is not None:
        return drawn  # nothing to choose, to put together or to move
    if isinstance(device, str):
        device = torch.device(device)
    drawn_on: torch.device | str | None = device
    batch = shape[0]
    device = device or torch.device("cpu")
    if device.type == "neuron":  # draws nothing itself
        drawn_on = torch.device("cpu")
    if generator is not None:
        drawn_by = (generator[0] if isinstance(generator, list) else generator).device.type
        if drawn_by != device.type and drawn_by == "cpu":
            drawn_on = "cpu"
        elif drawn_by != device.type and drawn_by == "cuda":
            raise ValueError(f"Cannot generate a {device} tensor from a generator of type {drawn_by}.")
    if isinstance(generator, list) and len(generator) == 1:
        generator = generator[0]
    if not isinstance(generator, list):
        return torch_randn(shape, generator, device=drawn_on, dtype=dtype).to(device)
    one = (1,) + shape[1:]  # type: ignore[operator]  # a list is refused, as diffusers refuses it
    parts = [torch_randn(one, generator[i], device=drawn_on, dtype=dtype) for i in range(batch)]
    return torch.cat(parts, dim=0).to(device)


def why_by_torch() -> str:
    """Why torch itself draws its float32 numbers on the CPU here, as a clause; empty where fastdiff's loop draws them.

    A call that some mode, tracer or transform has to see is torch's all the same, and so is the answer within one.
    """
    return "" if _trial.passes() else _trial.problem or "something around this call has to see torch's operators"


def _draw_here(
    shape: Sequence[int],
    generator: torch.Generator | list[torch.Generator] | None,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> Tensor | None:
    """What torch would draw with these arguments; None, and nothing drawn, where torch has to."""
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
    """Whether the loop draws what torch draws: found out once, by the first plain call."""

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
    if extension is None:
        return extension_error
    if cpu_build() == "generic":
        return "the extension's generic build has no loop for it"
    if torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        return "torch runs without its AVX2 code"
    return ""


def _difference() -> str:
    """What differs between the loop's draws and torch's from equal generators, as a clause; empty for nothing."""
    for seed in _TRIAL_SEEDS:
        ours, theirs = (torch.Generator("cpu").manual_seed(seed) for _ in range(2))
        for size in _TRIAL_SIZES:
            drawn = _draw((size,), ours)
            expected = torch.randn((size,), generator=theirs, dtype=torch.float32, device="cpu")
            if not torch.equal(drawn.view(torch.int32), expected.view(torch.int32)):
                return f"torch {torch.__version__} makes other bits of a generator's words"
            if not torch.equal(ours.get_state(), theirs.get_state()):
                return f"torch {torch.__version__} leaves a generator in another state"
    return ""


_trial = _Trial()
