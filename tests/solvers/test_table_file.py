# SPDX-License-Identifier: MIT
"""Step tables as files: the bits come back, and a malformed file is one sentence."""

from __future__ import annotations

import json
import math
import pickle
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastdiff
from fastdiff import StepTable
from fastdiff.row_layout import CLIP, MODEL_INPUT_SCALE, ROW_WIDTH, STORE_0, STORE_1
from fastdiff.samplers import TableSampler
from fastdiff.schedules.levels import levels_from_half_log_snr
from fastdiff.solvers import Prediction
from fastdiff.solvers.table import Row
from support.solver_cases import FORMS

safetensors = pytest.importorskip("safetensors.torch")

ENDINGS = (".json", ".safetensors")
LEVELS = levels_from_half_log_snr([-2.3, -1.1, -0.2, 0.7, 1.9, 3.0, math.inf])


def bits(table: StepTable) -> bytes:
    timesteps = torch.tensor(table.timesteps, dtype=torch.float64)
    return bytes(table.coefficients.numpy().tobytes() + timesteps.numpy().tobytes())


def assert_same(found: StepTable, expected: StepTable) -> None:
    assert found == expected
    assert bits(found) == bits(expected)
    assert (found.initial_scale, found.variance, found.thresholding) == (
        expected.initial_scale,
        expected.variance,
        expected.thresholding,
    )
    assert (found.kept_slots, found.read_slots) == (expected.kept_slots, expected.read_slots)


@pytest.mark.parametrize("ending", ENDINGS)
def test_every_solvers_table_comes_back_to_the_bit(ending: str, tmp_path: Path) -> None:
    for form in FORMS.values():
        table = form(LEVELS, Prediction("v_prediction", clip_range=random.choice([math.inf, 1.5])))  # type: ignore[arg-type]
        path = tmp_path / f"table{ending}"
        table.save(path)
        assert_same(StepTable.load(path), table)


numbers = st.floats(allow_nan=False, allow_infinity=False)


@st.composite
def tables(draw: st.DrawFn) -> StepTable:
    rows = []
    written: set[int] = set()
    for _ in range(draw(st.integers(1, 3))):
        scalars = draw(st.lists(numbers, min_size=ROW_WIDTH, max_size=ROW_WIDTH))
        slots = draw(st.lists(st.integers(0, 3), max_size=2, unique=True))
        scalars[STORE_0], scalars[STORE_1] = (*slots, -1.0, -1.0)[:2]
        scalars[CLIP] = draw(st.one_of(st.just(math.inf), st.floats(min_value=1e-300, max_value=1e300)))
        for first in (8, 16, 24):
            for slot in set(range(4)) - written:
                scalars[first + 3 + slot] = 0.0
        for j in range(len(slots), 2):
            scalars[16 + 8 * j : 24 + 8 * j] = [0.0] * 8
        rows.append(Row.from_scalars(draw(numbers), scalars))
        written |= set(slots)
    return StepTable(tuple(rows), draw(numbers), drop_unread=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tables")


@given(table=tables(), ending=st.sampled_from(ENDINGS))
def test_any_table_comes_back_to_the_bit(folder: Path, table: StepTable, ending: str) -> None:
    path = folder / f"any{ending}"
    table.save(path)
    assert_same(StepTable.load(path), table)


def a_table() -> StepTable:
    return fastdiff.create_sampler("linear", "dpm_solver", num_inference_steps=4, solver_order=3).table


def document() -> dict[str, Any]:
    row: dict[str, Any] = {"timestep": 9.0, "prediction": [1.0, -0.5], "prev_sample": {"sample": 0.5}}
    head = {"format": "fastdiff-step-table", "version": 1, "initial_scale": 1.0, "variance": "fixed"}
    return {**head, "thresholding": False, "rows": [row, {**row, "timestep": 3.0}]}


def changed(change: Callable[[dict[str, Any]], object]) -> str:
    found = document()
    change(found)
    return json.dumps(found)


#: What is wrong with a JSON file, and what the sentence says of it.
MALFORMED = {
    "": "no JSON",
    "{": "no JSON",
    "[]": "format",
    "null": "format",
    "[" * 100_000: "nested too deeply",
    '{"format": "fastdiff-step-table", "version": 1, "version": 1}': "'version' is there twice",
    changed(lambda d: d.update(version=2)): "version is 2, and this fastdiff reads 1",
    changed(lambda d: d.update(version=True)): "version is True",
    changed(lambda d: d.update(format="other")): "format",
    changed(lambda d: d.pop("rows")): "no field 'rows'",
    changed(lambda d: d.update(extra=1)): "unknown field 'extra'",
    changed(lambda d: d.update(rows=[])): "0 rows",
    changed(lambda d: d.update(rows={})): "rows is an object of 0",
    changed(lambda d: d.update(rows=["x" * 1000])): r"rows\[0\] is 'xxx.*\.\.\.",
    changed(lambda d: d.update(variance="random")): "fixed, learned_range, learned",
    changed(lambda d: d.update(variance=0)): "variance is 0",
    changed(lambda d: d.update(thresholding=1)): "thresholding is 1",
    changed(lambda d: d.update(initial_scale="1")): "initial_scale is '1'",
    changed(lambda d: d["rows"][1].update(timestep=math.nan)): "a number is NaN",
    changed(lambda d: d["rows"][1].update(timestep=math.inf)): "a number is Infinity",
    changed(lambda d: d["rows"][1].update(timestep=True)): r"rows\[1\]\.timestep is True",
    changed(lambda d: d["rows"][1].update(timestep=10**400)): "an integer of 1329 bits",
    changed(lambda d: d["rows"][1].pop("prediction")): r"rows\[1\] has no field 'prediction'",
    changed(lambda d: d["rows"][1].update(prediction=[1.0])): "expected a list of 2",
    changed(lambda d: d["rows"][0].update(clip=-1.0)): "above 0",
    changed(lambda d: d["rows"][0].update(clip=None)): "clip is None",
    changed(lambda d: d["rows"][0]["prev_sample"].update(history_4=1.0)): "unknown field 'history_4'",
    changed(lambda d: d["rows"][0]["prev_sample"].update(history_2=1.0)): "reads history slot 2",
    changed(lambda d: d["rows"][0].update(kept=[{"slot": 4, "terms": {}}])): r"slots \[4\.0, -1\.0\]",
    changed(lambda d: d["rows"][0].update(kept=[{"slot": 0.0, "terms": {}}])): "slot is 0.0",
    changed(lambda d: d["rows"][0].update(kept=[{"slot": -1, "terms": {}}])): "slot is -1",
    changed(lambda d: d["rows"][0].update(kept=[{"slot": 0, "terms": {}}] * 2)): r"slots is \(0, 0\)",
    changed(lambda d: d["rows"][0].update(kept=[{"slot": 0, "terms": {}}] * 3)): "2 at most",
    changed(lambda d: d["rows"][0].update(kept=[{"slot": 10**400, "terms": {}}])): "an integer of",
    changed(lambda d: d.update(initial_scale="@")).replace('"@"', "1e999"): "initial_scale is inf",
    changed(lambda d: d.update(initial_scale="@")).replace('"@"', "1" * 5000): "no JSON|an integer of",
}


def refused(path: Path) -> str:
    with pytest.raises(ValueError, match=r"^StepTable\.load: path ") as raised:
        StepTable.load(path)
    message = str(raised.value)
    assert type(raised.value) is ValueError
    assert "\n" not in message
    assert len(message) < 600
    assert str(path) in message
    return message


@pytest.mark.parametrize("text", MALFORMED, ids=list(map(str, range(len(MALFORMED)))))
def test_malformed_json_is_one_sentence(text: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    assert re.search(MALFORMED[text], refused(path)), refused(path)


class Exploit:
    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("raise SystemExit('code ran')",)


def test_files_with_other_content_are_one_sentence(tmp_path: Path) -> None:
    for ending in ENDINGS:
        path = tmp_path / f"bad{ending}"
        for data in (pickle.dumps(Exploit()), b"", b"\xff\xfe\x00", b"PK\x03\x04", b"\xff" * 16, bytes(1000)):
            path.write_bytes(data)
            refused(path)
        torch.save({"coefficients": a_table().coefficients}, path)
        refused(path)
    (tmp_path / "large.json").write_bytes(b" " * (64 * 2**20 + 1))
    assert "more than 64 MiB" in refused(tmp_path / "large.json")


def stored(tensors: dict[str, torch.Tensor] | None = None, **metadata: Any) -> bytes:
    good = a_table()
    timesteps = torch.tensor(good.timesteps, dtype=torch.float64)
    usual = {"coefficients": good.coefficients, "timesteps": timesteps}
    head = {"format": "fastdiff-step-table", "version": "1", "initial_scale": "1.0", "variance": "fixed"}
    named = {**head, "thresholding": "false", **metadata}
    found: bytes = safetensors.save(
        {**usual, **(tensors or {})}, {name: value for name, value in named.items() if value is not None}
    )
    return found


def with_coefficient(column: int, value: float) -> torch.Tensor:
    coefficients = a_table().coefficients.clone()
    coefficients[1, column] = value
    return coefficients


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({"more": torch.zeros(1)}, {}, "unknown field 'more'"),
        ({"coefficients": torch.zeros(4, 31, dtype=torch.float64)}, {}, "float64"),
        ({"coefficients": torch.zeros(4, ROW_WIDTH)}, {}, "float32"),
        ({"coefficients": torch.zeros(3, ROW_WIDTH, dtype=torch.float64)}, {}, "3 rows and 4 timesteps"),
        ({"timesteps": torch.zeros((), dtype=torch.float64)}, {}, "timesteps is"),
        ({"timesteps": torch.full((4,), math.nan, dtype=torch.float64)}, {}, "timestep is nan"),
        ({"coefficients": with_coefficient(9, math.nan)}, {}, r"rows\[1\], number 9, is nan"),
        ({"coefficients": with_coefficient(CLIP, math.nan)}, {}, "is nan"),
        ({"coefficients": with_coefficient(CLIP, 0.0)}, {}, "clip is 0.0"),
        ({"coefficients": with_coefficient(MODEL_INPUT_SCALE, math.inf)}, {}, "is inf"),
        ({"coefficients": with_coefficient(STORE_0, 0.5)}, {}, "expected 0 to 3"),
        ({"coefficients": with_coefficient(STORE_0, 1e300)}, {}, "expected 0 to 3"),
        ({"coefficients": with_coefficient(STORE_0, -1.0)}, {}, "without a slot"),
        ({"coefficients": with_coefficient(30, 1.0)}, {}, "without a slot"),
        ({}, {"version": "2"}, "version"),
        ({}, {"format": None}, "format"),
        ({}, {"author": "x"}, "unknown field 'author'"),
        ({}, {"variance": None}, "no field 'variance'"),
        ({}, {"thresholding": "yes"}, "no JSON value"),
        ({}, {"initial_scale": "NaN"}, "initial_scale is nan"),
    ],
)
def test_malformed_safetensors_is_one_sentence(
    tensors: dict[str, torch.Tensor], metadata: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(stored())
    assert_same(StepTable.load(path), a_table())
    path.write_bytes(stored(tensors, **metadata))
    assert re.search(message, refused(path)), refused(path)


def load_or_one_sentence(path: Path) -> None:
    """Load a file: it is a table of finite numbers, or refused in one sentence, and nothing else happens."""
    try:
        coefficients = StepTable.load(path).coefficients
    except ValueError as error:
        message = str(error)
    else:
        assert bool((coefficients.isfinite() | (torch.arange(ROW_WIDTH) == CLIP)).all())
        return
    assert message.startswith("StepTable.load: path ")
    assert "\n" not in message


@given(data=st.data(), ending=st.sampled_from(ENDINGS))
def test_truncated_or_altered_file_is_refused_or_a_table(folder: Path, data: st.DataObject, ending: str) -> None:
    path = folder / f"altered{ending}"
    a_table().save(path)
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    for _ in range(data.draw(st.integers(0 if len(content) < 2 else 1, 3)) if content else 0):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    load_or_one_sentence(path)


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(value=json_values, place=st.integers(0, 11))
def test_any_value_in_any_field_is_one_sentence(folder: Path, value: Any, place: int) -> None:
    found = document()
    row = found["rows"][0]
    row["kept"] = [{"slot": 1, "terms": {"prediction": 1.0}}]
    places: list[tuple[Any, Any]] = [
        *((found, name) for name in found),
        *((row, name) for name in ("timestep", "prediction", "prev_sample", "kept")),
        (row["kept"][0], "slot"),
        (row["kept"][0], "terms"),
    ]
    holder, name = places[place]
    holder[name] = value
    path = folder / "value.json"
    path.write_text(json.dumps(found))
    load_or_one_sentence(path)


@pytest.mark.parametrize("path", ["table.pt", "table", "table.json.pickle"])
def test_other_endings_are_refused(path: str, tmp_path: Path) -> None:
    for call in (a_table().save, StepTable.load):
        with pytest.raises(ValueError, match=r"\.json or \.safetensors"):
            call(tmp_path / path)
    assert list(tmp_path.iterdir()) == []


def test_files_that_cannot_be_read_or_written_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"^StepTable\.load: path is .* cannot be read"):
        StepTable.load(tmp_path / "missing.json")
    with pytest.raises(FileNotFoundError, match=r"^StepTable\.save: path is .* cannot be written"):
        a_table().save(tmp_path / "missing" / "table.json")


def test_failed_save_keeps_the_earlier_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "table.json"
    a_table().save(path)
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="free some space"):
        fastdiff.create_sampler("linear", "ddim", num_inference_steps=3).table.save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return (x * (t[:, None] / 1000 + 0.5)).tanh()


@pytest.mark.parametrize(("method", "options"), [("dpm_solver", {"solver_order": 3}), ("heun", {}), ("ddpm", {})])
def test_loaded_table_samples_like_the_sampler_that_saved_it(
    method: str, options: dict[str, Any], tmp_path: Path
) -> None:
    sampler = fastdiff.create_sampler("scaled_linear", method, num_inference_steps=8, **options)
    sampler.table.save(tmp_path / "table.safetensors")
    again = TableSampler(StepTable.load(tmp_path / "table.safetensors"), sampler.scheduler)
    latents = torch.randn(3, 5)
    expected = sampler.sample(model, latents, seeds=[1, 2, 3], progress=False).samples
    assert torch.equal(again.sample(model, latents, seeds=[1, 2, 3], progress=False).samples, expected)
    assert torch.equal(again.timesteps, sampler.timesteps)
    before = again.table
    with pytest.raises(ValueError, match="num_inference_steps is 9, expected 8"):
        again.set_timesteps(9)
    assert again.table is before


def test_loaded_tables_serve_step_rows(tmp_path: Path) -> None:
    tables = [fastdiff.create_sampler("linear", name, num_inference_steps=5).table for name in ("ddim", "dpm_solver")]
    loaded = []
    for table, ending in zip(tables, ENDINGS, strict=True):
        table.save(tmp_path / f"table{ending}")
        loaded.append(StepTable.load(tmp_path / f"table{ending}"))
    x, output = torch.randn(3, 4), torch.randn(3, 4)
    row_index = torch.tensor([2, 5, -1])
    found = [
        fastdiff.ops.step_rows(
            x, output, torch.cat([t.coefficients_as(x.dtype) for t in each]), row_index, [torch.zeros_like(x)]
        )
        for each in (tables, loaded)
    ]
    assert torch.equal(*found)
