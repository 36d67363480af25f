# SPDX-License-Identifier: MIT
"""Whole loops of any scheduler class of diffusers or fastdiff, and a float64 oracle of its steps."""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from diffusers.schedulers.scheduling_dpmsolver_sde import BrownianTreeNoiseSampler
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastdiff.diffusers import CLASSES
from fastdiff.diffusers.runtime.lookup import forget_plans as forget_plans_and_traces
from fastdiff.diffusers.runtime.scheduler_cache import forget_first_steps
from support.dropin_cases import Case

logging.getLogger("diffusers").setLevel(logging.CRITICAL)
#: Classes that take no step at the last timestep.
LAST_IS_NO_STEP = ("DDPMWuerstchen", "SCM")
#: Classes that make a noise sampler in their first step.
MAKES_SAMPLER = ("DPMSolverSDE", "CosineDPMSolverMultistep")


def _remember_timesteps_of_sigmas(cls: Any) -> None:
    """Make diffusers' `_sigma_to_t` look up what it returned for the same numbers and types.

    Constructors of some classes call it once for each of a thousand sigmas, which takes a fifth of a second. fastdiff's
    classes inherit it, and neither changes what it returns.
    """
    original = cls._sigma_to_t
    schedules: dict[Any, dict[Any, Any]] = {}
    last: list[Any] = [None, {}]  # log_sigmas, which are new for each schedule, and what is known of them

    @functools.wraps(original)
    def sigma_to_t(self: Any, sigma: Any, log_sigmas: Any) -> Any:
        if log_sigmas is not last[0]:
            key = type(log_sigmas), log_sigmas.dtype, np.asarray(log_sigmas).tobytes()
            last[:] = log_sigmas, schedules.setdefault(key, {})
        at = type(sigma), sigma.dtype, sigma.item()
        found = last[1].get(at)
        if found is None:
            found = last[1][at] = original(self, sigma, log_sigmas)
        return found

    cls._sigma_to_t = sigma_to_t


for _name in ("KDPM2Discrete", "KDPM2AncestralDiscrete", "DPMSolverSDE"):
    if f"{_name}Scheduler" in CLASSES:
        _remember_timesteps_of_sigmas(CLASSES[f"{_name}Scheduler"].original)


def classes(name: str) -> tuple[type, type]:
    """Return diffusers' class and fastdiff's."""
    ours = CLASSES[f"{name}Scheduler"]
    return ours.original, ours


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress diffusers' deprecation warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def with_layout(tensor: Tensor, layout: str) -> Tensor:
    """Return the values in another memory layout; layouts with shared elements repeat some of the values."""
    if layout == "channels_last":
        return tensor.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "transposed":
        return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "negated":  # lazily, as the imaginary part of a conjugate is
        return torch._neg_view(-tensor)
    if layout == "expanded":
        return tensor[:1].expand(tensor.shape)
    if layout == "windows":  # channel by channel
        tensor = tensor.contiguous()
        return tensor.as_strided(tensor.shape, [*tensor.stride()[:2], *[1] * (tensor.dim() - 2)])
    return tensor


def _normal(shape: tuple[int, ...] | list[int], generator: torch.Generator) -> Tensor:
    """Return numbers that do not depend on torch's default dtype."""
    return torch.randn(shape, generator=generator, dtype=torch.float32)


class Model:
    """Cheap model: its own noise at every step plus a bounded, smooth function of the sample."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.random = torch.Generator().manual_seed(case.seed + 1)

    def __call__(self, sample: Tensor) -> Tensor:
        shape = list(sample.shape)
        if self.case.doubled:
            shape[1] *= 2
        wide = torch.promote_types(sample.dtype, torch.float32)
        own = _normal(shape, self.random).to(wide)
        x = sample.to(wide)
        x = x / (1.0 + x.square().mean().sqrt())
        x = torch.cat([x, x.tanh()], 1) if self.case.doubled else x
        # A learned variance is a share between -1 and 1, or (variance type "learned") itself a variance.
        output = 0.6 * own + 0.4 * x
        if self.case.doubled:
            half = shape[1] // 2
            learned = output[:, half:].tanh()
            output[:, half:] = learned.abs() if self.case.config["variance_type"] == "learned" else learned
        return with_layout(output.to(sample.dtype), self.case.output_layout or self.case.layout)


def values_of(result: Any) -> list[Any]:
    """Return the values of a step's result as a list."""
    return list(result.values()) if isinstance(result, dict) else list(result)


@dataclass
class Loop:
    """State of a loop: a scheduler and the arguments of its next call.

    Attributes:
        outputs: the result of each step.
        error: the exception that ended the loop, or None; `stage` is where it was raised.
    """

    case: Case
    scheduler: Any
    outputs: list[Any] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)
    error: BaseException | None = None
    stage: str = ""

    def start(self) -> None:
        case = self.case
        torch.manual_seed(case.seed)
        random = torch.Generator().manual_seed(case.seed)
        self.model = Model(case)
        scale = float(getattr(self.scheduler, "init_noise_sigma", 1.0))
        self.sample = with_layout((_normal(case.shape, random) * scale).to(case.dtype), case.layout)
        self.fixed = {
            "original_image": with_layout(_normal(case.shape, random).clamp(-1, 1).to(case.dtype), case.layout),
            "mask": with_layout((_normal(case.shape, random) > 0).to(case.dtype), case.layout),
        }
        self.noises = torch.Generator().manual_seed(case.seed + 2)
        self.generator: Any = torch.Generator().manual_seed(case.seed + 3)
        if case.noise == "generators":
            self.generator = [torch.Generator().manual_seed(case.seed + 3 + b) for b in range(case.shape[0])]
        if case.noise == "none":
            self.generator = None
        self.pred_original_sample: Tensor | None = None
        timesteps = self.scheduler.timesteps
        self.timesteps = timesteps[:-1] if case.name in LAST_IS_NO_STEP else timesteps
        self.last: Any = None

    def call(self, i: int, t: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Compute the model's output and return the arguments of a step."""
        case, scheduler = self.case, self.scheduler
        given: Any = self.sample
        if hasattr(scheduler, "scale_model_input"):
            given = scheduler.scale_model_input(self.sample, t)
        self.inputs.append(given)
        output = self.model(given)
        kwargs: dict[str, Any] = {**case.arguments, "return_dict": case.return_dict}
        takes = CLASSES[f"{case.name}Scheduler"].arguments["step"]
        if "generator" in takes:
            kwargs["generator"] = self.generator
        if case.noise == "variance_noise":
            kwargs["variance_noise"] = with_layout(_normal(case.shape, self.noises).to(case.dtype), case.layout)
            kwargs["generator"] = None
        if case.name == "RePaint":
            return (output, t, self.sample, self.fixed["original_image"], self.fixed["mask"]), kwargs
        if case.name == "CogVideoXDPM":
            back = self.timesteps[i - 1] if i > 0 else None
            return (output, self.pred_original_sample, t, back, self.sample), kwargs
        if case.name == "DDPMWuerstchen":
            return (output, t.expand(case.shape[0]), self.sample), kwargs
        if case.per_token:
            count = case.shape[1]
            kwargs["per_token_timesteps"] = torch.linspace(1.0, 0.3, count).repeat(case.shape[0], 1) * t
        return (output, t, self.sample), kwargs

    def take(self, result: Any) -> None:
        self.outputs.append(result)
        values = values_of(result)
        self.sample = values[0]
        self.pred_original_sample = values[1] if len(values) > 1 else None

    def undo(self, t: Any) -> bool:
        """Undo a RePaint step if its timesteps go back; return whether one was undone."""
        if self.case.name != "RePaint":
            return False
        last, self.last = self.last, t
        if last is None or t < last:
            return False
        self.sample = self.scheduler.undo_step(self.sample, last, self.generator)
        return True

    def run(self, watch: Any = None, mode: Any = None, step: Any = None) -> Loop:
        """Run the loop, optionally with a context `mode` around steps, a callback `watch` and a replacement `step`."""
        mode = contextlib.nullcontext() if mode is None else mode
        try:
            with quiet():
                self.stage = "start"
                self.start()
                for i, t in enumerate(self.timesteps):
                    with mode:
                        if self.undo(t):
                            continue
                    self.stage = f"step {i}"
                    args, kwargs = self.call(i, t)
                    with mode:
                        result = (step or self.scheduler.step)(*args, **kwargs)
                    self.take(result)
                    if watch is not None:
                        watch(self)
        except Exception as error:
            self.error = error
        return self

    def random_states(self) -> list[Tensor]:
        """Return the generators' states, torch's default first."""
        own = self.generator if isinstance(self.generator, list) else [self.generator] if self.generator else []
        return [torch.get_rng_state(), *(generator.get_state() for generator in own)]


def set_timesteps(case: Case, scheduler: Any) -> None:
    kwargs: dict[str, Any] = {}
    if case.config.get("use_dynamic_shifting"):
        kwargs["mu"] = 0.8
    if case.name == "ConsistencyDecoder":
        scheduler.set_timesteps(2)
    elif case.name == "SCM":
        more = {} if case.steps == 2 else {"intermediate_timesteps": None}
        scheduler.set_timesteps(case.steps, **more)
    elif case.name == "RePaint":
        scheduler.set_timesteps(case.steps, jump_length=2, jump_n_sample=2)
    else:
        scheduler.set_timesteps(case.steps, **kwargs)


def make_loop(case: Case, cls: type) -> Loop:
    """Return a loop before its start; its `error` is set if the setup failed."""
    loop = Loop(case, None, stage="constructor")
    try:
        with quiet():
            loop.scheduler = cls(**copy.deepcopy(case.config))
            loop.stage = "set_timesteps"
            set_timesteps(case, loop.scheduler)
            loop.stage = ""
    except Exception as error:
        loop.error = error
    return loop


def run_loop(case: Case, cls: type, watch: Any = None) -> Loop:
    """Run a whole loop; `watch` is called after every step."""
    loop = make_loop(case, cls)
    return loop if loop.error is not None else loop.run(watch)


def forget_plans() -> None:
    """Drop all plans, traces and first steps, as if no scheduler had been used before."""
    forget_plans_and_traces()
    forget_first_steps()


def plans_of(scheduler: Any) -> dict[str, Any]:
    """Return the plans of a fastdiff scheduler by kind of step, or the reason why there is none."""
    cache = vars(scheduler).get("_fused")
    plan_cache = None if cache is None else cache.plan_cache
    return {} if plan_cache is None else {str(key): plan for key, plan in plan_cache.plans.items()}


class Float64Mode(TorchFunctionMode):
    """Function mode in which floating-point tensors are float64, and noise comes from a list.

    Args:
        draws: noise tensors in the order of the draws.
    """

    def __init__(self, draws: list[Tensor]) -> None:
        super().__init__()
        self.draws = list(draws)

    def next_draw(self, *_: Any) -> Tensor:
        return self.draws.pop(0).double()

    def __enter__(self) -> Float64Mode:
        _patch_sampler(lambda *_, **__: None, lambda *_: self.next_draw())
        return super().__enter__()  # type: ignore[no-any-return]

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        _patch_sampler(_make_sampler, _sample_noise)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in ("randn", "randn_like"):
            return self.next_draw()
        if name in ("to", "float", "half", "double", "bfloat16", "type") and args[0].is_floating_point():
            wanted = [value for value in (*args[1:], *kwargs.values()) if isinstance(value, torch.dtype)]
            if name != "to" or not wanted or wanted[0].is_floating_point:
                return args[0].double()
        result = func(*args, **kwargs)
        if isinstance(result, Tensor) and result.is_floating_point() and result.dtype != torch.float64:
            return result.double()
        return result


class RecordDraws(TorchFunctionMode):
    """Function mode that records drawn noise, including that of a scheduler's noise sampler."""

    def __init__(self) -> None:
        super().__init__()
        self.draws: list[Tensor] = []
        self.inside = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in ("randn", "randn_like") and not self.inside:
            self.draws.append(result)
        return result

    def __enter__(self) -> RecordDraws:
        def making(sampler: Any, *args: Any, **kwargs: Any) -> None:
            self.inside = True
            _make_sampler(sampler, *args, **kwargs)
            self.inside = False

        def sampling(sampler: Any, *args: Any) -> Tensor:
            self.inside = True
            noise = _sample_noise(sampler, *args)
            self.inside = False
            self.draws.append(noise)
            return noise

        _patch_sampler(making, sampling)
        return super().__enter__()  # type: ignore[no-any-return]

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        _patch_sampler(_make_sampler, _sample_noise)


def _patch_sampler(make: Any, sample: Any) -> None:
    BrownianTreeNoiseSampler.__init__, BrownianTreeNoiseSampler.__call__ = make, sample


_make_sampler, _sample_noise = BrownianTreeNoiseSampler.__init__, BrownianTreeNoiseSampler.__call__


def widened(value: Any) -> Any:
    """Convert floating-point tensors to float64, also in lists."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, (list, tuple)):
        return type(value)(map(widened, value)) if type(value) in (list, tuple) else value
    return value


@contextlib.contextmanager
def exact_defaults() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def widen(scheduler: Any) -> None:
    """Convert a scheduler's tensors to float64, except timesteps, which are compared with the arguments."""
    attributes = vars(scheduler)
    for name, value in attributes.items():
        if name not in ("timesteps", "_internal_dict", "noise_sampler"):
            attributes[name] = widened(value)


def exact_step(scheduler: Any, draws: list[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the result of a step of diffusers' class in float64, without changing the scheduler."""
    twin = object.__new__(type(scheduler))
    vars(twin).update({n: list(v) if isinstance(v, list) else v for n, v in vars(scheduler).items()})
    widen(twin)

    def wide(value: Any) -> Any:
        is_time = isinstance(value, Tensor) and value.dtype == scheduler.timesteps.dtype and value.dim() < 2
        return value if is_time else widened(value)

    with quiet(), exact_defaults(), Float64Mode(draws):
        return type(scheduler).step(twin, *map(wide, args), **{k: wide(v) for k, v in kwargs.items()})


def exact_loop(case: Case, draws: list[Tensor]) -> Loop:
    """Run a whole loop of diffusers' class in float64, with the noise of another loop."""
    loop = make_loop(case, classes(case.name)[0])
    loop.case = case.of(dtype=torch.float64)
    widen(loop.scheduler)
    with exact_defaults():
        return loop.run(mode=Float64Mode(draws))
