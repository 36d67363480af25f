# SPDX-License-Identifier: MIT
"""A sampler's loop under a guidance method: the model's call for each branch, and the guided step, as the loop asks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..device_copy import to_device
from ..errors import error_message
from ..guidance import GuidanceMode, GuidedModel, Model
from ..guidance.gradients import LossGuidance
from ..noise.generators import Generators
from ..solvers.table import StepTable
from .guided_stepper import GuidedStepper

#: A branch of `sample(branches=)`: a condition, another model, or the clean sample of ``reference``.
Branch = Tensor | Model


class GuidedRun:
    """The model and the stepper of one loop under a guidance method, with the methods that `SamplingLoop` calls.

    A step calls each model once, with a batch of the samples and branches that it needs; `GuidanceMode.SEQUENTIAL`
    calls it once a branch.

    Args:
        model: the model with the conditions of ``cond`` (`prompt_embeds`) and ``uncond`` (`negative_prompt_embeds`).
        stepper: a fresh one.
        branches: what the other branches of the method are, by name: a condition like `prompt_embeds`; another model,
            called with `prompt_embeds`; for ``reference`` a clean sample.

    Raises:
        ValueError: a branch of the method has neither condition nor model.
    """

    guided = False
    guidance_scale = 1.0

    def __init__(
        self, model: GuidedModel, stepper: GuidedStepper, branches: Mapping[str, Branch] | None = None
    ) -> None:
        self.mode = model.mode
        self._stepper = stepper
        self._given = dict(branches or {})
        self._cond = replace(model, guidance_scale=1.0, negative_prompt_embeds=None)
        self._embeds = {"cond": model.prompt_embeds, "uncond": model.negative_prompt_embeds}
        self._outputs: dict[str, Tensor] = {}
        self._leaf: Tensor | None = None
        self._differentiates = any(isinstance(t, LossGuidance) and t.through_model for t in stepper.terms)
        for name in stepper.guidance.branches:
            if name not in self._embeds and name not in self._given:
                got, remedy = f"lacks {name!r}", f"pass branches={{{name!r}: a condition or a model}}"
                raise ValueError(error_message("sample", "branches", got, "every branch of the method", remedy))
        for name, given in self._given.items():
            if isinstance(given, Tensor):
                self._embeds[name] = given

    # --- As a model -------------------------------------------------------------------------------------------------

    def prepare(self, x: Tensor) -> None:
        """Return None: the input of a step depends on the branches that it needs."""

    def __call__(
        self, x: Tensor, timestep: Tensor, prepared: Tensor | None = None
    ) -> tuple[Tensor, None, Tensor | None]:
        """Call the models for the branches of the next step.

        Returns:
            The output of the first branch (x where the step needs none), None, and the variance or None.
        """
        names = list(self._stepper.branches)
        if self._differentiates:
            x = self._leaf = x.detach().requires_grad_()
        variance: Tensor | None = None
        outputs: dict[str, Tensor] = {}
        with torch.set_grad_enabled(self._differentiates):
            for group in self._groups(names):
                for name, output, spread in self._call(group, x, timestep):
                    outputs[name] = output
                    variance = spread if name == "cond" else variance
        if "reference" in names:
            outputs["reference"] = self._given["reference"].to(x.dtype)  # type: ignore[union-attr]
        self._outputs = outputs
        return outputs[names[0]].detach() if names else x, None, variance

    def _groups(self, names: list[str]) -> list[list[str]]:
        """Return the branches that go into one call each: those of one model, or each by itself."""
        groups: dict[object, list[str]] = {}
        for name in names:
            if name == "reference":
                continue
            given = self._given.get(name)
            own = None if given is None or isinstance(given, Tensor) else given
            alone = self.mode is GuidanceMode.SEQUENTIAL or (own is None and self._embeds[name] is None)
            groups.setdefault((id(own), name if alone else None), []).append(name)
        return list(groups.values())

    def _call(self, names: list[str], x: Tensor, timestep: Tensor) -> list[tuple[str, Tensor, Tensor | None]]:
        given = self._given.get(names[0])
        model = self._cond if given is None or isinstance(given, Tensor) else replace(self._cond, model=given)
        chosen = [self._stepper.samples_for(name) for name in names]
        inputs, embeds = [], []
        for name, samples in zip(names, chosen, strict=True):
            of_branch = self._embeds.get(name, self._embeds["cond"])
            where = None if samples is None else to_device(samples, x.device)
            inputs.append(x if where is None else x[where])
            if of_branch is not None:
                embeds.append(of_branch if where is None else of_branch[where.to(of_branch.device)])
        batch = inputs[0] if len(inputs) == 1 else torch.cat(inputs)
        condition = None if not embeds else embeds[0] if len(embeds) == 1 else torch.cat(embeds)
        wide = batch.to(model.model_dtype or x.dtype)
        output, variance = model._split(model._call(wide, timestep, condition, x.dtype), wide)
        sizes = [len(part) for part in inputs]
        spreads = [None] * len(names) if variance is None else variance.split(sizes)
        return list(zip(names, output.split(sizes), spreads, strict=True))

    # --- As a stepper -----------------------------------------------------------------------------------------------

    @property
    def table(self) -> StepTable:
        """The table that the stepper walks."""
        return self._stepper.table

    @property
    def index(self) -> int:
        """The index of the next row."""
        return self._stepper.index

    @property
    def done(self) -> bool:
        """True after the last row."""
        return self._stepper.done

    def step(
        self, sample: Tensor, model_output: Tensor, *, variance: Tensor | None = None, generator: Generators = None,
        out: Tensor | None = None, **_: Any,
    ) -> Tensor:  # fmt: skip
        """Take the guided step with the outputs of the last call."""
        x = sample if self._leaf is None else self._leaf
        return self._stepper.step(x, self._outputs, variance=variance, generator=generator, out=out)

    def predict(self, index: int, sample: Tensor, model_output: Tensor, **_: Any) -> Tensor:
        """Return the x0 that the last step predicted, from the guided output."""
        return self._stepper.stepper.predict(index, sample, self._stepper.combined(sample, self._outputs))
