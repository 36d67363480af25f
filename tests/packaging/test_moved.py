# SPDX-License-Identifier: MIT
"""The old names of modules and functions that have moved: each works, and says once where its thing is now."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import pickle
import subprocess
import sys
import warnings
from collections.abc import Iterator

import pytest

import fastdiff
from fastdiff import ops, sampling, schedules
from fastdiff._moved import MOVED
from fastdiff.row_layout import Variance

SINGLE_STEPS = ("cfg_combine", "ddim_step", "ddpm_step", "dpm_solver_step", "euler_step")


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    """Leave no alias behind: the old names have not been imported yet, before and after each test."""
    _drop()
    yield
    _drop()


def _drop() -> None:
    for old in MOVED:
        sys.modules.pop(old, None)
        package, _, name = old.rpartition(".")
        vars(sys.modules.get(package, fastdiff)).pop(name, None)


@pytest.mark.parametrize("old", MOVED)
def test_an_old_name_is_an_alias_and_warns_once(old: str) -> None:
    if "diffusers" in old:
        pytest.importorskip("diffusers")
    new = importlib.import_module(MOVED[old])
    spec = new.__spec__
    with pytest.warns(DeprecationWarning, match=rf"^{old} has moved to {MOVED[old]};") as caught:
        assert importlib.import_module(old) is new
    assert len(caught) == 1
    assert new.__spec__ is spec
    assert new.__name__ == MOVED[old]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert importlib.import_module(old) is new


@pytest.mark.parametrize("old", [name for name in MOVED if "diffusers" not in name])
def test_an_old_name_is_an_attribute_of_its_package(old: str) -> None:
    package, _, name = old.rpartition(".")
    with pytest.warns(DeprecationWarning, match=f"^{old} has moved to ") as caught:
        assert getattr(sys.modules[package], name) is sys.modules[MOVED[old]]
    assert [warning.filename for warning in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert getattr(sys.modules[package], name) is sys.modules[MOVED[old]]


def test_no_old_name_hides_a_module() -> None:
    for old in MOVED:
        folders = importlib.import_module(old.rpartition(".")[0]).__path__
        assert importlib.machinery.PathFinder.find_spec(old, folders) is None, old
    assert not set(MOVED) & set(MOVED.values())


def test_the_warning_names_the_line_that_imports() -> None:
    code = "import fastdiff\n\nfrom fastdiff.table import StepTable\n"
    done = subprocess.run([sys.executable, "-W", "always", "-c", code], capture_output=True, text=True, check=True)
    assert "<string>:3: DeprecationWarning: fastdiff.table has moved" in done.stderr


def test_pickles_that_name_old_modules_are_read() -> None:
    table = fastdiff.create_sampler("linear", "ddim", num_inference_steps=3).table
    new = pickle.dumps((table, Variance.LEARNED), protocol=2)
    old = new.replace(b"fastdiff.solvers.table", b"fastdiff.table").replace(b"fastdiff.row_layout", b"fastdiff.table")
    old = old.replace(b"fastdiff.solvers.affine", b"fastdiff.affine")
    assert new != old
    with pytest.warns(DeprecationWarning, match=r"^fastdiff\.(table|affine) has moved"):
        assert pickle.loads(old) == (table, Variance.LEARNED)


@pytest.mark.parametrize("name", SINGLE_STEPS)
def test_single_steps_are_still_found_among_the_operations(name: str) -> None:
    with pytest.warns(DeprecationWarning, match=rf"^fastdiff\.ops\.{name} has moved to fastdiff\.sampling\.{name};"):
        assert getattr(ops, name) is getattr(sampling, name)
    assert name not in ops.__all__


def test_unknown_names_are_attribute_errors() -> None:
    for package in (fastdiff, ops):
        with pytest.raises(AttributeError, match=f"^module '{package.__name__}' has no attribute 'no_such'"):
            package.no_such  # noqa: B018
    assert importlib.util.find_spec("fastdiff.no_such") is None


def test_packages_have_the_names_of_the_modules_before_them() -> None:
    assert set(fastdiff.schedules.__all__) >= {"NoiseSchedulerConfig", "NoiseScheduleType", "create_noise_scheduler"}
    assert {"GuidanceMode", "GuidedModel", "Model", "unwrap", "write_model_input"} <= set(fastdiff.guidance.__all__)
    assert {"SAMPLERS", "BaseSampler", "check_fields", "split_fields"} <= set(fastdiff.samplers.__all__)
    assert pickle.loads(pickle.dumps(schedules.NoiseScheduleType.LINEAR)) is schedules.NoiseScheduleType.LINEAR
    assert pickle.loads(b"cfastdiff.schedules\nLinearNoiseScheduler\n.") is fastdiff.LinearNoiseScheduler


def test_a_rows_constants_are_found_where_they_were() -> None:
    from fastdiff import row_layout
    from fastdiff.solvers import table

    with pytest.warns(DeprecationWarning, match=r"row_layout\.KEEP_1"):
        assert table.KEEP_1 == row_layout.KEEP_1
    with pytest.raises(AttributeError, match="NOTHING"):
        table.NOTHING  # noqa: B018
