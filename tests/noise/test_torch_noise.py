# SPDX-License-Identifier: MIT
"""torch's normal numbers drawn by the extension: the bits of torch.randn, and its generator state afterwards."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode

from fastdiff import ops
from fastdiff.noise import torch_normals as torch_noise
from fastdiff.noise.generators import draw
from fastdiff.noise.torch_normals import randn_like_diffusers, torch_randn, why_by_torch
from support.child_environment import child_environment
from support.generator_states import differing, numbers_of, one_of_radius_one, with_counters
from support.recorded_operators import RecordedOperators

extension = ops.backends.extension
PROFILE = os.environ.get("HYPOTHESIS_PROFILE")
CPU = torch.device("cpu")

loop_here = pytest.mark.skipif(bool(why_by_torch()), reason=f"torch draws here: {why_by_torch()}")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


def same_bits(drawn: Tensor, expected: Tensor) -> bool:
    """Return True for equal bits, including signs of zeros."""
    as_integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[expected.element_size()]
    return (
        drawn.dtype == expected.dtype
        and drawn.shape == expected.shape
        and torch.equal(drawn.view(as_integers), expected.view(as_integers))
    )


def by_loop(shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    """Draw with the extension; fail if it declines, so that torch's own draw cannot pass."""
    assert extension is not None
    drawn = extension.torch_randn(shape, generator)
    assert drawn is not None
    return drawn


@pytest.mark.skipif(bool(torch_noise._why_impossible()), reason=torch_noise._why_impossible())
def test_extension_draws_for_installed_torch() -> None:
    assert why_by_torch() == ""
    assert by_loop((16,), None).shape == (16,)


#: What may be drawn from a generator between two draws of ours. Small and double draws leave a number for later in it.
OTHERS: dict[str, Callable[[torch.Generator], Tensor]] = {
    "rand": lambda g: torch.rand(37, generator=g),
    "one normal": lambda g: torch.randn(1, generator=g),
    "some normals": lambda g: torch.randn(15, generator=g),
    "double normals": lambda g: torch.randn(21, generator=g, dtype=torch.float64),
    "half normals": lambda g: torch.randn(40, generator=g, dtype=torch.float16),
    "integers": lambda g: torch.randint(0, 1000, (5,), generator=g),
    "bernoulli": lambda g: torch.bernoulli(torch.full((9,), 0.3), generator=g),
    "permutation": lambda g: torch.randperm(11, generator=g),
}


@loop_here
@given(
    seed=st.integers(0, 2**63 - 1),
    plan=st.lists(st.one_of(st.integers(16, 3000), st.sampled_from(sorted(OTHERS))), min_size=1, max_size=12),
)
def test_any_order_of_draws_matches_torch_bits_and_states(seed: int, plan: list[int | str]) -> None:
    ours, theirs = seeded(seed), seeded(seed)
    for draw_now in plan:
        if isinstance(draw_now, str):
            assert torch.equal(OTHERS[draw_now](ours), OTHERS[draw_now](theirs))
        else:
            assert same_bits(by_loop((draw_now,), ours), torch.randn(draw_now, generator=theirs))
        assert torch.equal(ours.get_state(), theirs.get_state())


@loop_here
@given(
    seed=st.integers(0, 2**63 - 1),
    # Around what is made at a time (16, 624, 8192), what one thread makes alone (65536), and anything.
    size=st.one_of(
        st.builds(lambda of, by: max(16, of + by), st.sampled_from([624, 8192, 65536]), st.integers(-40, 40)),
        st.integers(16, 100_000),
    ),
    before=st.integers(16, 700),
)
def test_every_size_matches_torch_bitwise(seed: int, size: int, before: int) -> None:
    ours, theirs = seeded(seed), seeded(seed)
    for count in (before, size, 16):
        assert same_bits(by_loop((count,), ours), torch.randn(count, generator=theirs))
    assert torch.equal(ours.get_state(), theirs.get_state())


@loop_here
@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize("size", [65536, 65537, 65536 + 16, 1_000_003])
def test_number_of_threads_does_not_change_draw(threads: int, size: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ours, theirs = seeded(size), seeded(size)
        for _ in range(3):
            assert same_bits(by_loop((size,), ours), torch.randn(size, generator=theirs))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(ours.get_state(), theirs.get_state())


@loop_here
def test_every_radius_and_angle_matches_torch_bitwise() -> None:
    """Compare every value of the radius and of the angle.

    A number is radius(u1)·cos(u2) or radius(u1)·sin(u2), rounded once, with 2²⁴ values each of u1 and u2.

    With u2 = 0 the cosine is 1 and the number is the radius; with a u1 whose radius is 1 it is the cosine or the sine.
    So the two passes below evaluate each function at each of its arguments, which covers all 2⁴⁸ numbers; with the
    profile "ci" at every seventh.
    """
    # Instrumented code looks for bad accesses, which every 61st shows as well.
    words = np.arange(0, 2**24, {"sanitize": 61, "ci": 7}.get(PROFILE or "", 1), dtype=np.uint32)
    assert differing(words, np.zeros_like(words), by_loop) == 0
    assert differing(np.full_like(words, one_of_radius_one()), words, by_loop) == 0


@loop_here
def test_range_ends_match_torch_bitwise_without_negative_zero() -> None:
    """Compare u1 = 1 (radius −0 before the mean is added), the smallest u1, and eighths of a turn with neighbours."""
    ends = np.array([0, 1, 2, 2**23 - 1, 2**23, 2**24 - 2, 2**24 - 1, 2**32 - 1, 2**31], dtype=np.uint32)
    turns = np.array([(i * 2**21 + j) % 2**24 for i in range(8) for j in (-1, 0, 1)], dtype=np.uint32)
    first, second = (grid.ravel() for grid in np.meshgrid(ends, turns))
    assert differing(first, second, by_loop) == 0
    numbers = numbers_of(first, second, by_loop)
    assert not numbers[torch.from_numpy(first == 0)].view(torch.int32).any()
    assert numbers.isfinite().all()


@loop_here
@given(seed=st.integers(0, 2**63 - 1), used=st.integers(1, 2000), size=st.integers(16, 2000))
def test_restored_state_continues_like_torch(seed: int, used: int, size: int) -> None:
    generator = seeded(seed)
    torch.rand(used, generator=generator)
    middle = generator.get_state()
    ours, theirs = seeded(0), seeded(0)
    ours.set_state(middle)
    theirs.set_state(middle)
    assert same_bits(by_loop((size,), ours), torch.randn(size, generator=theirs))
    assert torch.equal(ours.get_state(), theirs.get_state())
    assert torch.equal(ours.clone_state().get_state(), theirs.get_state())


@given(left=st.integers(1, 624), following=st.integers(0, 100), size=st.integers(16, 2000))
def test_state_with_inconsistent_counts_draws_like_torch(left: int, following: int, size: int) -> None:
    state = with_counters(seeded(3).get_state(), left, min(following, 624 - left))
    ours, theirs = torch.Generator("cpu"), torch.Generator("cpu")
    ours.set_state(state)
    theirs.set_state(state)
    assert same_bits(torch_randn((size,), ours, dtype=torch.float32), torch.randn(size, generator=theirs))
    assert torch.equal(ours.get_state(), theirs.get_state())


def test_default_generator_is_torchs() -> None:
    torch.manual_seed(11)
    expected = [torch.randn(3, 333), torch.rand(2), torch.randn(70_001)]
    state = torch.get_rng_state()
    torch.manual_seed(11)
    assert same_bits(torch_randn((3, 333), device="cpu", dtype=torch.float32), expected[0])
    assert torch.equal(torch.rand(2), expected[1])
    assert same_bits(torch_randn([70_001]), expected[2])
    assert torch.equal(torch.get_rng_state(), state)


@given(
    seed=st.integers(0, 2**63 - 1),
    shape=st.lists(st.integers(0, 9), max_size=4).map(tuple),
    dtype=st.sampled_from([None, torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64]),
    device=st.sampled_from([None, CPU, "cpu", "cpu:0", "meta"]),
)
def test_torch_randn_equals_torchs(
    seed: int, shape: tuple[int, ...], dtype: torch.dtype | None, device: torch.device | str | None
) -> None:
    ours, theirs = seeded(seed), seeded(seed)
    for _ in range(2):
        drawn = torch_randn(shape, ours, device=device, dtype=dtype)
        expected = torch.randn(shape, generator=theirs, device=device, dtype=dtype)
        assert (drawn.dtype, drawn.device, drawn.shape) == (expected.dtype, expected.device, expected.shape)
        assert (drawn.stride(), drawn._version) == (expected.stride(), expected._version)
        assert expected.is_meta or torch.equal(drawn, expected)
    assert torch.equal(ours.get_state(), theirs.get_state())


def outcome(call: Callable[[], Tensor]) -> tuple[Any, ...]:
    try:
        drawn = call()
    except Exception as error:
        return type(error), str(error)
    return drawn.dtype, drawn.device, drawn.shape, drawn.tolist()


@pytest.mark.parametrize(
    ("shape", "generator", "device", "dtype"),
    [
        ((-1, 20), "seeded", "cpu", torch.float32),
        ((2.0, 20), "seeded", "cpu", torch.float32),
        ((True, 20), "seeded", "cpu", torch.float32),
        ((2**40, 2**40), "seeded", "cpu", torch.float32),
        ((2**70,), "seeded", "cpu", torch.float32),
        (("20",), "seeded", "cpu", torch.float32),
        ((torch.tensor(4), 5), "seeded", "cpu", torch.float32),
        (20, "seeded", "cpu", torch.float32),
        (None, "seeded", "cpu", torch.float32),
        ((20,), 7, "cpu", torch.float32),
        ((20,), "a word", "cpu", torch.float32),
        ((20,), "seeded", "cpu", torch.int32),
        ((20,), "seeded", "cpu", "float32"),
        ((20,), "seeded", "nowhere", torch.float32),
        ((20,), "seeded", 3.5, torch.float32),
    ],
)
def test_errors_equal_torchs(shape: Any, generator: Any, device: Any, dtype: Any) -> None:
    def given_generator() -> Any:
        return seeded(1) if generator == "seeded" else generator

    expected = outcome(lambda: torch.randn(shape, generator=given_generator(), device=device, dtype=dtype))
    assert outcome(lambda: torch_randn(shape, given_generator(), device=device, dtype=dtype)) == expected


class SeenFunctions(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("make", [RecordedOperators, SeenFunctions])
def test_dispatch_mode_sees_torch_operator(make: Any) -> None:
    with make() as seen:
        drawn = torch_randn((40,), seeded(1), dtype=torch.float32)
    assert any("randn" in name for name in seen.names)
    assert same_bits(drawn, torch.randn(40, generator=seeded(1)))


def test_first_draw_within_mode_does_not_decide_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    trial = torch_noise._Trial()
    monkeypatch.setattr(torch_noise, "_trial", trial)
    impossible = trial.problem
    with RecordedOperators():
        torch_randn((40,), seeded(1), dtype=torch.float32)
        assert not trial.passed
        assert trial.problem == impossible
        assert why_by_torch() == (impossible or "something around this call has to see torch's operators")
    torch_randn((40,), seeded(1), dtype=torch.float32)
    assert trial.passed == (not why_by_torch())


@pytest.mark.parametrize("spoil", ["a bit", "the state"])
@loop_here
def test_differing_extension_is_never_used(monkeypatch: pytest.MonkeyPatch, spoil: str) -> None:
    def spoilt(shape: Any, generator: Any) -> Tensor:
        drawn = by_loop(shape, generator)
        if drawn.numel() == 1000:  # far into the trial
            if spoil == "the state":
                generator.manual_seed(0)
            else:
                drawn.view(torch.int32)[777] ^= 1
        return drawn

    monkeypatch.setattr(torch_noise, "_draw", spoilt)
    monkeypatch.setattr(torch_noise, "_trial", torch_noise._Trial())
    assert same_bits(torch_randn((1000,), seeded(4), dtype=torch.float32), torch.randn(1000, generator=seeded(4)))
    assert why_by_torch() == f"torch {torch.__version__} " + (
        "makes other bits of a generator's words" if spoil == "a bit" else "leaves a generator in another state"
    )


def test_fake_tensors_stay_fake() -> None:
    with FakeTensorMode():
        assert type(torch_randn((40,), dtype=torch.float32)).__name__ == "FakeTensor"


def test_vmap_applies_torch_randomness() -> None:
    def one(x: Tensor) -> Tensor:
        return x + torch_randn((20,), dtype=torch.float32)

    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(one)(torch.zeros(3, 20))
    torch.manual_seed(5)
    drawn = torch.func.vmap(one, randomness="different")(torch.zeros(3, 20))
    torch.manual_seed(5)
    expected = torch.func.vmap(lambda x: x + torch.randn(20), randomness="different")(torch.zeros(3, 20))
    assert same_bits(drawn, expected)


def test_torch_compile_traces_torch_operator() -> None:
    torch.manual_seed(6)
    compiled = torch.compile(
        lambda x: x + torch_randn((20,), device="cpu", dtype=torch.float32), backend="eager", fullgraph=True
    )
    drawn = compiled(torch.zeros(20))
    torch.manual_seed(6)
    assert same_bits(drawn, torch.zeros(20) + torch.randn(20))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_jit_trace_contains_draw() -> None:
    traced = torch.jit.trace(lambda x: x + torch_randn((20,), dtype=torch.float32), torch.zeros(20), check_trace=False)
    assert "randn" in str(traced.graph)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    "around",
    [torch.inference_mode, torch.no_grad, lambda: torch.autocast("cpu"), deterministic],
    ids=["inference_mode", "no_grad", "autocast", "deterministic"],
)
def test_unrelated_settings_do_not_change_draw(around: Callable[[], AbstractContextManager[Any]]) -> None:
    with around():
        drawn, expected = torch_randn((3, 40), seeded(2)), torch.randn(3, 40, generator=seeded(2))
        assert drawn.is_inference() == expected.is_inference()
        assert not drawn.requires_grad
    with torch.inference_mode():  # where both kinds may be compared
        assert same_bits(drawn, expected)


def test_torch_defaults_apply() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        assert same_bits(torch_randn((20,), seeded(3)), torch.randn(20, generator=seeded(3), dtype=torch.float64))
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        assert torch_randn((20,), dtype=torch.float32).is_meta
    assert torch_randn((20,)).device == CPU


def many_draws(generator: torch.Generator, sizes: list[int]) -> list[Tensor]:
    return [torch_randn((size,), generator, dtype=torch.float32) for size in sizes]


def in_threads(works: list[Callable[[], None]]) -> None:
    """Run functions concurrently, and raise the exception of any of them."""
    failed: list[BaseException] = []

    def run(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]


def test_threads_with_own_generators_are_independent() -> None:
    sizes = [16, 5000, 70_000, 17, 140_001] * 4
    results: dict[int, list[Tensor]] = {}
    in_threads([lambda i=i: results.__setitem__(i, many_draws(seeded(i), sizes)) for i in range(4)])
    for i in range(4):
        generator = seeded(i)
        assert all(same_bits(one, torch.randn(one.numel(), generator=generator)) for one in results[i])


def test_threads_with_shared_generator_partition_its_numbers() -> None:
    """No number is repeated or lost: draws of one size are those of a single thread, in some order."""
    for size, count in ((624, 200), (70_000, 12)):
        generator, alone = seeded(9), seeded(9)
        drawn: list[list[Tensor]] = [[], []]

        def theirs(size: int = size, count: int = count, g: torch.Generator = generator, to: Any = drawn[0]) -> None:
            to += [torch.randn(size, generator=g) for _ in range(count)]

        def ours(size: int = size, count: int = count, g: torch.Generator = generator, to: Any = drawn[1]) -> None:
            to += many_draws(g, [size] * count)

        in_threads([ours, theirs])
        expected = sorted(torch.randn(size, generator=alone).tolist() for _ in range(2 * count))
        assert sorted(one.tolist() for one in drawn[0] + drawn[1]) == expected
        assert torch.equal(generator.get_state(), alone.get_state())


@loop_here
@given(size=st.integers(16, 9000), before=st.integers(0, 20), after=st.integers(0, 20))
def test_filling_writes_exactly_the_tensor(size: int, before: int, after: int) -> None:
    assert extension is not None
    memory = torch.full((before + size + after,), float("nan"))
    out = memory[before : before + size]
    version = out._version
    generator, expected = seeded(size), torch.randn(size, generator=seeded(size))
    assert extension.torch_randn_(out, generator) is True
    assert same_bits(out, expected)
    assert out._version == version + 1
    assert memory[:before].isnan().all()
    assert memory[before + size :].isnan().all()


@pytest.mark.skipif(extension is None, reason=ops.backends.extension_error)
@pytest.mark.parametrize(
    "out",
    [
        torch.full((15,), torch.nan),
        torch.full((0,), torch.nan),
        torch.full((40,), torch.nan, dtype=torch.float64),
        torch.full((40,), torch.nan, dtype=torch.float16),
        torch.full((80,), torch.nan)[::2],
        torch.full((8, 8), torch.nan).t()[:, :4],
        torch.full((1,), torch.nan).expand(40),
        torch.full((40,), torch.nan, requires_grad=True),
        torch.full((40,), torch.nan, device="meta"),
        torch._neg_view(torch.full((40,), torch.nan)),
        torch.eye(8).to_sparse(),
        None,
        "a word",
    ],
    ids=lambda out: f"{tuple(out.shape)} {out.dtype}" if isinstance(out, Tensor) else repr(out),
)
def test_filling_declines_unsupported_tensors_without_drawing(out: Any) -> None:
    assert extension is not None
    generator = seeded(1)
    assert extension.torch_randn_(out, generator) is False
    assert torch.equal(generator.get_state(), seeded(1).get_state())
    if isinstance(out, Tensor) and not out.is_meta and out.layout == torch.strided:
        assert out.detach().isnan().all()


@pytest.mark.skipif(extension is None, reason=ops.backends.extension_error)
def test_binding_checks_argument_count() -> None:
    assert extension is not None
    for function in (extension.torch_randn, extension.torch_randn):
        with pytest.raises(TypeError, match="expected 2 arguments, got 1"):
            function((16,))


def test_freed_memory_is_not_written() -> None:
    if extension is None:
        pytest.skip(ops.backends.extension_error)
    out = torch.zeros(40)
    out.untyped_storage().resize_(0)
    assert extension.torch_randn_(out, seeded(1)) is False


@settings(max_examples=200 if PROFILE == "thorough" else 30)
@given(
    seeds=st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=5),
    rest=st.lists(st.integers(0, 9), max_size=3).map(tuple),
    dtype=st.sampled_from([None, torch.float32, torch.float16, torch.float64]),
    device=st.sampled_from([None, "cpu", CPU, "meta"]),
    kind=st.sampled_from(["list", "one", "none"]),
    batch=st.integers(0, 6),
)
def test_randn_like_diffusers_equals_randn_tensor(
    seeds: list[int], rest: tuple[int, ...], dtype: Any, device: Any, kind: str, batch: int
) -> None:
    randn_tensor = pytest.importorskip("diffusers.utils.torch_utils").randn_tensor
    shape = (batch if kind != "list" or batch > len(seeds) else len(seeds), *rest)
    results, states = [], []
    for function in (randn_tensor, randn_like_diffusers):
        torch.manual_seed(12)
        made = [seeded(seed) for seed in seeds]
        generator = {"list": made, "one": made[0], "none": None}[kind]
        if device == "meta":  # holds no numbers to be moved there and compared
            results.append(
                outcome(lambda f=function, g=generator: f(shape, g, device, dtype).new_zeros(1, device="cpu"))
            )
        else:
            results.append(outcome(lambda f=function, g=generator: f(shape, g, device, dtype)))
        states.append([g.get_state() for g in made] + [torch.get_rng_state()])
    assert results[0] == results[1]
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


@pytest.mark.parametrize(
    ("shape", "generator"), [((), None), ([2, 40], "list"), ([1, 40], "one"), ((2, 40), "word"), ((2, 40), "empty")]
)
def test_randn_like_diffusers_fails_like_diffusers(shape: Any, generator: str | None) -> None:
    randn_tensor = pytest.importorskip("diffusers.utils.torch_utils").randn_tensor

    def made() -> Any:
        return {"list": [seeded(1), seeded(2)], "one": [seeded(1)], "word": "word", "empty": [], None: None}[generator]

    expected = outcome(lambda: randn_tensor(shape, made(), CPU, torch.float32))
    assert outcome(lambda: randn_like_diffusers(shape, made(), CPU, torch.float32)) == expected


@pytest.mark.gpu
def test_randn_like_diffusers_moves_cpu_numbers_to_gpu() -> None:
    cuda = torch.device("cuda")
    for make in (lambda: seeded(9), lambda: [seeded(9), seeded(10)]):
        there = randn_like_diffusers((2, 50), make(), cuda, torch.float32)
        assert there.is_cuda
        assert same_bits(there.cpu(), randn_like_diffusers((2, 50), make(), CPU, torch.float32))
    with pytest.raises(ValueError, match=r"Cannot generate a cpu tensor from a generator of type cuda\."):
        randn_like_diffusers((2, 50), torch.Generator("cuda"), CPU, torch.float32)
    assert same_bits(
        torch_randn((50,), torch.Generator("cuda").manual_seed(3), device=cuda),
        torch.randn(50, generator=torch.Generator("cuda").manual_seed(3), device=cuda),
    )


@loop_here
def test_samplers_draw_with_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[Any] = []

    def counted(shape: Any, generator: Any) -> Tensor:
        sizes.append(tuple(shape))
        return by_loop(shape, generator)

    monkeypatch.setattr(torch_noise, "_draw", counted)
    together = draw((2, 30), [seeded(1), seeded(2)], dtype=torch.float32, device=CPU)
    assert same_bits(together, torch.cat([torch.randn(1, 30, generator=seeded(i)) for i in (1, 2)]))
    draw((3, 30), seeded(1), dtype=torch.float32, device=CPU)
    assert sizes == [(1, 30), (1, 30), (3, 30)]


#: Prints the reason for which torch draws, and fails where bits or states are not torch's.
IN_A_PROCESS = """
import numpy, torch
from fastdiff.noise.torch_normals import torch_randn, why_by_torch
from support.generator_states import differing, one_of_radius_one
ours, theirs = torch.Generator().manual_seed(8), torch.Generator().manual_seed(8)
for size in (1, 15, 16, 17, 1000, 8192, 70001, 624):
    drawn, expected = torch_randn((size,), ours), torch.randn(size, generator=theirs)
    assert torch.equal(drawn.view(torch.int32), expected.view(torch.int32)), size
    assert torch.equal(ours.get_state(), theirs.get_state()), size
if not why_by_torch():
    words = numpy.arange(3, 2**24, 7, dtype=numpy.uint32)
    assert differing(words, numpy.zeros_like(words), torch_randn) == 0
    assert differing(numpy.full_like(words, one_of_radius_one()), words, torch_randn) == 0
print(torch.backends.cpu.get_cpu_capability(), why_by_torch())
"""


def in_a_process(**environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", IN_A_PROCESS],
        capture_output=True,
        text=True,
        check=False,
        env=child_environment(**environment),
    )


@pytest.mark.parametrize("build", ["generic", "avx2", "avx512"])
def test_every_cpu_build_matches_torch_bitwise(build: str) -> None:
    done = in_a_process(FASTDIFF_CPU=build)
    if "one that this processor has" in done.stderr:
        pytest.skip(f"this processor has no {build}")
    assert done.returncode == 0, done.stderr
    if extension is None:
        assert "extension" in done.stdout
    elif not done.stdout.startswith("DEFAULT"):
        assert ("no loop for it" in done.stdout) == (build == "generic"), done.stdout


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_every_torch_cpu_capability_keeps_its_bits(capability: str) -> None:
    done = in_a_process(ATEN_CPU_CAPABILITY=capability)
    assert done.returncode == 0, done.stderr
    answered = done.stdout.split(maxsplit=1)
    if capability == "default":
        assert answered[0] == "DEFAULT"
        assert len(answered) == 2, "without AVX2 code torch draws other bits, and has to draw itself"
