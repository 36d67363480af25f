# SPDX-License-Identifier: MIT
"""Noise of the samples' own seeds for code that draws it from torch's generators."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import error_message
from ..ops import randn
from ..philox import as_seeds, purpose_of_draw

_RANDN = (torch.ops.aten.randn.default, torch.ops.aten.randn.generator)
_REMEDY = "call use_philox(None), so that generators draw"


class SeededDraws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within the block, let `torch.randn` and `torch.randn_like` return numbers of the samples' own seeds.

    The k-th draw, from k = 0, is ``fastdiff.randn(shape, seeds, step, purpose_of_draw(k))`` in the dtype and on the
    device asked for; the first one is so the noise that a fused step of these seeds draws inside.  Generators passed
    are not asked.  Where a list of one generator a sample is passed to diffusers' `randn_tensor`, which draws one
    sample after another, those B draws are one.  Any other random operation of torch, known by its tag
    `nondeterministic_seeded`, is refused.  The block holds for the thread that enters it.

    Args:
        seeds: one for each sample, as in `fastdiff.randn`.
        step: the number of the step that is taken within the block.

    Raises:
        RuntimeError: a draw is no normal noise of B samples; nothing is drawn by it.
    """

    def __init__(self, seeds: Sequence[int] | Tensor, step: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seeds = as_seeds(seeds, len(seeds), seeds.device if isinstance(seeds, Tensor) else "cpu")
        self.step = step
        #: Whole draws so far, and samples of the one under way.
        self.draws = self._samples = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        if func in _RANDN:
            return self._drawn(args[0], kwargs, torch.get_default_dtype(), torch.device("cpu"))
        if func.overloadpacket is torch.ops.aten.randn_like:
            like = args[0]
            drawn = self._drawn(like.shape, kwargs, like.dtype, like.device)
            layout = kwargs.get("memory_format") or torch.preserve_format
            return torch.empty_like(like, dtype=drawn.dtype, device=drawn.device, memory_format=layout).copy_(drawn)
        raise RuntimeError(
            error_message("use_philox", "the step", f"draws by {func}", "torch.randn or torch.randn_like", _REMEDY)
        )

    def __exit__(self, kind: Any, *exception: Any) -> None:
        super().__exit__(kind, *exception)  # type: ignore[no-untyped-call]
        if kind is None and self._samples > 0:
            raise self._refused([1])

    def _drawn(
        self, shape: Sequence[int], kwargs: Mapping[str, Any], dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        dtype, device = kwargs.get("dtype") or dtype, kwargs.get("device") or device
        seeds, purpose = self.seeds, purpose_of_draw(self.draws)
        batch = len(seeds)
        if kwargs.get("generator") is not None and batch > 1 and list(shape[:1]) == [1]:
            seeds = seeds[self._samples : self._samples + 1]
            self._samples = (self._samples + 1) % batch
        elif list(shape[:1]) != [batch] or self._samples > 0:
            raise self._refused(shape)
        drawn = randn(shape, seeds, self.step, purpose, device, dtype)
        if self._samples == 0:
            self.draws += 1
        return drawn

    def _refused(self, shape: Sequence[int]) -> RuntimeError:
        batch = len(self.seeds)
        return RuntimeError(
            error_message("use_philox", "the step", f"draws noise of shape {list(shape)}",
                     f"[{batch}, ...], for {batch} samples with a seed each", _REMEDY)
        )  # fmt: skip
