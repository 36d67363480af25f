# SPDX-License-Identifier: MIT
"""A stored rollout: everything that its replay needs, and its file."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..errors import error_message, require
from ..files import write_whole
from ..ops.log_prob import REDUCTIONS
from ..row_layout import COLUMNS, NUM_REGISTERS, PREV_SAMPLE, ROW_WIDTH, STORE_0, STORE_1, compute_dtype

#: Version of the file format; `Trajectory.load` reads this one.
VERSION = 1
_NOISE = PREV_SAMPLE + COLUMNS.index("noise")
_FORMAT = "fastdiff trajectory"


@dataclass(frozen=True)
class Trajectory:
    """The samples of a rollout with the rows, the noise and the probabilities of its steps.

    Attributes:
        samples: ``[S + 1, B, ...]``: the scaled latents, then the sample after each of the S steps, as stored.
        coefficients: float64 ``[S, 32]`` on the CPU, the rows of the table; its float32 (float64) form steps.
        timesteps: float64 ``[S]`` on the CPU, the model's time arguments.
        kept: for each step the tensors like a sample that it kept as history, 0 to 2 of them.
        log_probs: ``[N, B]``, of the N stochastic steps, those of `steps`; no gradient.
        reduction: of the log-probabilities, "sum" or "mean" over the elements of a sample.
        guidance_scale: a number, a tensor ``[B]``, or None where the model had no unconditional output.
        seeds: int64 ``[B]``, where the noise came from them; step i drew with ``noise_step=i``.
    """

    samples: Tensor
    coefficients: Tensor
    timesteps: Tensor
    kept: tuple[tuple[Tensor, ...], ...]
    log_probs: Tensor
    reduction: str
    guidance_scale: float | Tensor | None = None
    seeds: Tensor | None = None

    def __post_init__(self) -> None:
        _check(self)

    def __len__(self) -> int:
        """Return the number of steps."""
        return len(self.coefficients)

    @property
    def steps(self) -> tuple[int, ...]:
        """The indices of the stochastic steps: those whose row adds noise."""
        return tuple(torch.nonzero(self.coefficients[:, _NOISE]).flatten().tolist())

    def timestep(self, step: int) -> Tensor:
        """Return the model's time argument of a step, ``[]`` on the samples' device: int64 where all are whole."""
        whole = bool((self.timesteps == self.timesteps.round()).all())
        return self.timesteps[step].to(torch.int64 if whole else torch.float32).to(self.samples.device)

    def history(self, step: int) -> tuple[Tensor | None, ...]:
        """Return the four history slots as a step read them, None where no earlier step wrote."""
        slots: list[Tensor | None] = [None] * NUM_REGISTERS
        for row, kept in zip(self.coefficients[:step].tolist(), self.kept, strict=False):
            for store, tensor in zip((STORE_0, STORE_1), kept, strict=False):
                slots[int(row[store])] = tensor
        return tuple(slots)

    def log_prob(
        self, step: int, model_output: Tensor, uncond: Tensor | None = None, *, backend: str | None = None
    ) -> Tensor:
        """Return the log-probability of a stored step under a model output, ``[B]``, differentiable in it.

        With the output of the rollout it has the bits of `log_probs`.

        Args:
            step: index of a stochastic step.
            model_output, uncond: of the model at ``samples[step]`` and ``timestep(step)``, like a sample.
            backend: forces one, as in `fastdiff.ops.step`.

        Raises:
            TypeError, ValueError: the outputs do not fit, or the step added no noise.
        """
        sample = self.samples[step]
        guided = {}
        if uncond is not None or self.guidance_scale is not None:
            guided = {"uncond": uncond, "guidance_scale": self.guidance_scale}
        return ops.log_prob(
            self.samples[step + 1],
            sample,
            model_output,
            self.coefficients_on_device(),
            step,
            history=self.history(step),
            reduction=self.reduction,
            backend=backend,
            **guided,  # type: ignore[arg-type]
        )

    def coefficients_on_device(self) -> Tensor:
        """Return the rows as the steps read them: in the compute dtype, on the samples' device; do not write to it."""
        if torch.compiler.is_compiling():
            return self.coefficients.to(compute_dtype(self.samples.dtype)).to(self.samples.device)
        return self._rows_on_device

    @functools.cached_property
    def _rows_on_device(self) -> Tensor:
        with torch.inference_mode(False):  # autograd could not save an inference tensor
            return self.coefficients.to(compute_dtype(self.samples.dtype)).to(self.samples.device)

    def select(self, samples: Tensor | slice) -> Trajectory:
        """Return the trajectory of some of the samples, by their indices in the batch; its tensors may be views."""
        scale = self.guidance_scale
        return replace(
            self,
            samples=self.samples[:, samples],
            kept=tuple(tuple(tensor[samples] for tensor in kept) for kept in self.kept),
            log_probs=self.log_probs[:, samples],
            guidance_scale=scale[samples] if isinstance(scale, Tensor) and scale.numel() > 1 else scale,
            seeds=None if self.seeds is None else self.seeds[samples],
        )

    def to(self, device: torch.device | str) -> Trajectory:
        """Return the trajectory with its samples on a device."""
        scale = self.guidance_scale
        return replace(
            self,
            samples=self.samples.to(device),
            kept=tuple(tuple(tensor.to(device) for tensor in kept) for kept in self.kept),
            log_probs=self.log_probs.to(device),
            guidance_scale=scale.to(device) if isinstance(scale, Tensor) else scale,
            seeds=None if self.seeds is None else self.seeds.to(device),
        )

    def save(self, path: str | Path) -> None:
        """Write the trajectory to a safetensors file, whole or not at all.

        Raises:
            ImportError: safetensors is not installed.
            OSError: the file cannot be written.
        """
        safetensors = require("safetensors.torch", "training", "Trajectory.save")
        tensors = {name: getattr(self, name) for name in ("samples", "coefficients", "timesteps", "log_probs")}
        tensors |= {f"kept.{i}.{j}": tensor for i, kept in enumerate(self.kept) for j, tensor in enumerate(kept)}
        if self.seeds is not None:
            tensors["seeds"] = self.seeds
        scale = self.guidance_scale
        if scale is not None:
            tensors["guidance_scale"] = scale if isinstance(scale, Tensor) else torch.tensor(scale, dtype=torch.float64)
        facts = {
            "format": _FORMAT,
            "version": VERSION,
            "reduction": self.reduction,
            "guidance_is_number": isinstance(scale, float),
        }
        found = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        data = safetensors.save(found, metadata={"fastdiff": json.dumps(facts)})
        write_whole(path, data, operation="Trajectory.save", argument="path")

    @classmethod
    def load(cls, path: str | Path) -> Trajectory:
        """Read a trajectory that `save` wrote, onto the CPU.

        Raises:
            ImportError: safetensors is not installed.
            OSError: the file cannot be read.
            ValueError: it is no such file, or its tensors do not fit together; the message says which.
        """
        safetensors = require("safetensors", "training", "Trajectory.load")
        try:
            with safetensors.safe_open(str(path), framework="pt") as file:
                facts = json.loads((file.metadata() or {}).get("fastdiff", "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        except OSError:
            raise
        except Exception as error:  # safetensors' own errors, and those of a header that is no JSON
            raise _unreadable(path, f"cannot be read ({error})") from error
        if not isinstance(facts, dict) or facts.get("format") != _FORMAT or facts.get("version") != VERSION:
            raise _unreadable(path, f"says {facts!r}")
        missing = [name for name in ("samples", "coefficients", "timesteps", "log_probs") if name not in tensors]
        if missing:
            raise _unreadable(path, f"lacks the tensor {missing[0]!r}")
        kept: list[tuple[Tensor, ...]] = []
        for i in range(len(tensors["coefficients"])):
            kept.append(tuple(tensors[f"kept.{i}.{j}"] for j in range(2) if f"kept.{i}.{j}" in tensors))
        scale: Any = tensors.get("guidance_scale")
        if scale is not None and facts.get("guidance_is_number"):
            scale = float(scale)
        known = {field.name for field in fields(cls)}
        plain = {name: tensor for name, tensor in tensors.items() if name in known - {"guidance_scale"}}
        return cls(**plain, kept=tuple(kept), reduction=facts.get("reduction", ""), guidance_scale=scale)


def _unreadable(path: str | Path, got: str) -> ValueError:
    expected = f"a {_FORMAT} of version {VERSION}"
    return ValueError(
        error_message("Trajectory.load", str(path), got, expected, "write it with Trajectory.save of this version")
    )


def _check(trajectory: Trajectory) -> None:
    """Check that the tensors of a trajectory fit together."""
    samples, rows = trajectory.samples, trajectory.coefficients

    def fail(argument: str, got: str, expected: str) -> ValueError:
        return ValueError(error_message("Trajectory", argument, got, expected, "make it with rollout, or load it"))

    if trajectory.reduction not in REDUCTIONS:
        raise fail("reduction", f"is {trajectory.reduction!r}", "'sum' or 'mean'")
    if rows.dim() != 2 or rows.shape[1] != ROW_WIDTH or rows.dtype != torch.float64:
        raise fail("coefficients", f"has shape {list(rows.shape)} and {rows.dtype}", f"[S, {ROW_WIDTH}] in float64")
    steps = len(rows)
    if samples.dim() < 2 or len(samples) != steps + 1:
        raise fail("samples", f"has shape {list(samples.shape)}", f"[{steps + 1}, B, ...]")
    if list(trajectory.timesteps.shape) != [steps]:
        raise fail("timesteps", f"has shape {list(trajectory.timesteps.shape)}", f"[{steps}]")
    batch, stochastic = samples.shape[1], len(trajectory.steps)
    if list(trajectory.log_probs.shape) != [stochastic, batch]:
        raise fail("log_probs", f"has shape {list(trajectory.log_probs.shape)}", f"[{stochastic}, {batch}]")
    if trajectory.seeds is not None and (
        list(trajectory.seeds.shape) != [batch] or trajectory.seeds.dtype != torch.int64
    ):
        got = f"has shape {list(trajectory.seeds.shape)} and {trajectory.seeds.dtype}"
        raise fail("seeds", got, f"[{batch}] in int64")
    if len(trajectory.kept) != steps:
        raise fail("kept", f"has {len(trajectory.kept)} entries", f"{steps}, one a step")
    for i, kept in enumerate(trajectory.kept):
        slots = [slot for slot in rows[i, [STORE_0, STORE_1]].tolist() if 0 <= slot < NUM_REGISTERS]
        if len(kept) != len(slots) or any(tensor.shape != samples.shape[1:] for tensor in kept):
            got = f"holds shapes {[list(tensor.shape) for tensor in kept]}"
            raise fail(f"kept[{i}]", got, f"{len(slots)} tensors like a sample {list(samples.shape[1:])}")
