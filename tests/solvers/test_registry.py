# SPDX-License-Identifier: MIT
"""One entry registers a solver everywhere: classes, command line, benchmarks, documents, tests."""

from __future__ import annotations

import copy
import importlib
import inspect
import pickle
import pkgutil
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fastdiff
from benchmarks.cases import SAMPLER_SPECS
from fastdiff import SamplingConfig, SamplingMethod, create_sampler, samplers, solvers
from fastdiff.samplers import SAMPLERS, BaseSampler
from fastdiff.solvers import ENTRIES, Churn
from support.solver_cases import FORMS, METHODS

ROOT = Path(__file__).resolve().parents[2]


def _solver_functions() -> Iterator[Callable[..., Any]]:
    """Every public function of the package's files that takes (levels, prediction)."""
    for info in pkgutil.iter_modules(solvers.__path__):
        module = importlib.import_module(f"{solvers.__name__}.{info.name}")
        for name, function in inspect.getmembers(module, inspect.isfunction):
            takes = list(inspect.signature(function).parameters)[:2]
            if function.__module__ == module.__name__ and takes == ["levels", "prediction"] and name[0] != "_":
                yield function


#: Rooms whose functions compile tables of solvers that no `SamplingMethod` names.
USERS = ("loops", "rl", "editing")


def test_every_solver_function_is_registered_or_used() -> None:
    """Each function of fastdiff/solvers has an entry in its `__init__`, or a room above compiles its table."""
    found = set(_solver_functions())
    registered = {function for entry in ENTRIES.values() for function in entry.functions}
    assert registered <= found
    users = "\n".join(
        file.read_text() for room in USERS for file in sorted((Path(fastdiff.__file__).parent / room).glob("*.py"))
    )
    unused = [f.__name__ for f in found - registered if not re.search(rf"\b{f.__name__}\b", users)]
    assert unused == []


def test_every_registered_solver_has_a_file_and_a_test_of_its_name() -> None:
    registered = {function for entry in ENTRIES.values() for function in entry.functions}
    assert len(registered) >= 20
    for function in registered:
        assert getattr(solvers, function.__name__) is function, "export it beside its entry"
        assert function.__module__ == f"{solvers.__name__}.{function.__name__}", "one file a solver, of its name"
        assert (ROOT / "tests" / "solvers" / f"test_{function.__name__}.py").is_file(), "one test file of its name"


def test_every_method_has_an_entry() -> None:
    assert set(ENTRIES) == set(SamplingMethod)
    assert [method.value for method in SamplingMethod][:6] == [
        "ddpm", "ddim", "dpm_solver", "euler", "euler_ancestral", "heun"
    ]  # fmt: skip
    for method in SamplingMethod:
        assert method.name == method.value.upper()
        assert SamplingMethod.parse(method.value) is SamplingMethod(method.value) is method
        assert pickle.loads(pickle.dumps(method)) is copy.deepcopy(method) is method


@pytest.mark.parametrize("method", METHODS)
def test_entry_names_class_and_options(method: str) -> None:
    entry = SamplingMethod(method).entry
    cls = SAMPLERS[SamplingMethod(method)]
    assert cls.__name__ == entry.sampler_class
    assert getattr(fastdiff, cls.__name__) is getattr(samplers, cls.__name__) is cls
    assert (cls.method, type(create_sampler("linear", method))) == (SamplingMethod(method), cls)
    fields = inspect.signature(SamplingConfig).parameters
    assert set(entry.options) <= set(fields), "an option that people set by name is a field of SamplingConfig"
    assert {option for options in entry.presets.values() for option in options} <= set(entry.options)
    of_functions = {
        name
        for function in entry.functions
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    if "churn" in of_functions:
        of_functions = of_functions - {"churn"} | set(inspect.signature(Churn).parameters)
    assert set(entry.options) == of_functions | ({"solver_mode"} if len(entry.functions) > 1 else set())
    sampler = create_sampler("linear", method, num_inference_steps=4)
    with pytest.raises(TypeError, match="nonsense"):
        entry.table(sampler.levels(4), sampler._prediction(), nonsense=1)


def test_sampler_is_pickled_with_its_class() -> None:
    for method in METHODS:
        sampler = create_sampler("linear", method, num_inference_steps=3)
        again = pickle.loads(pickle.dumps(sampler))
        assert type(again) is type(sampler)
        assert torch.equal(again.table.coefficients, sampler.table.coefficients)


def test_method_known_only_to_registry_gets_class(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastdiff.samplers import samplers as module

    name = ENTRIES[SamplingMethod.HEUN].sampler_class
    monkeypatch.delattr(module, name)
    made = module._sampler_class(SamplingMethod.HEUN)
    assert (made.__name__, made.__module__, made.method) == (name, module.__name__, SamplingMethod.HEUN)
    assert issubclass(made, BaseSampler)
    assert "heun" in str(made.__doc__)
    scheduler = fastdiff.create_noise_scheduler("linear")
    expected = create_sampler(scheduler, "heun", num_inference_steps=4)
    assert torch.equal(made(scheduler, num_inference_steps=4).table.coefficients, expected.table.coefficients)
    assert type(pickle.loads(pickle.dumps(made(scheduler)))) is made
    with pytest.raises(TypeError, match=r"^BaseSampler: method is missing, expected a SamplingMethod; use create_"):
        BaseSampler(scheduler)


def test_every_method_is_on_the_command_line() -> None:
    pytest.importorskip("typer")
    from fastdiff.cli import SAMPLERS as NAMES
    from fastdiff.cli import sample, sampler_fields

    assert {fields["method"] for fields in NAMES.values()} == set(SamplingMethod)
    (option,) = inspect.signature(sample, eval_str=True).parameters["sampler"].annotation.__metadata__
    for name, fields in NAMES.items():
        assert name in option.help
        assert sampler_fields(name) == fields
    for method in METHODS:
        assert sampler_fields(method)["method"] is SamplingMethod(method)
    with pytest.raises(ValueError, match=r"^sample: --sampler is 'nope', expected one of .*euler_ancestral"):
        sampler_fields("nope")


def test_every_method_is_benchmarked() -> None:
    assert {op.config["method"] for op in SAMPLER_SPECS.values()} == set(METHODS)
    for name, op in SAMPLER_SPECS.items():
        table = create_sampler("linear", num_inference_steps=4, **op.config).table
        assert (f"{name.removesuffix(' (philox)')} (philox)" in SAMPLER_SPECS) == any(table.draws_noise)


def test_every_method_is_tested() -> None:
    assert {form.method for form in FORMS.values()} == set(SamplingMethod)
    for name, form in FORMS.items():
        assert set(form.options) <= set(form.method.entry.options), name


@pytest.mark.parametrize("method", METHODS)
def test_documentation_lists_every_method(method: str) -> None:
    entry = SamplingMethod(method).entry
    options = ", ".join(f"`{option}`" for option in entry.options)
    row = f"| `{method}` | `{entry.sampler_class}` | {options} | {entry.source} |"
    assert row in (ROOT / "docs" / "samplers.md").read_text(encoding="utf-8").splitlines()


def test_documentation_lists_only_methods() -> None:
    text = (ROOT / "docs" / "samplers.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)` \| `\w+Sampler` \|", text, flags=re.MULTILINE) == METHODS


def test_documentation_opens_with_a_line_for_every_solver() -> None:
    text = (ROOT / "docs" / "samplers.md").read_text(encoding="utf-8")
    opening = text.partition("\n## ")[0]
    lines = re.findall(r"^\| `(\w+)`[\w ]* \|.*\| `(test_\w+\.py)` \| .+ \|$", opening, flags=re.MULTILINE)
    assert list(dict.fromkeys(method for method, _ in lines)) == METHODS
    functions = {f"test_{function.__name__}.py" for entry in ENTRIES.values() for function in entry.functions}
    assert {test for _, test in lines} == functions
