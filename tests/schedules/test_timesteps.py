# SPDX-License-Identifier: MIT
from __future__ import annotations

import math
import re
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiff.schedules.timesteps import SIGMA_SPACINGS, TIMESTEP_SPACINGS, sigma_schedule, timestep_schedule


def descends_strictly(values: torch.Tensor) -> bool:
    return bool((values[1:] < values[:-1]).all())


def assert_is_timesteps(timesteps: torch.Tensor, n: int, total: int) -> None:
    assert timesteps.dtype == torch.int64
    assert timesteps.shape == (n,)
    assert descends_strictly(timesteps)
    assert int(timesteps[-1]) >= 0
    assert int(timesteps[0]) < total


def cosine_oracle(n: int, total: int) -> list[int]:
    """The formula in Python floats, duplicates pushed aside one timestep after the other."""
    if n == 1:
        return [total - 1]
    out = [total - 1]
    for i in range(1, n):
        wanted = round((total - 1) * math.cos(math.pi / 2 * (i / (n - 1) + 0.008) / 1.008) ** 2)
        free_below_the_last = out[-1] - 1
        room_for_the_rest = n - 1 - i
        out.append(max(min(wanted, free_below_the_last), room_for_the_rest))
    return out


@pytest.mark.parametrize("spacing", TIMESTEP_SPACINGS)
def test_every_count_of_every_small_total_descends_within_range(spacing: str) -> None:
    for total in range(1, 49):
        for n in range(1, total + 1):
            assert_is_timesteps(timestep_schedule(spacing, n, total), n, total)


@given(spacing=st.sampled_from(TIMESTEP_SPACINGS), total=st.sampled_from([1000, 1024, 4000, 999]), data=st.data())
def test_any_count_of_a_large_total_descends_within_range(spacing: str, total: int, data: st.DataObject) -> None:
    n = data.draw(st.integers(1, total))
    assert_is_timesteps(timestep_schedule(spacing, n, total), n, total)


def test_cosine_descends_for_every_count_of_a_thousand() -> None:
    for n in range(1, 1001):
        timesteps = timestep_schedule("cosine", n, 1000)
        assert_is_timesteps(timesteps, n, 1000)
        assert timesteps[0] == 999
        assert n == 1 or timesteps[-1] == 0


def test_cosine_is_the_formula_with_duplicates_pushed_aside() -> None:
    cases = [(n, total) for total in range(1, 33) for n in range(1, total + 1)]
    cases += [(n, 1000) for n in (2, 3, 4, 10, 20, 25, 50, 100, 250, 499, 998, 999, 1000)]
    for n, total in cases:
        assert timestep_schedule("cosine", n, total).tolist() == cosine_oracle(n, total)


@pytest.mark.parametrize("spacing", TIMESTEP_SPACINGS)
def test_taking_all_timesteps_takes_each_once(spacing: str) -> None:
    assert timestep_schedule(spacing, 1000, 1000).tolist() == list(range(999, -1, -1))


@pytest.mark.parametrize(
    ("spacing", "expected"),
    [
        ("leading", [750, 500, 250, 0]),
        ("linspace", [999, 666, 333, 0]),
        ("trailing", [999, 749, 499, 249]),
        ("cosine", [999, 742, 246, 0]),
    ],
)
def test_four_steps(spacing: str, expected: list[int]) -> None:
    assert timestep_schedule(spacing, 4, 1000).tolist() == expected


@pytest.mark.parametrize(("spacing", "only"), [("leading", 0), ("linspace", 0), ("trailing", 999), ("cosine", 999)])
def test_one_step(spacing: str, only: int) -> None:
    assert timestep_schedule(spacing, 1, 1000).tolist() == [only]


def test_steps_offset_moves_leading_alone() -> None:
    for spacing in TIMESTEP_SPACINGS:
        moved = timestep_schedule(spacing, 50, 1000, steps_offset=1) - timestep_schedule(spacing, 50, 1000)
        assert moved.unique().tolist() == [1 if spacing == "leading" else 0]


@pytest.mark.parametrize("total", [1000, 37])
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_timesteps_are_those_of_diffusers(spacing: str, total: int) -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDIMScheduler(num_train_timesteps=total, timestep_spacing=spacing)
    for n in range(1, total + 1):
        theirs.set_timesteps(n)
        # "trailing" there ends in an extra timestep of -1 for some n, where T/(T/n) rounds to just above n.
        assert theirs.timesteps[n:].tolist() in ([], [-1])
        assert torch.equal(timestep_schedule(spacing, n, total), theirs.timesteps[:n]), n


def test_leading_offset_is_that_of_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDIMScheduler(timestep_spacing="leading", steps_offset=1)
    theirs.set_timesteps(50)
    assert torch.equal(timestep_schedule("leading", 50, 1000, 1), theirs.timesteps)


@pytest.mark.parametrize(
    ("arguments", "error", "texts"),
    [
        (("uniform", 10, 1000), ValueError, ["spacing is 'uniform'", "cosine, leading, linspace, trailing", "pick"]),
        ((None, 10, 1000), ValueError, ["spacing is None", "pick"]),
        (("leading", 0, 1000), ValueError, ["num_inference_steps is 0", "raise num_inference_steps to 1"]),
        (("cosine", 11, 10), ValueError, ["num_inference_steps is 11", "at most num_train_timesteps, 10", "fewer"]),
        (("leading", 10.0, 1000), TypeError, ["num_inference_steps has type float", "as an int"]),
        (("leading", True, 1000), TypeError, ["num_inference_steps has type bool", "as an int"]),
        (("leading", 1, 0), ValueError, ["num_train_timesteps is 0", "raise num_train_timesteps"]),
        (("leading", 1, "9"), TypeError, ["num_train_timesteps has type str", "as an int"]),
        (("leading", 10, 1000, -1), ValueError, ["steps_offset is -1", "raise steps_offset"]),
        (("trailing", 10, 1000, 0.5), TypeError, ["steps_offset has type float", "as an int"]),
        (
            ("leading", 10, 1000, 100),
            ValueError,
            ["steps_offset is 100", "first timestep 1000", "lower steps_offset to 99"],
        ),
    ],
)
def test_timestep_schedule_says_what_is_wrong(
    arguments: tuple[object, ...], error: type[Exception], texts: list[str]
) -> None:
    with pytest.raises(error, match=r"^timestep_schedule: ") as caught:
        timestep_schedule(*arguments)  # type: ignore[arg-type]
    for text in texts:
        assert text in str(caught.value)


def test_the_largest_offset_that_an_error_names_is_accepted() -> None:
    assert timestep_schedule("leading", 10, 1000, 99)[0] == 999


ranges = st.tuples(st.floats(1e-4, 1.0), st.floats(1.1, 1000.0))


@settings(max_examples=60)
@given(spacing=st.sampled_from(SIGMA_SPACINGS), n=st.integers(2, 200), ends=ranges)
def test_sigmas_descend_between_the_exact_ends(spacing: str, n: int, ends: tuple[float, float]) -> None:
    low, high = ends
    sigmas = sigma_schedule(spacing, n, low, high)
    assert sigmas.dtype == torch.float64
    assert sigmas.shape == (n,)
    assert (float(sigmas[0]), float(sigmas[-1])) == (high, low)
    assert descends_strictly(sigmas)


@given(n=st.integers(2, 200), ends=ranges, rho=st.floats(1.0, 20.0))
def test_karras_is_even_in_the_rho_th_root(n: int, ends: tuple[float, float], rho: float) -> None:
    low, high = ends
    steps = sigma_schedule("karras", n, low, high, rho=rho).pow(1 / rho).diff()
    expected = (low ** (1 / rho) - high ** (1 / rho)) / (n - 1)
    # A few roundings of the roots, which are at most high^(1/rho); rho and 1/rho cancel in their effect on them.
    torch.testing.assert_close(steps, torch.full_like(steps, expected), rtol=0, atol=1e-14 * high ** (1 / rho))


@given(spacing=st.sampled_from(["exponential", "lu"]), n=st.integers(2, 200), ends=ranges)
def test_exponential_and_lu_are_even_in_log_sigma(spacing: str, n: int, ends: tuple[float, float]) -> None:
    low, high = ends
    steps = sigma_schedule(spacing, n, low, high).log().diff()
    # |log σ| is below 10: a few ulp of that.
    torch.testing.assert_close(
        steps, torch.full_like(steps, math.log(low / high) / (n - 1)), rtol=0, atol=10 * 4 * 2.0**-52
    )


def test_beta_is_the_quantile_function() -> None:
    sigmas = sigma_schedule("beta", 33, 0.03, 14.6, alpha=2.0, beta=1.0)
    # The distribution function of Beta(2, 1) is x², so its quantile function is the square root.
    expected = 0.03 + (14.6 - 0.03) * torch.linspace(1, 0, 33, dtype=torch.float64).sqrt()
    # scipy promises its quantiles to some ulp only.
    torch.testing.assert_close(sigmas, expected, rtol=1e-12, atol=0)


@settings(max_examples=30)
@given(n=st.integers(2, 60))
def test_equal_shape_parameters_mirror_the_quantiles(n: int) -> None:
    sigmas = sigma_schedule("beta", n, 1.0, 3.0)
    torch.testing.assert_close(sigmas + sigmas.flip(0), torch.full_like(sigmas, 4.0), rtol=1e-12, atol=0)


@pytest.mark.parametrize("spacing", SIGMA_SPACINGS)
def test_one_level_is_the_highest(spacing: str) -> None:
    assert sigma_schedule(spacing, 1, 0.5, 2.5).tolist() == [2.5]
    assert sigma_schedule(spacing, 1, 2.5, 2.5).tolist() == [2.5]


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("n", [2, 5, 20, 50])
@pytest.mark.parametrize(
    ("spacing", "option", "name"),
    [
        ("karras", "use_karras_sigmas", "DPMSolverMultistepScheduler"),
        ("karras", "use_karras_sigmas", "EulerDiscreteScheduler"),
        ("exponential", "use_exponential_sigmas", "DPMSolverMultistepScheduler"),
        ("exponential", "use_exponential_sigmas", "EulerDiscreteScheduler"),
        ("beta", "use_beta_sigmas", "DPMSolverMultistepScheduler"),
        ("beta", "use_beta_sigmas", "EulerDiscreteScheduler"),
        ("lu", "use_lu_lambdas", "DPMSolverMultistepScheduler"),
    ],
)
def test_sigmas_are_those_of_diffusers(spacing: str, option: str, name: str, n: int) -> None:
    diffusers = pytest.importorskip("diffusers")
    options = {"beta_schedule": "scaled_linear", "timestep_spacing": "linspace", option: True}
    theirs = getattr(diffusers, name)(**options)
    levels = ((1 - theirs.alphas_cumprod) / theirs.alphas_cumprod).sqrt()
    theirs.set_timesteps(n)
    ours = sigma_schedule(spacing, n, float(levels[0]), float(levels[-1]))
    # The result there is rounded to float32; "lu" also takes its ends through a float32 logarithm of size ≤ 4.
    torch.testing.assert_close(ours.float(), theirs.sigmas[:n], rtol=2.0**-20, atol=0)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "texts"),
    [
        (("cosine", 5, 0.1, 1.0), {}, ValueError, ["spacing is 'cosine'", "beta, exponential, karras, lu", "pick"]),
        (("karras", 0, 0.1, 1.0), {}, ValueError, ["num_inference_steps is 0", "raise"]),
        (("karras", 5.0, 0.1, 1.0), {}, TypeError, ["num_inference_steps has type float", "as an int"]),
        (("karras", 5, 0.0, 1.0), {}, ValueError, ["sigma_min is 0.0", "above 0", "in that range"]),
        (("karras", 5, math.nan, 1.0), {}, ValueError, ["sigma_min is nan", "in that range"]),
        (("lu", 5, 0.1, math.inf), {}, ValueError, ["sigma_max is inf", "in that range"]),
        (("lu", 1, 0.1, -1.0), {}, ValueError, ["sigma_max is -1.0", "in that range"]),
        (("lu", 5, "0.1", 1.0), {}, TypeError, ["sigma_min has type str", "as a float"]),
        (("beta", 5, True, 1.0), {}, TypeError, ["sigma_min has type bool", "as a float"]),
        (("exponential", 2, 1.0, 1.0), {}, ValueError, ["sigma_min is 1.0", "less than sigma_max, 1.0", "swap"]),
        (("karras", 5, 0.1, 1.0), {"rho": 0.0}, ValueError, ["rho is 0.0", "in that range"]),
        (("beta", 5, 0.1, 1.0), {"alpha": -0.6}, ValueError, ["alpha is -0.6", "in that range"]),
        (("beta", 5, 0.1, 1.0), {"beta": math.nan}, ValueError, ["beta is nan", "in that range"]),
        (("lu", 9, 1.0, 1.0 + 2.0**-51), {}, ValueError, ["num_inference_steps is 9", "differ in float64", "fewer"]),
    ],
)
def test_sigma_schedule_says_what_is_wrong(
    arguments: tuple[object, ...], options: dict[str, float], error: type[Exception], texts: list[str]
) -> None:
    with pytest.raises(error, match=r"^sigma_schedule: ") as caught:
        sigma_schedule(*arguments, **options)  # type: ignore[arg-type]
    for text in texts:
        assert text in str(caught.value)


def test_a_missing_scipy_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(ImportError, match=re.escape("fastdiff-kernels[spacings]")):
        sigma_schedule("beta", 5, 0.1, 1.0)
    assert sigma_schedule("karras", 5, 0.1, 1.0).shape == (5,)


@pytest.mark.parametrize("spacing", [*TIMESTEP_SPACINGS, *SIGMA_SPACINGS])
def test_the_default_device_and_dtype_do_not_matter(spacing: str) -> None:
    def make() -> torch.Tensor:
        if spacing in TIMESTEP_SPACINGS:
            return timestep_schedule(spacing, 7, 1000)
        return sigma_schedule(spacing, 7, 0.03, 14.6)

    usual = make()
    with torch.device("meta"):
        made = make()
    assert made.device.type == "cpu"
    assert torch.equal(made, usual)
