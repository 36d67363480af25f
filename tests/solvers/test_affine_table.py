# SPDX-License-Identifier: MIT
"""The algebra of symbols, what a step table refuses, and that all backends read one layout."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastdiff import row_layout as layout
from fastdiff.ops import backends, reductions, reductions_reference
from fastdiff.row_layout import COLUMNS, Variance, compute_dtype
from fastdiff.schedules.levels import levels_from_half_log_snr
from fastdiff.solvers import Prediction
from fastdiff.solvers.affine import HISTORY, MODEL_OUTPUT, NOISE, PREDICTION, SAMPLE, ZERO, Affine
from fastdiff.solvers.table import Row, StepTable
from support.loops import SOLVERS

ROOT = Path(__file__).resolve().parents[2]

#: Whole numbers of moderate size, on which float64 is exact and so the laws of algebra hold to the bit.
WHOLE = st.integers(-1000, 1000).map(float)
FORMS = st.lists(WHOLE, min_size=8, max_size=8).map(Affine)

# --------------------------------------------------------------------------------------------------------- the algebra


@given(a=FORMS, b=FORMS, c=FORMS, s=WHOLE, t=WHOLE)
def test_affine_obeys_the_laws_of_a_vector_space(a: Affine, b: Affine, c: Affine, s: float, t: float) -> None:
    assert a + b == b + a
    assert (a + b) + c == a + (b + c)
    assert a + ZERO == a
    assert a - b == a + (-b)
    assert s * (a + b) == s * a + s * b
    assert (s + t) * a == s * a + t * a
    assert s * a == a * s
    assert 1.0 * a == a
    assert 4.0 * a / 4.0 == a
    assert hash(a + b) == hash(b + a)


@given(form=FORMS, values=st.lists(WHOLE, min_size=8, max_size=8))
def test_affine_is_the_sum_of_its_symbols(form: Affine, values: list[float]) -> None:
    symbols = (SAMPLE, MODEL_OUTPUT, PREDICTION, *HISTORY, NOISE)
    assert len(symbols) == len(COLUMNS)
    rebuilt = sum((c * symbol for c, symbol in zip(form.coefficients, symbols, strict=True)), ZERO)
    assert rebuilt == form
    assert Affine(values) + form - form == Affine(values)


def test_affine_is_told_apart_and_printed() -> None:
    assert SAMPLE != MODEL_OUTPUT
    assert SAMPLE != "sample"
    assert repr(2.0 * SAMPLE - 0.5 * HISTORY[1]) == "+2·sample -0.5·history_1"
    assert repr(ZERO) == "0"
    with pytest.raises(ValueError, match="zip"):
        Affine([1.0]) + SAMPLE


# ----------------------------------------------------------------------------------------------------------- the table


def _row(prev: Affine = SAMPLE, **fields: object) -> Row:
    return Row(1.0, prev, (0.5, 0.25), **fields)  # type: ignore[arg-type]


def test_table_lays_out_its_rows() -> None:
    prev, keep = 2.0 * SAMPLE + 3.0 * NOISE, 4.0 * HISTORY[2] - MODEL_OUTPUT
    first = _row(prev, clip=0.9, keep=(keep, PREDICTION), store=(3, 0), variance_offset=-1.0, variance_slope=0.125)
    # Register 2 is read by the first row's keep, so something has to be there.
    opening = _row(keep=(SAMPLE,), store=(2,))
    table = StepTable((opening, first), initial_scale=1.5, variance=Variance.LEARNED_RANGE)
    assert len(table) == 2
    assert table.rows.dtype == torch.float64
    assert table.rows.shape == (2, 32)
    row = table.rows[1].tolist()
    assert row[:8] == [0.5, 0.25, 0.9, -1.0, 0.125, 1.0, 3.0, 0.0]
    assert row[8:16] == [2.0, 0, 0, 0, 0, 0, 0, 3.0]
    assert row[16:24] == [0, -1.0, 0, 0, 0, 4.0, 0, 0]
    assert row[24:32] == [0, 0, 1.0, 0, 0, 0, 0, 0]
    assert table.store == ((2,), (3, 0))
    assert table.reads == ((), (2,))
    assert table.draws_noise == (False, True)
    assert table.timesteps == (1.0, 1.0)
    assert list(table) == [opening, first]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["prev", "keep", "prediction", "variance_offset"])
def test_table_refuses_what_is_not_finite(place: str, value: float) -> None:
    bad = Affine([value, *[0.0] * 7])
    rows = {
        "prev": lambda: _row(bad),
        "keep": lambda: _row(keep=(bad,), store=(0,)),
        "prediction": lambda: Row(1.0, SAMPLE, (value, 0.0)),
        "variance_offset": lambda: _row(variance_offset=value),
    }
    with pytest.raises(
        ValueError, match=r"StepTable: rows\[1, \d+\] is .*, expected a finite number; the solver divides"
    ):
        StepTable((_row(), rows[place]()))


@pytest.mark.parametrize("clip", [0.0, -1.0, math.nan])
def test_table_refuses_a_clip_that_is_not_positive(clip: float) -> None:
    with pytest.raises(ValueError, match=r"StepTable: rows\[0, 2\] is"):
        StepTable((_row(clip=clip),))
    assert StepTable((_row(clip=math.inf),)).rows[0, layout.CLIP] == math.inf


@pytest.mark.parametrize(
    ("keep", "store"),
    [
        ((SAMPLE,), (4,)),
        ((SAMPLE,), (-1,)),
        ((SAMPLE, SAMPLE), (1, 1)),
        ((SAMPLE,), ()),
        ((), (0,)),
        ((SAMPLE, SAMPLE, SAMPLE), (0, 1, 2)),
    ],
)
def test_table_refuses_bad_registers(keep: tuple[Affine, ...], store: tuple[int, ...]) -> None:
    with pytest.raises(
        ValueError, match=r"StepTable: source\[0\].store is .*expected a different register.*; name one"
    ):
        StepTable((_row(keep=keep, store=store),))


@pytest.mark.parametrize("register", range(4))
def test_table_refuses_to_read_what_no_row_has_stored(register: int) -> None:
    reading = _row(SAMPLE + HISTORY[register])
    other = _row(keep=(SAMPLE,), store=((register + 1) % 4,))
    with pytest.raises(
        ValueError, match=rf"StepTable: source\[1\] reads register {register}, expected .*; keep a tensor"
    ):
        StepTable((other, reading))
    # A row reads before it stores.
    with pytest.raises(ValueError, match=rf"source\[0\] reads register {register}"):
        StepTable((_row(SAMPLE + HISTORY[register], keep=(SAMPLE,), store=(register,)),))
    StepTable((_row(keep=(SAMPLE,), store=(register,)), other, reading))


def test_table_refuses_to_be_empty() -> None:
    with pytest.raises(ValueError, match="StepTable: source has no rows, expected at least one; ask for at least one"):
        StepTable(())


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
    ids=str,
)
def test_table_rows_are_rounded_once(dtype: torch.dtype, stored: torch.dtype) -> None:
    table = StepTable((_row(SAMPLE * (1.0 / 3.0)),))
    rows = table.rows_as(dtype)
    assert compute_dtype(dtype) is stored
    assert rows.dtype is stored
    assert rows.is_contiguous()
    assert torch.equal(rows, table.rows.to(stored))
    rows.zero_()
    assert table.rows[0, 8] != 0.0 or dtype == torch.float64


def test_table_prediction_rows_give_d_unclipped() -> None:
    table = StepTable((_row(2.0 * NOISE, clip=0.5, keep=(SAMPLE,), store=(0,)), _row(HISTORY[0])))
    rows = table.prediction_rows()
    for row in rows.tolist():
        assert row[:3] == [0.5, 0.25, math.inf]
        assert row[8:16] == list(PREDICTION.coefficients)
        assert row[3:5] + row[16:] == [0.0] * 18
        assert row[5:8] == [1.0, -1.0, -1.0], "the model's input as it is, and nothing stored"
    assert table.rows[0, 2] == 0.5, "the table itself is not written to"


@pytest.mark.parametrize("solver", SOLVERS)
def test_table_of_every_solver_uses_what_it_declares(solver: str) -> None:
    """Registers and noise are what the loop fetches: a row must read exactly what its coefficients say."""
    table = SOLVERS[solver](levels_from_half_log_snr([-1.0, -0.5, 0.2, 0.7, 1.5, math.inf]), Prediction())
    first = COLUMNS.index("history_0")
    for i, row in enumerate(table):
        forms = (row.prev_sample, *row.keep)
        read = tuple(j for j in range(4) if any(form.coefficients[first + j] for form in forms))
        assert table.reads[i] == read
        assert table.draws_noise[i] == any(form.coefficients[-1] for form in forms)
    # What nobody reads later costs a pass over memory.  The last tensor kept before a step of order 1 may be such.
    unread = 0
    for i, stored in enumerate(table.store):
        for register in stored:
            written_again = (k for k in range(i + 1, len(table)) if register in table.store[k])
            last = next(written_again, len(table) - 1)
            unread += not any(register in table.reads[k] for k in range(i + 1, last + 1))
    assert unread <= 1


# ---------------------------------------------------------------------------------------------------------- the layout


def _numbers(pattern: str, text: str) -> dict[str, int]:
    return {name: int(value) for name, value in re.findall(pattern, text, flags=re.MULTILINE)}


LAYOUT = {
    "PREDICTION_SAMPLE": layout.PREDICTION_SAMPLE,
    "PREDICTION_OUTPUT": layout.PREDICTION_OUTPUT,
    "CLIP": layout.CLIP,
    "VARIANCE_OFFSET": layout.VARIANCE_OFFSET,
    "VARIANCE_SLOPE": layout.VARIANCE_SLOPE,
    "MODEL_INPUT_SCALE": layout.MODEL_INPUT_SCALE,
    "STORE_0": layout.STORE_0,
    "STORE_1": layout.STORE_1,
    "PREV_SAMPLE": layout.PREV_SAMPLE,
    "KEEP_0": layout.KEEP_0,
    "KEEP_1": layout.KEEP_1,
    "ROW_WIDTH": layout.ROW_WIDTH,
}


def test_layout_of_the_header_is_the_tables() -> None:
    header = (ROOT / "csrc" / "row_layout.h").read_text(encoding="utf-8")
    body = re.search(r"enum RowLayout[^{]*{(.*?)}", header, flags=re.DOTALL)
    assert body is not None
    found = _numbers(r"\bk(\w+) = (\d+)", body.group(1))
    assert {name.replace("_", "").title().upper(): value for name, value in LAYOUT.items()} == {
        name.upper(): value for name, value in found.items()
    }
    column = re.search(r"enum Column[^{]*{(.*?)}", header, flags=re.DOTALL)
    assert column is not None
    names = [name.partition("=")[0].strip() for name in column.group(1).split(",")]
    assert names == ["kSample", "kModelOutput", "kPrediction", "kHistory0", "kNoise", "kColumns"]
    assert COLUMNS[:4] == ("sample", "model_output", "prediction", "history_0")
    assert COLUMNS.index("noise") == COLUMNS.index("history_0") + layout.NUM_REGISTERS == len(COLUMNS) - 1
    assert _numbers(r"constexpr int k(Registers) = (\d+)", header) == {"Registers": layout.NUM_REGISTERS}
    kinds = re.search(r"enum class Variance[^{]*{(.*?)}", header, flags=re.DOTALL)
    assert kinds is not None
    expected = {"Fixed": Variance.FIXED, "LearnedRange": Variance.LEARNED_RANGE, "Learned": Variance.LEARNED}
    assert _numbers(r"k(\w+) = (\d+)", kinds.group(1)) == expected


@pytest.mark.skipif(backends.extension is None, reason="needs the compiled extension")
def test_constants_of_the_extension_are_pythons() -> None:
    columns = ("sample", "model_output", "prediction", "history_0", "noise")
    assert backends.extension._constants() == {  # type: ignore[union-attr]
        **LAYOUT,
        "NUM_REGISTERS": layout.NUM_REGISTERS,
        "COLUMNS": len(COLUMNS),
        **{f"column {name}": COLUMNS.index(name) for name in columns},
        **{f"Variance.{kind.name}": kind for kind in Variance},
        **{f"sum {name}": getattr(reductions, f"_{name}") for name in ("MEAN", "STD", "NORM", "DOT")},
        "sum BLOCK": reductions_reference.BLOCK,
        "sum LANES": reductions_reference.LANES,
    }
    assert [name for name in COLUMNS if name.startswith("history")] == [
        f"history_{j}" for j in range(layout.NUM_REGISTERS)
    ]


def test_layout_of_the_triton_kernel_is_the_tables() -> None:
    source = (ROOT / "kernels" / "triton" / "step.py").read_text(encoding="utf-8")
    found = _numbers(r"^_([A-Z0-9_]+)(?:: tl\.constexpr)? = tl\.constexpr\((\d+)\)", source)
    assert {name: found[name] for name in LAYOUT} == LAYOUT
    assert found["LEARNED_RANGE"] == Variance.LEARNED_RANGE


def test_layout_has_no_overlap() -> None:
    head = sorted(LAYOUT[name] for name in LAYOUT if LAYOUT[name] < layout.PREV_SAMPLE)
    assert head == list(range(layout.PREV_SAMPLE))
    maps = [layout.PREV_SAMPLE, layout.KEEP_0, layout.KEEP_1, layout.ROW_WIDTH]
    assert [b - a for a, b in itertools.pairwise(maps)] == [len(COLUMNS)] * 3
