# SPDX-License-Identifier: MIT
"""The typer application that every command registers with."""

from __future__ import annotations

import typer

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Diffusion sampling steps as one fused pass.")
