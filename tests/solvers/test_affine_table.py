# SPDX-License-Identifier: MIT
"""Algebra of affine expressions, validation of step tables, and the row layout of all backends."""

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
from support.solver_loops import SOLVERS

ROOT = Path(__file__).resolve().parents[2]

#: Whole numbers of moderate size, on which float64 is exact and so the laws of algebra hold to the bit.
WHOLE = st.integers(-1000, 1000).map(float)
FORMS = st.lists(WHOLE, min_size=8, max_size=8).map(Affine)

# --------------------------------------------------------------------------------------------------------- the algebra


@given(a=FORMS, b=FORMS, c=FORMS, s=WHOLE, t=WHOLE)
def test_affine_satisfies_vector_space_axioms(a: Affine, b: Affine, c: Affine, s: float, t: float) -> None:
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
def test_affine_equals_sum_of_terms(form: Affine, values: list[float]) -> None:
    symbols = (SAMPLE, MODEL_OUTPUT, PREDICTION, *HISTORY, NOISE)
    assert len(symbols) == len(COLUMNS)
    rebuilt = sum((c * symbol for c, symbol in zip(form.coefficients, symbols, strict=True)), ZERO)
    assert rebuilt == form
    assert Affine(values) + form - form == Affine(values)


def test_affine_has_equality_and_repr() -> None:
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
    first = _row(prev, clip=0.9, kept=(keep, PREDICTION), slots=(3, 0), variance_offset=-1.0, variance_slope=0.125)
    # Register 2 is read by the first row's keep, so something has to be there.
    opening = _row(kept=(SAMPLE,), slots=(2,))
    table = StepTable((opening, first), initial_scale=1.5, variance=Variance.LEARNED_RANGE, drop_unread=False)
    assert len(table) == 2
    assert table.coefficients.dtype == torch.float64
    assert table.coefficients.shape == (2, 32)
    row = table.coefficients[1].tolist()
    assert row[:8] == [0.5, 0.25, 0.9, -1.0, 0.125, 1.0, 3.0, 0.0]
    assert row[8:16] == [2.0, 0, 0, 0, 0, 0, 0, 3.0]
    assert row[16:24] == [0, -1.0, 0, 0, 0, 4.0, 0, 0]
    assert row[24:32] == [0, 0, 1.0, 0, 0, 0, 0, 0]
    assert table.kept_slots == ((2,), (3, 0))
    assert table.read_slots == ((), (2,))
    assert table.draws_noise == (False, True)
    assert table.timesteps == (1.0, 1.0)
    assert list(table) == [opening, first]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["prev", "keep", "prediction", "variance_offset"])
def test_table_refuses_non_finite_values(place: str, value: float) -> None:
    bad = Affine([value, *[0.0] * 7])
    rows = {
        "prev": lambda: _row(bad),
        "keep": lambda: _row(kept=(bad,), slots=(0,)),
        "prediction": lambda: Row(1.0, SAMPLE, (value, 0.0)),
        "variance_offset": lambda: _row(variance_offset=value),
    }
    with pytest.raises(
        ValueError, match=r"StepTable: coefficients\[1, \d+\] is .*, expected a finite number; the solver divides"
    ):
        StepTable((_row(), rows[place]()))


@pytest.mark.parametrize("clip", [0.0, -1.0, math.nan])
def test_table_refuses_non_positive_clip(clip: float) -> None:
    with pytest.raises(ValueError, match=r"StepTable: coefficients\[0, 2\] is"):
        StepTable((_row(clip=clip),))
    assert StepTable((_row(clip=math.inf),)).coefficients[0, layout.CLIP] == math.inf


@pytest.mark.parametrize(
    ("kept", "slots"),
    [
        ((SAMPLE,), (4,)),
        ((SAMPLE,), (-1,)),
        ((SAMPLE, SAMPLE), (1, 1)),
        ((SAMPLE,), ()),
        ((), (0,)),
        ((SAMPLE, SAMPLE, SAMPLE), (0, 1, 2)),
    ],
)
def test_table_refuses_bad_slots(kept: tuple[Affine, ...], slots: tuple[int, ...]) -> None:
    with pytest.raises(
        ValueError, match=r"StepTable: source\[0\].slots is .*expected a different history slot.*; name one"
    ):
        StepTable((_row(kept=kept, slots=slots),))


@pytest.mark.parametrize("register", range(4))
def test_table_refuses_reading_unwritten_slot(register: int) -> None:
    reading = _row(SAMPLE + HISTORY[register])
    other = _row(kept=(SAMPLE,), slots=((register + 1) % 4,))
    with pytest.raises(
        ValueError, match=rf"StepTable: source\[1\] reads history slot {register}, expected .*; keep an output"
    ):
        StepTable((other, reading))
    # A row reads before it stores.
    with pytest.raises(ValueError, match=rf"source\[0\] reads history slot {register}"):
        StepTable((_row(SAMPLE + HISTORY[register], kept=(SAMPLE,), slots=(register,)),))
    StepTable((_row(kept=(SAMPLE,), slots=(register,)), other, reading))


def test_table_drops_unread_outputs() -> None:
    rows = (
        _row(kept=(SAMPLE, PREDICTION), slots=(0, 1)),  # slot 0 is written again before it is read
        _row(SAMPLE + HISTORY[1], kept=(MODEL_OUTPUT, HISTORY[1]), slots=(0, 2)),  # slot 2 is for a row that goes
        _row(SAMPLE + HISTORY[0], kept=(HISTORY[2], HISTORY[0]), slots=(3, 0)),  # slot 3 is never read, slot 0 is
        _row(SAMPLE + HISTORY[0], kept=(SAMPLE,), slots=(1,)),
    )
    table = StepTable(rows)
    assert table.kept_slots == ((1,), (0,), (0,), ())
    assert [row.kept for row in table] == [(PREDICTION,), (MODEL_OUTPUT,), (HISTORY[0],), ()]
    assert [row.prev_sample for row in table] == [row.prev_sample for row in rows]
    assert table.read_slots == ((), (1,), (0,), (0,))
    assert table.coefficients[:, [layout.STORE_0, layout.STORE_1]].tolist() == [[1, -1], [0, -1], [0, -1], [-1, -1]]
    assert StepTable(tuple(table)) == table
    assert list(StepTable(rows, drop_unread=False)) == list(rows)


@pytest.mark.filterwarnings("default::DeprecationWarning")  # each call has several
def test_table_and_row_keep_former_names() -> None:
    with pytest.warns(DeprecationWarning, match=r"Row\(keep=\) is now kept=") as warned:
        old = _row(keep=(SAMPLE,), store=(2,))
    assert {str(one.message).partition(" is")[0] for one in warned} == {"Row(keep=)", "Row(store=)"}
    assert {one.filename for one in warned} == {__file__}
    assert old == _row(kept=(SAMPLE,), slots=(2,))
    table = StepTable((old, _row(HISTORY[2])))
    cpu = torch.device("cpu")
    for former, now in (
        (lambda: table.rows, table.coefficients),
        (lambda: table.rows_as(torch.float32), table.coefficients_as(torch.float32)),
        (lambda: table.shared_rows(torch.float32, cpu), table.shared_coefficients(torch.float32, cpu)),
    ):
        with pytest.warns(DeprecationWarning, match=r"^StepTable\.\w+ is now \w+coefficients|coefficients"):
            assert torch.equal(former(), now)
    for former, expected in (
        (lambda: table.store, table.kept_slots),
        (lambda: table.reads, table.read_slots),
        (lambda: old.keep, old.kept),
        (lambda: old.store, old.slots),
    ):
        with pytest.warns(DeprecationWarning, match="the old name goes with the next release"):
            assert former() == expected


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
    rows = table.coefficients_as(dtype)
    assert compute_dtype(dtype) is stored
    assert rows.dtype is stored
    assert rows.is_contiguous()
    assert torch.equal(rows, table.coefficients.to(stored))
    rows.zero_()
    assert table.coefficients[0, 8] != 0.0 or dtype == torch.float64


def test_table_prediction_rows_give_unclipped_d() -> None:
    table = StepTable((_row(2.0 * NOISE, clip=0.5, kept=(SAMPLE,), slots=(0,)), _row(HISTORY[0])))
    rows = table.prediction_rows()
    for row in rows.tolist():
        assert row[:3] == [0.5, 0.25, math.inf]
        assert row[8:16] == list(PREDICTION.coefficients)
        assert row[3:5] + row[16:] == [0.0] * 18
        assert row[5:8] == [1.0, -1.0, -1.0], "the model's input as it is, and nothing stored"
    assert table.coefficients[0, 2] == 0.5, "the table itself is not written to"


@pytest.mark.parametrize("solver", SOLVERS)
def test_table_of_every_solver_uses_what_it_declares(solver: str) -> None:
    """Check that each row reads exactly the registers and noise that its coefficients use."""
    table = SOLVERS[solver](levels_from_half_log_snr([-1.0, -0.5, 0.2, 0.7, 1.5, math.inf]), Prediction())
    first = COLUMNS.index("history_0")
    for i, row in enumerate(table):
        forms = (row.prev_sample, *row.kept)
        read = tuple(j for j in range(4) if any(form.coefficients[first + j] for form in forms))
        assert table.read_slots[i] == read
        assert table.draws_noise[i] == any(form.coefficients[-1] for form in forms)
    # A kept output that no later row reads costs a pass over memory.
    unread = 0
    for i, stored in enumerate(table.kept_slots):
        for register in stored:
            written_again = (k for k in range(i + 1, len(table)) if register in table.kept_slots[k])
            last = next(written_again, len(table) - 1)
            unread += not any(register in table.read_slots[k] for k in range(i + 1, last + 1))
    assert unread == 0


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


def test_layout_of_cpp_header_matches_table() -> None:
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
def test_constants_of_extension_match_python() -> None:
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


def test_layout_of_triton_kernel_matches_table() -> None:
    source = (ROOT / "kernels" / "triton" / "step_math.py").read_text(encoding="utf-8")
    found = _numbers(r"^([A-Z0-9_]+)(?:: tl\.constexpr)? = tl\.constexpr\((\d+)\)", source)
    assert {name: found[name] for name in LAYOUT} == LAYOUT
    assert found["LEARNED_RANGE"] == Variance.LEARNED_RANGE


def test_layout_has_no_overlap() -> None:
    head = sorted(LAYOUT[name] for name in LAYOUT if LAYOUT[name] < layout.PREV_SAMPLE)
    assert head == list(range(layout.PREV_SAMPLE))
    maps = [layout.PREV_SAMPLE, layout.KEEP_0, layout.KEEP_1, layout.ROW_WIDTH]
    assert [b - a for a, b in itertools.pairwise(maps)] == [len(COLUMNS)] * 3
