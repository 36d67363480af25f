# SPDX-License-Identifier: MIT
"""Oracle of the step: the formula in extended precision, with a bound on the rounding error of a backend.

`evaluate` computes a step from the formula alone, in numpy's longdouble, from inputs and a row that are already
rounded to the dtypes that a backend gets.  With each value it returns a bound on a backend's error.

The bound is a running error analysis.  Every operation of the contract (fastdiff/ops/reference.py) rounds its result
once, with an error of at most u·|result|; an operand's error is multiplied by the factor of the operand.  An fma rounds
once where the reference rounds twice, so the bound counts the reference's roundings and holds for both.

Run as a program, this module takes the steps of `build_cases` and saves the results, for a comparison of the builds of
the CPU extension, one per process.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from fastdiff import ops
from fastdiff.ops import backends
from fastdiff.row_layout import ROW_WIDTH, Variance, compute_dtype

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# --- The one table of tolerances -------------------------------------------------------------------------------------
#: u: half a unit in the last place of 1, the relative error of one rounding. Half types are computed in float32.
UNIT_ROUNDOFF = {torch.float16: 2.0**-24, torch.bfloat16: 2.0**-24, torch.float32: 2.0**-24, torch.float64: 2.0**-53}
#: Parameters of the last rounding, to a dtype narrower than its compute dtype: (bits after the leading one, exponent of
#: the smallest normal number). Its error is half a unit of the value's binade.
NARROW = {torch.float16: (10, -14), torch.bfloat16: (7, -126)}
#: Triton's interpreter converts float32 to bfloat16 by truncating the low 16 bits (`cast_impl` passes no rounding mode
#: to `_convert_float`), with an error of up to a whole unit instead of half a unit. It also reads subnormal bfloat16
#: numbers as 0. Compiled Triton and all other conversions round to nearest.
UNITS_OF_LAST_ROUNDING = {("triton", torch.bfloat16): 1.0} if INTERPRETED else {}
HALF_A_UNIT = 0.5
#: exp in units in the last place: glibc's and CUDA's documented bound for expf and exp is 1 and 2, Sleef's (torch) 1.0,
#: and 2.52 of numpy's float32 exp (the interpreter's).
EXP_UNITS = {"cpu": 1.0, "reference": 1.0, "cuda": 2.0, "triton": 3.0}
#: Factor for products of two errors: fewer than 40 roundings, so less than 40·u of the bound itself.
SECOND_ORDER = 1.0 + 40 * 2.0**-24
#: Below the smallest normal number a rounding has an error of half the smallest subnormal number, once per operation.
UNDERFLOW = {torch.float64: 20 * 2.0**-1074}  # not 40 · 2⁻¹⁰⁷⁵, which in a double is 0
UNDERFLOW_SINGLE = 40 * 2.0**-150
#: Rounding of the oracle. On x86 its unit is 2⁻⁶⁴, 2000 times below float64's; it matters where longdouble is double.
ORACLE_ROUNDOFF = float(np.finfo(np.longdouble).eps) / 2
#: Difference between a solver's formula and a row, both in double: coefficients of up to 100 (divided differences over
#: steps that differ by up to 7 in length) times values of up to 30, with about 64 roundings of 2⁻⁵³ each.
FORMULA_ROUNDING = 64 * 100 * 30 * 2.0**-53
#: Bound for schedulers that convert samples to float32 and update there: 64 roundings of values of up to 30, with
#: coefficients of order 1.
SCHEDULER_ROUNDING = 64 * 30 * 2.0**-24
# ---------------------------------------------------------------------------------------------------------------------


def available_backends() -> list[object]:
    """Return the backends of this machine as pytest parameters; those of a GPU are marked."""
    found: list[object] = ["reference"]
    if backends.extension is not None:
        found.append("cpu")
    try:
        missing = backends.why_missing("triton")
    except ImportError as error:
        missing = str(error)
    if not missing:
        found.append(pytest.param("triton", marks=[] if INTERPRETED else [pytest.mark.gpu]))
    if not backends.why_missing("cuda"):
        found.append(pytest.param("cuda", marks=pytest.mark.gpu))
    return found


def device_of(backend: str) -> str:
    """Return the device of a backend's tensors in the tests."""
    return "cuda" if backend == "cuda" or (backend == "triton" and not INTERPRETED) else "cpu"


@dataclass
class Case:
    """The arguments of one `ops.step`; `table` has one row."""

    sample: Tensor
    model_output: Tensor
    table: Tensor
    uncond: Tensor | None = None
    guidance: Tensor | None = None
    history: Sequence[Tensor | None] = ()
    noise: Tensor | None = None
    variance: Tensor | None = None
    threshold: Tensor | None = None
    variance_kind: int = 0
    keeps: int = 0
    mask: Tensor | None = None
    #: Names of the tensors whose coefficients are all 0.
    unused: tuple[str, ...] = field(default=())

    def run(self, backend: str | None = None, *, out: Sequence[Tensor] | None = None) -> tuple[Tensor, ...]:
        arguments = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("unused", "sample")}
        table, model_output = arguments.pop("table"), arguments.pop("model_output")
        arguments["guidance_scale"] = arguments.pop("guidance")
        with torch.no_grad():
            return ops.step(self.sample, model_output, table, 0, **arguments, out=out, backend=backend)

    def with_tensors(self, change: object) -> Case:
        """Return a copy whose tensors are `change(name, tensor)`."""
        new = {f.name: getattr(self, f.name) for f in fields(self)}
        for name, value in new.items():
            if isinstance(value, Tensor):
                new[name] = change(name, value)  # type: ignore[operator]
        new["history"] = [None if h is None else change(f"history_{j}", h) for j, h in enumerate(self.history)]  # type: ignore[operator]
        return Case(**new)

    def to(self, device: str) -> Case:
        return self.with_tensors(lambda _, tensor: tensor.to(device))

    def poisoned_out(self) -> tuple[Tensor, ...]:
        """Return outputs filled with NaN, which reveals elements that are not written."""
        return tuple(torch.full_like(self.sample, float("nan")) for _ in range(self.keeps + 1))


@dataclass(frozen=True)
class Shape:
    """Parameters of a case, drawn by `cases` and shrunk by hypothesis."""

    seed: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    guidance: str = "none"
    registers: int = 0
    noise: bool = False
    variance_kind: int = 0
    threshold: bool = False
    keeps: int = 0
    clip: bool = False


def cases(
    dtypes: Sequence[torch.dtype] = DTYPES, shapes: st.SearchStrategy[tuple[int, ...]] | None = None
) -> st.SearchStrategy[Shape]:
    """Return a strategy for any step: each coefficient is 0 with probability 1/2, each tensor optional if it may be."""
    sizes = st.lists(st.integers(1, 7), min_size=1, max_size=4).map(tuple)
    return st.builds(
        Shape,
        seed=st.integers(0, 2**32 - 1),
        dtype=st.sampled_from(dtypes),
        shape=sizes if shapes is None else shapes,
        guidance=st.sampled_from(("none", "scalar", "a sample")),
        registers=st.integers(0, 15),
        noise=st.booleans(),
        variance_kind=st.sampled_from((Variance.FIXED, Variance.LEARNED_RANGE, Variance.LEARNED)).map(int),
        threshold=st.booleans(),
        keeps=st.integers(0, 2),
        clip=st.booleans(),
    )


def make(plan: Shape) -> Case:
    """Make random tensors and a random row for a plan."""
    gen = torch.Generator().manual_seed(plan.seed)
    compute = compute_dtype(plan.dtype)
    batch = plan.shape[0] if plan.shape else 1

    def like_sample() -> Tensor:
        return torch.randn(plan.shape, generator=gen, dtype=torch.float64).to(plan.dtype)

    def scalars(low: float, high: float, size: int) -> Tensor:
        return (torch.rand(size, generator=gen, dtype=torch.float64) * (high - low) + low).to(compute)

    row = torch.randn(ROW_WIDTH, generator=gen, dtype=torch.float64)
    row = torch.where(torch.rand(ROW_WIDTH, generator=gen) < 0.5, 0.0, row)
    row[2] = 0.7 if plan.clip else float("inf")
    row[3:5] *= 0.5
    guided = plan.guidance != "none"
    case = Case(
        like_sample(),
        like_sample(),
        row.to(compute)[None],
        uncond=like_sample() if guided else None,
        guidance=scalars(-1.0, 9.0, 1 if plan.guidance == "scalar" else batch) if guided else None,
        history=[like_sample() if plan.registers >> j & 1 else None for j in range(4)] if plan.registers else (),
        noise=like_sample() if plan.noise else None,
        variance=like_sample().abs() if plan.variance_kind else None,
        threshold=scalars(0.5, 3.0, batch) if plan.threshold else None,
        variance_kind=plan.variance_kind,
        keeps=plan.keeps,
    )
    return replace(case, unused=_unused(case))


def _unused(case: Case) -> tuple[str, ...]:
    """Return the names of the tensors that no output of this row depends on."""
    maps = case.table[0, 8 : 8 + 8 * (case.keeps + 1)].reshape(-1, 8)
    sample, output, prediction, *history, noise = (bool(column) for column in (maps != 0).any(0))
    # d = p·x + q·m does not contain a term of weight 0.
    p, q = (prediction and bool(weight) for weight in case.table[0, :2])
    used = {
        "sample": sample or p,
        "model_output": output or q,
        "uncond": output or q,
        **{f"history_{j}": h for j, h in enumerate(history)},
        "noise": noise,
        "variance": noise and case.noise is not None,
    }
    return tuple(name for name, is_used in used.items() if not is_used)


def evaluate(
    case: Case, backend: str, dtypes: Sequence[torch.dtype] | None = None
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return for each output its value and the bound on a backend's error, both longdouble in the sample's shape.

    Args:
        case: the step.
        backend: the backend of the bound.
        dtypes: dtypes of the outputs; the sample's by default.
    """
    stored = dtypes or [case.sample.dtype] * (case.keeps + 1)
    u = UNIT_ROUNDOFF[case.table.dtype] + ORACLE_ROUNDOFF
    row = _wide(case.table[0])
    p, q, clip, offset, slope = (row[i] for i in range(5))
    x, m = _wide(case.sample), _wide(case.model_output)
    err_x, err_m = np.zeros_like(x), np.zeros_like(m)
    if case.uncond is not None:
        base = _wide(case.uncond)
        pull = _a_sample(case.guidance, x) * (m - base)
        m = base + pull
        err_m = u * (2 * abs(pull) + abs(m))  # difference and product; sum
    d, err_d = np.zeros_like(x), np.zeros_like(x)
    if p != 0:
        d, err_d = p * x, u * abs(p * x)  # product
    if q != 0:
        d = d + q * m
        err_d = err_d + abs(q) * err_m + u * (abs(q * m) + abs(d))  # product; sum
    d = np.clip(d, -clip, clip)
    if case.threshold is not None:
        bound = _a_sample(case.threshold, x)
        d = np.clip(d, -bound, bound) / bound
        err_d = err_d / bound + u * abs(d)  # quotient
    z, err_z = None, err_x
    if case.noise is not None:
        z = _wide(case.noise)
        if case.variance is not None:
            std, err_std = _std(_wide(case.variance), offset, slope, case.variance_kind, u, EXP_UNITS[backend])
            z, err_z = z * std, abs(z) * err_std + u * abs(z * std)  # product
    history = [None if h is None else _wide(h) for h in case.history]
    history += [None] * (4 - len(history))
    terms = [(x, err_x), (m, err_m), (d, err_d), *((h, err_x) for h in history), (z, err_z)]

    def weighted_sum(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        total, error = np.zeros_like(x), np.zeros_like(x)
        for weight, (term, err) in zip(weights, terms, strict=True):
            if term is None or weight == 0:
                continue
            total = total + weight * term
            error = error + abs(weight) * err + u * (abs(weight * term) + abs(total))  # product; partial sum
        return total, error

    maps = row[8:32].reshape(3, 8)
    sums = [weighted_sum(weights) for weights in maps[: case.keeps + 1]]
    if case.mask is not None:
        w, (prev, err_prev), (target, err_target) = _wide(case.mask), sums[0], weighted_sum(maps[2])
        blended = (1 - w) * prev + w * target
        # Both errors by their weights; then 1 − w, its product, that of the target, and the sum are rounded.
        error = abs(1 - w) * err_prev + abs(w) * err_target
        sums[0] = blended, error + u * (2 * abs((1 - w) * prev) + abs(w * target) + abs(blended))
    results = []
    for (total, error), dtype in zip(sums, stored, strict=True):
        error = SECOND_ORDER * error + UNDERFLOW.get(case.table.dtype, UNDERFLOW_SINGLE)
        if dtype == torch.float32 and case.table.dtype == torch.float64:
            error = error + 2.0**-24 * (abs(total) + error) + UNDERFLOW_SINGLE
        if dtype in NARROW:
            bits, least = NARROW[dtype]
            with np.errstate(invalid="ignore"):
                _, exponent = np.frexp(abs(total) + error)
            unit = np.ldexp(np.longdouble(1), np.maximum(exponent - 1, least) - bits)
            if case.table.dtype == torch.float64:  # by way of float
                error = error + 2.0**-24 * (abs(total) + error) + UNDERFLOW_SINGLE
            error = error + UNITS_OF_LAST_ROUNDING.get((backend, dtype), HALF_A_UNIT) * unit
        results.append((total, error))
    return results


def assert_within_rounding(
    case: Case, outputs: Sequence[Tensor], backend: str, dtypes: Sequence[torch.dtype] | None = None
) -> None:
    """Assert that each element of each output is within the bound of the oracle; overflow to infinity is allowed.

    Args:
        case: the step.
        outputs: the results of a backend.
        backend: its name.
        dtypes: expected dtypes of the outputs; the sample's by default.
    """
    expected = evaluate(case, backend, dtypes)
    dtypes = dtypes or [case.sample.dtype] * len(expected)
    assert len(outputs) == len(expected)
    for o, (output, (value, bound)) in enumerate(zip(outputs, expected, strict=True)):
        assert output.dtype == dtypes[o]
        assert output.shape == case.sample.shape
        got = _wide(output)
        largest = torch.finfo(output.dtype).max
        overflows = np.isinf(got) & (np.sign(got) == np.sign(value)) & (abs(value) + bound > largest)
        with np.errstate(invalid="ignore"):
            wrong = ~((abs(got - value) <= bound) | overflows | (np.isnan(got) & np.isnan(value)))
        if wrong.any():
            at = tuple(int(i) for i in np.argwhere(wrong)[0])
            raise AssertionError(
                f"{backend}: output {o} at {at} is {got[at]!r}, expected {value[at]!r} ± {float(bound[at]):.3g}; "
                f"{int(wrong.sum())} of {wrong.size} elements differ"
            )


def assert_same_bits(a: Sequence[Tensor], b: Sequence[Tensor]) -> None:
    """Assert bitwise equality; all NaN are equal, since their payload depends on the processor."""
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x.shape == y.shape
        assert x.dtype == y.dtype
        assert torch.equal(x.isnan(), y.isnan())
        nan = x.isnan().reshape(-1)
        assert torch.equal(bits(x).masked_fill(nan, 0), bits(y).masked_fill(nan, 0))


def bits(tensor: Tensor) -> Tensor:
    """Return the elements as integers of their size, contiguous."""
    width = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.contiguous().reshape(-1).view(width)


def all_bit_patterns(dtype: torch.dtype) -> Tensor:
    """Return every number, infinity and NaN of a 16-bit dtype, ``[65536]``, in the order of their bits."""
    return torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)


#: Factors for all numbers of a half type: 1 ± 2⁻¹¹ and 1 ± 2⁻⁸ and 0.75 produce ties, the small ones subnormal results
#: and zeros, the large ones overflow.
TIE_FACTORS = (
    1.0,
    -1.0,
    1 + 2.0**-11,
    1 - 2.0**-11,
    1 + 2.0**-8,
    1 - 2.0**-8,
    0.5,
    0.75,
    2.0**-9,
    3 * 2.0**-20,
    2.0**-130,
    3e4,
)


def plain_row(dtype: torch.dtype = torch.float32, **coefficients: float) -> Tensor:
    """Return a table of one row with the given coefficients, all others 0; see `POSITIONS` for the names."""
    row = torch.zeros(1, ROW_WIDTH, dtype=torch.float64)
    row[0, POSITIONS["clip"]] = float("inf")
    for name, value in coefficients.items():
        row[0, POSITIONS[name]] = value
    return row.to(compute_dtype(dtype))


_COLUMNS = ("x", "m", "d", "h0", "h1", "h2", "h3", "z")
#: Positions of the scalars in a row, written out again so that the tests detect a change of the layout.
POSITIONS = {"p": 0, "q": 1, "clip": 2, "offset": 3, "slope": 4}
for _first, _output in ((8, "prev"), (16, "k0"), (24, "k1")):
    POSITIONS |= {f"{_output}_{column}": _first + c for c, column in enumerate(_COLUMNS)}


#: Columns of the outputs in solvers' rows: the heads (x, m, d), followed by a number of the other columns.
_HEADS = (
    "xm",
    "m",
    "xd",
    "d",
    "xm xm",
    "xm m",
    "m xm",
    "xd d",
    "xd xd",
    "d d",
    "md d",
    "xm xm m",
    "xm xm+ xm",
    "xm xm- xm",
)
FORMS = tuple(
    tuple(
        (*head.rstrip("+-"), *others[: k if o == 0 or head[-1] == "+" else max(k - 1, 0) if head[-1] == "-" else 0])
        for o, head in enumerate(heads.split())
    )
    for heads in _HEADS
    for others in (_COLUMNS[3:], ("h0", "h2", "z", "h1", "h3"))
    for k in range(6)
) + ((("m", "h0"), ("m", "h1")), (("d",), ("d",), ("d", "z")), (("m", "d"), ("d",), ("m", "d", "h0", "z")))


def form_case(form: tuple[tuple[str, ...], ...], dtype: torch.dtype, seed: int, *, guided: bool, size: int) -> Case:
    """Return a step of two samples whose outputs have these columns."""
    case = make(Shape(seed, dtype, (2, size), "a sample" if guided else "none", 15, True, keeps=len(form) - 1))
    weights = torch.randn(ROW_WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).tolist()
    names = [f"{output}_{c}" for output, columns in zip(("prev", "k0", "k1"), form, strict=False) for c in columns]
    named = {name: weights[POSITIONS[name]] for name in names}
    return replace(case, table=plain_row(dtype, p=weights[0], q=weights[1], clip=0.7, **named), unused=())


def _wide(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().double().numpy().astype(np.longdouble)


def _a_sample(scalars: Tensor | None, like: np.ndarray) -> np.ndarray:
    assert scalars is not None
    wide = _wide(scalars).reshape(-1)
    return wide.reshape(()) if wide.size == 1 else wide.reshape(-1, *[1] * (like.ndim - 1))


def _std(
    v: np.ndarray, offset: np.longdouble, slope: np.longdouble, kind: int, u: float, exp_units: float
) -> tuple[np.ndarray, np.ndarray]:
    if kind == Variance.LEARNED:
        std = np.sqrt(v)
        return std, u * std
    exponent = offset + slope * v
    std = np.exp(exponent)
    # An absolute error of the exponent is a relative error of exp; a unit in the last place is at most 2u.
    return std, std * (u * (abs(slope * v) + abs(exponent)) + 2 * u * exp_units)


def build_cases(seed: int) -> list[Case]:
    """Return the cases for the comparison of CPU builds: random steps of every kind and dtype, all 16-bit patterns."""
    rng = np.random.default_rng(seed)
    # Sizes around a tile of 512 and around vector widths.
    sizes = (1, 7, 8, 15, 16, 17, 31, 33, 63, 65, 511, 512, 513, 1031)
    found = []
    for i in range(160):
        plan = Shape(
            seed=int(rng.integers(2**32)),
            dtype=DTYPES[i % 4],
            shape=(int(rng.integers(1, 4)), int(rng.choice(sizes))),
            guidance=("none", "scalar", "a sample")[int(rng.integers(3))],
            registers=int(rng.integers(16)),
            noise=bool(rng.integers(2)),
            variance_kind=int(rng.integers(3)),
            threshold=bool(rng.integers(2)),
            keeps=int(rng.integers(3)),
            clip=bool(rng.integers(2)),
        )
        case = make(plan)
        found.append(_with_other_dtypes(case, rng) if i % 3 == 0 else case)
    for i, form in enumerate(FORMS):
        size, guided = int(rng.choice(sizes)), bool(rng.integers(2))
        found.append(form_case(form, DTYPES[i % 4], int(rng.integers(2**32)), guided=guided, size=size))
    for dtype in (torch.float16, torch.bfloat16):
        patterns = all_bit_patterns(dtype)
        for factor in (*TIE_FACTORS, float(rng.normal())):
            found.append(Case(patterns, patterns.flip(0), plain_row(prev_x=factor)))
        shuffled = patterns[torch.from_numpy(rng.permutation(65536))]
        row = plain_row(p=1.5, q=-0.5, clip=2.0, prev_x=0.7, prev_m=1.0, prev_d=0.1, k0_d=1.0)
        found.append(Case(patterns, shuffled, row, uncond=patterns.flip(0), guidance=torch.tensor([3.5]), keeps=1))
    for dtype in (torch.float32, torch.float64):
        width = torch.int32 if dtype == torch.float32 else torch.int64
        info = torch.iinfo(width)
        raw = torch.from_numpy(rng.integers(info.min, info.max, size=(3, 4099), dtype=np.int64)).to(width).view(dtype)
        row = plain_row(dtype, p=1.5, q=-0.5, clip=2.0, prev_x=0.7, prev_m=1.0, prev_d=0.1, k0_d=1.0)
        found.append(Case(raw[0], raw[1], row, uncond=raw[2], guidance=torch.tensor([3.5], dtype=dtype), keeps=1))
    return found


def _with_other_dtypes(case: Case, rng: np.random.Generator) -> Case:
    """Return the case with other dtypes for the tensors besides the sample that fit its table."""
    others = DTYPES if case.sample.dtype == torch.float64 else DTYPES[:3]
    keep = ("sample", "table", "guidance", "threshold")
    return case.with_tensors(lambda name, t: t if name in keep else t.to(others[int(rng.integers(len(others)))]))


if __name__ == "__main__":
    path, seed = sys.argv[1:]
    results = [case.run(out=case.poisoned_out()) for case in build_cases(int(seed))]
    torch.save({"build": backends.extension.cpu_build, "results": results}, path)  # type: ignore[union-attr]
