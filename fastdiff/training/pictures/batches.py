# SPDX-License-Identifier: MIT
"""Images of a trained model by image ids: the function that `fastdiff.sharding` calls for each batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ...digits import DigitUNet
from ...errors import error_message
from ...samplers import BaseSampler
from ...sharding.sampler_batches import SamplerBatches
from ..model.diffusion_model import DiffusionModel
from ..model.from_checkpoint import load_trained_model
from ..model.scheduler import DiffusionScheduler
from ..model.text_encoder import encode_prompts


class CheckpointModel:
    """The model of a checkpoint.  Its pickle has the folder alone: another process reads the same checkpoint again.

    Args:
        folder: see `fastdiff.training.model.from_checkpoint.find_checkpoint`.
        operation, argument: for messages.
        digest: of the checkpoint, which has to have it; None for any.

    Attributes:
        folder: of the checkpoint, absolute.
        digest: see `fastdiff.training.checkpoints.Checkpoint`.
        config: the settled configuration of the training.
        takes_labels, takes_prompts: the model is a `DigitUNet`, or has a text encoder.

    Raises:
        FileNotFoundError, ValueError: it is no whole checkpoint of such a model, or has another digest.
    """

    def __init__(
        self, folder: str | Path, *, operation: str = "sample", argument: str = "--weights", digest: str | None = None
    ) -> None:
        found = load_trained_model(folder, operation=operation, argument=argument)
        if digest not in (None, found.digest):
            got, expected = (
                f"is {str(found.folder)!r}, which was written again",
                "the checkpoint that the job began with",
            )
            raise ValueError(error_message(operation, argument, got, expected, "start the job again"))
        self.folder, self.digest, self.config = found.folder.resolve(), found.digest, found.config
        self._network, self._text_encoder = found.network, found.text_encoder
        self.takes_labels = isinstance(found.network, DigitUNet)
        self.takes_prompts = found.text_encoder is not None

    def __reduce__(self) -> tuple[Callable[[Path, str], CheckpointModel], tuple[Path, str]]:
        return _read_again, (self.folder, self.digest)

    def network(self, device: str) -> nn.Module:
        """Return the network on a device, in evaluation mode, without gradients."""
        return self._network.to(device).eval().requires_grad_(False)

    def encode(self, prompt: str, device: str) -> Tensor:
        """Return the condition of a prompt, ``[1, tokens, context_dim]``."""
        assert self._text_encoder is not None
        if isinstance(self._text_encoder, nn.Module):
            self._text_encoder.to(device).eval()
        return encode_prompts(self._text_encoder, [prompt], next(self._network.to(device).parameters()))


def _read_again(folder: Path, digest: str) -> CheckpointModel:
    return CheckpointModel(folder, digest=digest)


class ModelBatches(SamplerBatches):
    """Draw images of an `AdvancedUNet`, all with one prompt where the model has a text encoder.

    Args:
        weights: the model.
        sampling: fields of `fastdiff.SamplingConfig`; the configuration of the training has what is left out.
        guidance_scale: of classifier-free guidance; 1 for none.
        prompt, negative_prompt: for a model with a text encoder; the empty prompt is no condition.
        device, backend, threads: see `SamplerBatches`.

    Raises:
        TypeError, ValueError: the fields do not fit.
    """

    def __init__(
        self,
        weights: CheckpointModel,
        sampling: Mapping[str, Any],
        *,
        guidance_scale: float = 1.0,
        prompt: str = "",
        negative_prompt: str = "",
        device: str = "cpu",
        backend: str | None = None,
        threads: int | None = None,
    ) -> None:
        super().__init__(device=device, backend=backend, threads=threads)
        config = weights.config
        self.shape = (config.in_channels, config.image_size, config.image_size)
        self._weights, self._prompts = weights, (prompt, negative_prompt)
        given = {name: value for name, value in sampling.items() if value is not None}
        self._fields = {**given, "guidance_scale": guidance_scale}
        _ = self.sampler  # refuses fields that do not fit

    def make_sampler(self) -> BaseSampler:
        """Return the sampler on the schedule of the training."""
        return DiffusionScheduler(self._weights.config).sampler(**self._fields)

    def load_model(self) -> nn.Module:
        """Return the model on the device, with the output that the sampler takes."""
        model = DiffusionModel(self._weights.config, self._weights.network(self.device))
        return model.for_sampler(self.sampler).eval()

    def conditions(self, ids: Sequence[int]) -> tuple[Tensor | None, Tensor | None]:
        """Return the embeddings of the two prompts, one a sample; None for a model without a text encoder."""
        if not self._weights.takes_prompts:
            return None, None
        if "conditions" not in self._loaded:
            self._loaded["conditions"] = tuple(self._weights.encode(prompt, self.device) for prompt in self._prompts)
        condition, unconditional = (one.repeat(len(ids), 1, 1) for one in self._loaded["conditions"])
        return condition, None if self._fields["guidance_scale"] == 1.0 else unconditional
