# SPDX-License-Identifier: MIT
"""Options that several commands read, and the workload that they name."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from ..analysis.workload import Workload
from ..errors import error_message

Model = Annotated[
    str,
    typer.Option("--model", help="digits, or MODULE:FUNCTION whose function returns a fastdiff.analysis.Workload."),
]
Samples = Annotated[int, typer.Option("--n", help="Samples, of the packaged digits.")]
Guidance = Annotated[
    float, typer.Option("--guidance-scale", help="Classifier-free guidance scale of the packaged digits; 1 for none.")
]
Seed = Annotated[int, typer.Option(help="Seed of the noise, of the packaged digits.")]
Quiet = Annotated[bool, typer.Option(help="No progress bar.")]

#: Samples that one call draws at most: they are one batch.
MOST_SAMPLES = 10_000


def parse_names(text: str, operation: str, argument: str) -> list[str]:
    """Return the names of a list with commas.

    Raises:
        ValueError: there is none.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise ValueError(error_message(operation, argument, f"is {text!r}", "names with commas", "write one or more"))
    return names


def parse_counts(text: str, operation: str, argument: str) -> list[int]:
    """Return the numbers of a list such as ``"5,10,20"``.

    Raises:
        ValueError: it holds something else, or nothing.
    """
    names = parse_names(text, operation, argument)
    if not all(name.isascii() and name.isdigit() and len(name) < 10 and int(name) > 0 for name in names):
        raise ValueError(
            error_message(operation, argument, f"is {text!r}", "numbers of at least 1 with commas", "write 5,10,20")
        )
    return [int(name) for name in names]


def load_workload(
    model: str, operation: str, *, n: int, guidance_scale: float, seed: int, features: bool = False
) -> Workload:
    """Return the workload that ``--model`` names.

    Args:
        model: ``digits``, or ``module:function``; modules are found in the current folder too.
        operation: the command, for messages.
        n, guidance_scale, seed: of the digits.
        features: with the metrics of features, for the digits.

    Raises:
        ValueError: there is no such function, or a number is out of range.
        TypeError: the function returns something else.
    """
    if not 1 <= n <= MOST_SAMPLES:
        raise ValueError(
            error_message(operation, "--n", f"is {n}", f"1 to {MOST_SAMPLES}", "ask for as many, or call twice")
        )
    if not 0 <= seed < 2**32:
        raise ValueError(error_message(operation, "--seed", f"is {seed}", f"0 to {2**32 - 1}", "stay in that range"))
    if model == "digits":
        from ..digits.workload import digits_workload

        return digits_workload(n, guidance_scale=guidance_scale, seed=seed, features=features)
    made = _function(model, operation)()
    if not isinstance(made, Workload):
        got = f"is {model!r}, which returned a value of type {type(made).__name__}"
        remedy = "return Workload(model, scheduler, latents)"
        raise TypeError(error_message(operation, "--model", got, "a fastdiff.analysis.Workload", remedy))
    return made


def _function(name: str, operation: str) -> Callable[[], Any]:
    """Import a function by ``module:function``."""
    module_name, separator, function_name = name.partition(":")
    expected = "digits or module:function"
    if not separator or not module_name or not function_name:
        raise ValueError(error_message(operation, "--model", f"is {name!r}", expected, "write it so"))
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module_name), function_name)
    except (ModuleNotFoundError, AttributeError) as error:
        # A module that the user's own module lacks is the user's error, in its own words.
        if isinstance(error, ModuleNotFoundError) and error.name not in _parents(module_name):
            raise
        got, remedy = f"is {name!r}, which cannot be imported ({error})", "call from the folder of the module"
        raise ValueError(error_message(operation, "--model", got, expected, remedy)) from error
    if not callable(found):
        got = f"is {name!r}, a value of type {type(found).__name__}"
        raise ValueError(error_message(operation, "--model", got, expected, "name a function without arguments"))
    function: Callable[[], Any] = found
    return function


def _parents(module: str) -> set[str]:
    parts = module.split(".")
    return {".".join(parts[: i + 1]) for i in range(len(parts))}
