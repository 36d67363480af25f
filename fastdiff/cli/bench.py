# SPDX-License-Identifier: MIT
"""``fastdiff bench``: the benchmarks of the package."""

from __future__ import annotations

import importlib

import typer

from ..errors import error_message
from .app import app


# The benchmarks read their arguments themselves: they run from a checkout without typer as well.
@app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(context: typer.Context) -> None:
    """Measure a step beside its peers and beside a copy; `fastdiff bench --help` lists the options."""
    try:
        benchmarks = importlib.import_module("fastdiff.benchmarks.__main__")
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("fastdiff.benchmarks"):
            raise
        raise RuntimeError(
            error_message(
                "bench",
                "fastdiff.benchmarks",
                "cannot be imported",
                "an installation that knows of it",
                "install it again, or run python -m benchmarks in the checkout",
            )
        ) from error
    benchmarks.main(context.args, prog="fastdiff bench")
