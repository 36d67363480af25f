# SPDX-License-Identifier: MIT
"""Guards and executors: the Python and the C++ implementation decide and compute the same."""

from __future__ import annotations

import copy
import importlib.util
import itertools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fastdiff.diffusers
from fastdiff import ops
from fastdiff.diffusers import mixin
from fastdiff.diffusers.compiler.plan import NoiseSource
from fastdiff.diffusers.runtime import scheduler_cache, step_cache
from fastdiff.diffusers.runtime.guards import Guard, GuardKind, HostCopy, array_record
from fastdiff.noise import torch_normals
from fastdiff.ops import backends
from support.dropin_helpers import forget_plans, quiet
from support.oracle import assert_same_bits

pytestmark = pytest.mark.skipif(backends.extension is None, reason="compares with the C++ extension")

TIMESTEPS = torch.arange(8).flip(0)
TENSORS = (
    TIMESTEPS[2],
    TIMESTEPS[2:3],
    TIMESTEPS[3],
    TIMESTEPS[2].expand(4),
    TIMESTEPS[2].clone(),
    torch.zeros(2, 3),
    torch.zeros(2, 3).t().contiguous().t(),
    torch.zeros(2, 3, dtype=torch.float64),
    torch.ones(2, 3),
    torch.zeros(2, 3, requires_grad=True),
    torch.zeros(4, 3)[:2],
    torch.nn.Parameter(torch.zeros(2, 3)),
    torch.tensor(0.0),
    torch.zeros(0),
    torch.zeros(2, 3).neg(),
    torch.zeros(2, 3, dtype=torch.complex64).conj(),
)
ARRAYS = (np.zeros(3), np.zeros(3, np.float32), np.zeros((3, 1)), np.ones(3), np.zeros(6)[::2], np.float64(0.0))
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2) | st.sampled_from([0.0, -0.0, 1.0, float("nan"), np.float64(1.0)])
    | st.sampled_from(["", "a", "linear"]),
    lambda inner: st.lists(inner, max_size=2)
    | st.lists(inner, max_size=2).map(tuple)
    | st.dictionaries(st.sampled_from(["a", "b"]), inner, max_size=2),
    max_leaves=4,
)  # fmt: skip
VALUES = PLAIN | st.sampled_from(TENSORS) | st.sampled_from(ARRAYS) | st.sampled_from([object(), len, [torch.zeros(2)]])


@st.composite
def guards(draw: st.DrawFn) -> Guard:
    kind = draw(st.sampled_from(list(GuardKind)))
    if kind in (GuardKind.TENSOR, GuardKind.TIMESTEP):
        tensor = draw(st.sampled_from(TENSORS))
        offset = draw(st.sampled_from([0, 8, -8]))
        expected: Any = (tensor.dtype, tuple(tensor.shape)) + ((offset,) if kind is GuardKind.TIMESTEP else ())
    elif kind is GuardKind.ARRAY:
        of_memory = [t for t in TENSORS if t.is_contiguous() and not t.is_complex()]
        expected = array_record(draw(st.sampled_from(of_memory) | st.sampled_from(ARRAYS[:4])))
    elif kind is GuardKind.EQUALS:
        expected = draw(PLAIN | st.just([...]))
    else:
        expected = draw(VALUES)
    return Guard("name", kind, expected)


@given(guard=guards(), value=VALUES, copied=st.booleans(), place=st.sampled_from([None, 2, 3]))
def test_guards_agree_between_python_and_cpp(guard: Guard, value: Any, copied: bool, place: int | None) -> None:
    if copied and isinstance(guard.expected, (list, tuple, dict)) and guard.kind is GuardKind.EQUALS:
        value = copy.deepcopy(guard.expected)
    timestep = None if place is None else TIMESTEPS[place].data_ptr()
    assert backends.extension.check_guard(guard, value, timestep) == guard.check(value, timestep)


@pytest.mark.parametrize("kind", [GuardKind.TENSOR, GuardKind.TIMESTEP, GuardKind.ARRAY, GuardKind.ID, GuardKind.ANY])
def test_guards_of_arrays_agree_for_every_pair(kind: GuardKind) -> None:
    """Every array that a guard may hold, with every array that it may be asked about."""
    values = [*TENSORS, *ARRAYS]
    timesteps = [None, *(TIMESTEPS[place].data_ptr() for place in (2, 3))]
    decided = set()
    for of in values:
        for offset, timestep in itertools.product((0, 8), timesteps):
            if kind in (GuardKind.TENSOR, GuardKind.TIMESTEP):
                if not isinstance(of, Tensor):
                    continue
                expected: Any = (of.dtype, tuple(of.shape), *([offset] if kind is GuardKind.TIMESTEP else []))
            elif kind is GuardKind.ARRAY:
                if (isinstance(of, Tensor) and of.is_conj()) or isinstance(of, np.generic):
                    continue
                expected = array_record(of)
            else:
                expected = of
            guard = Guard("name", kind, expected)
            for value in values:
                in_python = guard.check(value, timestep)
                assert backends.extension.check_guard(guard, value, timestep) == in_python, (guard, value, timestep)
                decided.add(in_python)
    assert decided == ({True} if kind is GuardKind.ANY else {True, False})


def test_arrays_on_devices_are_compared_by_their_copies() -> None:
    """Without a device here: a tensor without memory is one that the host cannot read."""
    values = torch.arange(6.0).reshape(2, 3)
    there = torch.empty(2, 3, device="meta")

    def copy_of(tensor: Tensor, host: Tensor) -> HostCopy:
        return HostCopy(tensor, tensor._version, host, array_record(host))

    right, wrong = copy_of(there, values), copy_of(there, values + 1)
    other = copy_of(torch.empty(2, 3, device="meta"), values)
    guard = Guard("name", GuardKind.ARRAY, array_record(values))
    found = []
    for copies in ([], [right], [wrong], [other], [other, right]):
        for value in (there, values, values + 1):
            in_python = guard.check(value, None, copies)
            assert backends.extension.check_guard(guard, value, None, copies) == in_python
            found.append(in_python)
    assert found[0::3] == [False, True, False, False, True]
    assert found[1::3] == [True] * 5
    assert found[2::3] == [False] * 5
    there.add_(1)  # the copy is not of what it holds now
    assert not guard.check(there, None, [right])
    assert not backends.extension.check_guard(guard, there, None, [right])


def test_enumerations_agree_between_python_and_cpp() -> None:
    assert backends.extension.guard_kinds == {kind.name: kind.value for kind in GuardKind}
    assert backends.extension.noise_sources == {source.name: source.value for source in NoiseSource}


def _without_extension(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Load the scheduler cache a second time, as an install without the extension does."""
    path = scheduler_cache.__file__
    spec = importlib.util.spec_from_file_location(f"{scheduler_cache.__package__}._in_python", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with monkeypatch.context() as during:
        during.setattr(backends, "extension", None)
        spec.loader.exec_module(module)
    assert issubclass(module.SchedulerCache, step_cache.StepCache)
    return module


class Pair:
    """Two schedulers of one class: the step cache and the executor of one are C++, those of the other Python."""

    def __init__(self, name: str, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
        forget_plans()
        kind = fastdiff.diffusers.CLASSES[f"{name}Scheduler"]
        with quiet():
            self.schedulers = [kind(**options) for _ in range(2)]
        module = _without_extension(monkeypatch)
        vars(self.schedulers[1])["_fused"] = module.SchedulerCache(self.schedulers[1])
        self.looked_up: list[int] = []
        in_cpp = mixin.take_step

        def counted(which: int) -> Callable[..., Any]:
            def take(*call: Any) -> Any:
                self.looked_up.append(which)
                return in_cpp(*call)

            return take

        monkeypatch.setattr(mixin, "take_step", counted(0))
        take_in_python = counted(1)
        in_python = module.with_fast_path("step", kind.arguments["step"])(
            lambda scheduler, *args, **kwargs: take_in_python(scheduler, "step", args, kwargs)
        )
        if "scale_model_input" in kind.stepping:
            # The method is made from a string, whose `take` is the cached method around the one that looks plans up.
            look_up = kind.scale_model_input.__globals__["take"].__wrapped__
            scale_in_python = module.with_fast_path("scale_model_input", ("sample", "timestep"), scales=True)(look_up)
            self.scales = [self.schedulers[0].scale_model_input,
                           lambda sample, timestep: scale_in_python(self.schedulers[1], sample, timestep)]  # fmt: skip
        self.steps = [lambda *args, **kwargs: self.schedulers[0].step(*args, **kwargs),
                      lambda *args, **kwargs: in_python(self.schedulers[1], *args, **kwargs)]  # fmt: skip

    def each(self, change: Callable[[Any], Any]) -> None:
        with quiet():
            for scheduler in self.schedulers:
                change(scheduler)

    def step(self, place: int, output: Tensor, sample: Tensor, seed: int | None = None) -> tuple[Tensor, list[bool]]:
        """Take a step by both; return its sample, and whether the first and the second looked up its plan."""
        results, looked_up = [], []
        for which, step in enumerate(self.steps):
            self.looked_up.clear()
            scheduler = self.schedulers[which]
            scheduler.is_scale_input_called = True
            torch.manual_seed(place)
            call: dict[str, Any] = {"return_dict": False}
            if seed is not None:
                call["generator"] = torch.Generator().manual_seed(seed)
            with quiet():
                results.append(step(output.clone(), scheduler.timesteps[place], sample.clone(), **call))
            looked_up.append(bool(self.looked_up))
        assert_same_bits(*([value for value in result if isinstance(value, Tensor)] for result in results))
        states = [state_of(scheduler) for scheduler in self.schedulers]
        assert states[0].keys() == states[1].keys()
        for name, value in states[0].items():
            if isinstance(value, list):
                assert_same_bits(value, states[1][name])
            else:
                assert value == states[1][name] or value != value, name
        return results[0][0], looked_up


def state_of(scheduler: Any) -> dict[str, Any]:
    """Return a scheduler's attributes, tensors as lists of tensors."""
    found: dict[str, Any] = {}
    for name, value in vars(scheduler).items():
        if isinstance(value, (list, Tensor)):
            found[name] = [
                item for item in ([value] if isinstance(value, Tensor) else value) if isinstance(item, Tensor)
            ]
        elif name not in ("_fused", "_internal_dict", "noise_sampler") and not isinstance(value, np.ndarray):
            found[name] = value
    return found


def _write_array(scheduler: Any) -> None:
    for name in ("sigmas", "alphas_cumprod"):
        if hasattr(scheduler, name):
            getattr(scheduler, name).mul_(1.0)


def _replace_history(scheduler: Any) -> None:
    for name in ("model_outputs", "ets", "derivatives"):
        items = getattr(scheduler, name, None)
        if items:
            items[-1] = None if items[-1] is None else items[-1] * 1.5


CHANGES: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda scheduler: None,
    "an attribute that no step reads": lambda scheduler: setattr(scheduler, "a_counter_of_the_users", 3),
    "a written array": _write_array,
    "a replaced array": lambda scheduler: setattr(scheduler, "timesteps", scheduler.timesteps.clone()),
    "a number": lambda scheduler: setattr(scheduler, "num_inference_steps", scheduler.num_inference_steps + 1),
    "an entry of the history": _replace_history,
    "the configuration": lambda scheduler: scheduler.register_to_config(num_train_timesteps=999),
}
CLASSES = ("DDIM", "DDPM", "DPMSolverMultistep", "EulerDiscrete", "EulerAncestralDiscrete", "FlowMatchEulerDiscrete",
           "IPNDM", "PNDM", "UniPCMultistep")  # fmt: skip
STEPS = 5


@pytest.mark.parametrize("change", list(CHANGES))
@pytest.mark.parametrize("name", CLASSES)
def test_caches_agree_between_python_and_cpp(name: str, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair(name, monkeypatch)
    outputs = torch.randn(STEPS + 2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    for _ in range(3):  # until all first steps and next plans are known
        pair.each(lambda scheduler: scheduler.set_timesteps(STEPS))
        sample = outputs[-1]
        for place in range(STEPS):
            sample, looked_up = pair.step(place, outputs[place], sample)
    assert looked_up == [False, False]
    pair.each(lambda scheduler: scheduler.set_timesteps(STEPS))
    sample = outputs[-1]
    for place in range(STEPS):
        if place == 2:
            pair.each(CHANGES[change])
        sample, looked_up = pair.step(place, outputs[place], sample)
        if place <= 2:
            assert looked_up[0] == looked_up[1]
        if place < 2 or change == "nothing":
            assert looked_up == [False, False]


@pytest.mark.parametrize("name", CLASSES)
def test_executors_agree_between_python_and_cpp(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every dtype and layout, alone and with what the native executor hands to the Python one."""
    for case, (dtype, layout) in enumerate(itertools.product((torch.float32, torch.bfloat16, torch.float64), range(3))):
        pair = Pair(name, monkeypatch)
        outputs = torch.randn(STEPS + 2, 2, 3, 4, 6, generator=torch.Generator().manual_seed(case)).to(dtype)
        laid = outputs
        if layout == 1:
            laid = outputs.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
        for _ in range(3):
            pair.each(lambda scheduler: scheduler.set_timesteps(STEPS))
            sample = laid[-1] if layout == 2 else outputs[-1]
            for place in range(STEPS):
                sample, _ = pair.step(place, laid[place], sample, seed=9 if name == "DDPM" and layout else None)


@pytest.mark.parametrize("name", ["EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete", "KDPM2Discrete",
                                  "LMSDiscrete", "EDMEuler"])  # fmt: skip
def test_model_inputs_agree_between_python_and_cpp(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both write the next model input with the same steps, hand it out to the same calls, and give the same bits."""
    pair = Pair(name, monkeypatch)
    outputs = torch.randn(20, 2, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    handed_out: list[list[bool]] = [[], []]
    for loop in range(4):
        pair.each(lambda scheduler: scheduler.set_timesteps(STEPS))
        samples = [outputs[-1].clone(), outputs[-1].clone()]
        for place in range(len(pair.schedulers[0].timesteps)):
            found = []
            for which, scale in enumerate(pair.scales):
                sample, timestep = samples[which], pair.schedulers[which].timesteps[place]
                if loop == 3 and place == 2:
                    continue  # what the step before wrote is not asked for
                if loop == 3 and place == 6:
                    sample.mul_(0.5)
                if loop < 2:  # the two share plans, and so one finds what the other has looked up
                    scale(sample, timestep)
                    continue
                sample.data.mul_(2)  # unnoticed by torch: what was computed before is another result
                first = scale(sample, timestep)
                sample.data.mul_(0.5)
                second = scale(sample, timestep)
                handed_out[which].append(torch.equal(first, second))
                found.append([first, second])
            if found:
                assert_same_bits(*found)
            for which, step in enumerate(pair.steps):
                torch.manual_seed(place)
                with quiet():
                    pair.schedulers[which].is_scale_input_called = True
                    timestep = pair.schedulers[which].timesteps[place]
                    samples[which] = step(outputs[place], timestep, samples[which], return_dict=False)[0]
            assert_same_bits([samples[0]], [samples[1]])
    assert handed_out[0] == handed_out[1]
    assert set(handed_out[0]) == {True, False}
    assert sum(handed_out[0]) >= 2 * (STEPS - 2)


GENERATORS: dict[str, Callable[[], Any]] = {
    "torch's own": lambda: None,
    "one": lambda: torch.Generator().manual_seed(3),
    "a list of one": lambda: [torch.Generator().manual_seed(3)],
    "one a sample": lambda: [torch.Generator().manual_seed(seed) for seed in (4, 5)],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("generators", list(GENERATORS))
@pytest.mark.parametrize("trusted", [True, False], ids=["by the extension's loop", "by ATen"])
def test_native_executor_draws_torch_noise(
    generators: str, dtype: torch.dtype, trusted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ATen draws on every device; on the CPU it has to give torch's bits and leave the generators in torch's states."""
    torch_normals.why_by_torch()  # the trial of the extension's loop
    before = backends.extension.trust_torch_randn(trusted)
    try:
        kind = fastdiff.diffusers.DDPMScheduler
        outputs = torch.randn(STEPS + 1, 2, 3, 4, 6, generator=torch.Generator().manual_seed(0)).to(dtype)

        def loop(scheduler: Any) -> tuple[list[Tensor], list[Tensor]]:
            scheduler.set_timesteps(STEPS)
            torch.manual_seed(8)
            generator, sample, found = GENERATORS[generators](), outputs[-1], []
            for output, timestep in zip(outputs, scheduler.timesteps, strict=False):
                sample = scheduler.step(output, timestep, sample, generator=generator).prev_sample
                found.append(sample)
            drawn_by = generator if isinstance(generator, list) else [generator or torch.default_generator]
            return found, [each.get_state() for each in drawn_by]

        scheduler = kind()
        for _ in range(2):
            wanted = loop(scheduler)
        monkeypatch.setattr(ops, "step", lambda *call, **options: pytest.fail("by the Python executor"))
        found = loop(scheduler)
        assert_same_bits(found[0], wanted[0])
        assert all(map(torch.equal, found[1], wanted[1]))
        theirs = loop(kind.original())
        assert all(map(torch.equal, found[1], theirs[1]))
        for mine, other in zip(found[0], theirs[0], strict=True):
            tolerance = 2e-2 if dtype is torch.bfloat16 else 1e-5  # diffusers rounds to bfloat16 between operations
            torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance)
    finally:
        backends.extension.trust_torch_randn(before)
