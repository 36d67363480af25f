# SPDX-License-Identifier: MIT
"""A comparison as one HTML file: tables and embedded pictures, no script, nothing loaded from a network."""

from __future__ import annotations

import base64
import contextlib
import html
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from ..files import check_writable, write_whole
from ..schedules import BaseNoiseScheduler
from .compare import Comparison, ComparisonRow
from .images import grid_bytes
from .metrics import estimate
from .plots import METRICS, figure_bytes, plot_quality, plot_schedules, plot_spacings
from .plots.clouds import plot_cloud

#: Pictures of these metrics follow the table, where the comparison has them.
PICTURES = ("distance", "frechet", "precision", "recall", "inception")

# The policy forbids every request: a browser that obeys it shows that the file needs no network.
_HEAD = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light; }}
body {{ font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 1180px; margin: 2rem auto;
  padding: 0 1rem; }}
h1 {{ font-size: 1.6rem; margin-bottom: .2rem; }} h2 {{ font-size: 1.2rem; margin-top: 2rem; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
td {{ white-space: nowrap; }}
th, td {{ padding: .2rem .6rem; border-bottom: 1px solid #ddd; text-align: right; }}
th:first-child, td:first-child {{ text-align: left; }}
th {{ border-bottom: 2px solid #888; vertical-align: bottom; }}
tr.group td {{ border-top: 2px solid #bbb; }}
td.best {{ font-weight: 700; background: #e8f3ea; }}
.scroll {{ overflow-x: auto; }}
dl {{ display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; margin: .5rem 0; }}
dt {{ color: #555; }} dd {{ margin: 0; }}
figure {{ margin: 1rem 0; }} figcaption {{ color: #444; font-size: .9rem; }}
img {{ max-width: 100%; height: auto; }}
.strips td {{ text-align: center; vertical-align: top; border: 0; }}
.strips td:first-child {{ text-align: left; vertical-align: middle; }}
.strips img {{ image-rendering: pixelated; max-width: none; }}
.note {{ color: #444; max-width: 60rem; }}
</style>
</head>
<body>
"""


def write_report(comparison: Comparison, path: str | Path, *, images: int = 10) -> None:
    """Write a comparison as one HTML file that opens without a network.

    Args:
        comparison: of `compare_methods`.
        path: of the file.
        images: samples shown of each row, where samples are images of 1 or 3 channels or points in two dimensions.

    Raises:
        OSError: the file cannot be written; one that was there is as it was.
        ImportError: matplotlib or Pillow is missing.
    """
    write_whole(path, render_report(comparison, images=images).encode(), operation="write_report", argument="path")


def check_report_folder(folder: str | Path, *, operation: str, argument: str) -> Path:
    """Make a folder for a report if it is missing, and return the path of the report in it.

    Raises:
        ValueError: the folder cannot be made or written to.
    """
    target = Path(folder) / "index.html"
    with contextlib.suppress(OSError):  # the check below says why in one sentence
        target.parent.mkdir(parents=True, exist_ok=True)
    check_writable(target, operation=operation, argument=argument)
    return target


def render_report(comparison: Comparison, *, images: int = 10) -> str:
    """Return the HTML text of `write_report`."""
    title = f"Sampling methods on {comparison.workload.name}"
    return "\n".join(
        [_HEAD.format(title=html.escape(title)), *_body(comparison, title, images), "</body>", "</html>", ""]
    )


def closest_to_baseline(comparison: Comparison, baseline: str) -> list[str]:
    """Return sentences: for each method, the fewest steps that are at least as close as the baseline at its most.

    Each sentence has both distances, and the mean of the paired differences with its standard error.

    Args:
        comparison: of `compare_methods`.
        baseline: label of a deterministic method of the comparison.
    """
    most = max((row for row in comparison.rows if row.method == baseline), key=lambda row: row.steps)
    found = []
    for method in comparison.methods:
        for row in sorted((row for row in comparison.rows if row.method == method), key=lambda row: row.steps):
            if row.stochastic or row.method == baseline or row.distance.mean > most.distance.mean:
                continue
            gain = estimate(most.distances - row.distances)
            found.append(
                f"{row.steps} steps of {method} ({row.model_calls} model calls) are at least as close to the reference "
                f"as {most.steps} of {baseline}: {row.distance.mean:.4f} against {most.distance.mean:.4f}; closer by "
                f"{gain.mean:.4f} ± {gain.error:.4f} a sample (mean and standard error of {len(row.distances)})."
            )
            break
    return found


def _body(comparison: Comparison, title: str, images: int) -> Iterator[str]:
    yield f"<h1>{html.escape(title)}</h1>"
    yield '<dl class="conditions">'
    for name, value in comparison.conditions.items():
        yield f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>"
    yield "</dl>"
    yield (
        f'<p class="note">Reference: {comparison.reference_steps} steps of {html.escape(comparison.reference)} from '
        "the same noise. Distance: root mean square difference from it, mean over samples ± standard error. The "
        f"reference differs by {comparison.resolution:.2g} from itself at half the steps; smaller distances say "
        f"nothing. Times are medians of {comparison.rounds} interleaved rounds on this machine. Methods that draw "
        "noise (marked ∗) go to other samples by intention: judge them by the metrics of distributions.</p>"
    )
    baseline = "ddim" if "ddim" in comparison.methods else comparison.reference
    if baseline in comparison.methods and (sentences := closest_to_baseline(comparison, baseline)):
        yield "<h2>Fewest steps that reach the baseline</h2><ul>"
        yield from (f"<li>{html.escape(sentence)}</li>" for sentence in sentences)
        yield "</ul>"
    yield "<h2>Figures</h2>"
    yield from _table(comparison.rows)
    yield "<h2>Pictures</h2>"
    for metric in PICTURES:
        if any(_shows(row, metric) for row in comparison.rows):
            label = METRICS[metric].rstrip(" ↓↑")
            yield _picture(figure_bytes(plot_quality(comparison, metric)), f"{label} against model calls and time")
    yield from _samples(comparison, images)
    scheduler = comparison.workload.scheduler
    yield "<h2>Schedule</h2>"
    kind = str(scheduler.config.schedule_type)
    yield _picture(figure_bytes(plot_schedules({kind: scheduler})), f"the {kind} schedule of the model")
    yield _picture(
        figure_bytes(plot_spacings(scheduler, _spacing_steps(scheduler))), "spacings of timesteps and levels"
    )


def _table(rows: list[ComparisonRow]) -> Iterator[str]:
    columns: dict[str, Callable[[ComparisonRow], str]] = {
        "steps": lambda row: str(row.steps),
        "model calls": lambda row: str(row.model_calls),
        "ms an image": lambda row: f"{row.milliseconds_per_image:.2f}",
        "distance": lambda row: f"{row.distance.mean:.4f} ± {row.distance.error:.1g}",
        "variance": lambda row: f"{row.variance:.4g}",
        "sharpness": lambda row: _number(row.sharpness, ".4g"),
        "Fréchet": lambda row: _number(row.frechet, ".3f"),
        "inception-style": lambda row: _number(row.inception, ".3f"),
        "precision": lambda row: _number(row.precision, ".3f"),
        "recall": lambda row: _number(row.recall, ".3f"),
    }
    best = _best(rows)
    yield '<div class="scroll"><table class="figures"><tr><th>method</th>'
    yield from (f"<th>{name}</th>" for name in columns)
    yield "</tr>"
    before = None
    for row in rows:
        name = html.escape(row.method) + ("∗" if row.stochastic else "")
        yield f"<tr{'' if row.method == before else ' class=group'}><td>{name}</td>"
        before = row.method
        for column, text in columns.items():
            marked = ' class="best"' if (column, row.steps, row.method) in best else ""
            yield f"<td{marked}>{text(row)}</td>"
        yield "</tr>"
    yield "</table></div>"
    note = "Bold: the best of its number of steps."
    if any(_shows(row, "frechet") for row in rows):
        count = len(rows[0].distances)
        note += f" Fréchet distance, precision, recall and inception-style score are of {count} samples: "
        note += "few make them rough, and they fall or rise with the number."
    yield f'<p class="note">{note}</p>'


def _best(rows: list[ComparisonRow]) -> set[tuple[str, int, str]]:
    """Return column, steps and method of the best figure of each number of steps."""
    found = set()
    for steps in {row.steps for row in rows}:
        group = [row for row in rows if row.steps == steps]
        for column, name, sign in (
            ("distance", "distance", 1),
            ("Fréchet", "frechet", 1),
            ("inception-style", "inception", -1),
            ("precision", "precision", -1),
            ("recall", "recall", -1),
        ):
            values = [(sign * value, row.method) for row in group if (value := _metric(row, name)) is not None]
            if len(values) > 1:
                lowest = min(values)[0]
                found |= {(column, steps, method) for value, method in values if value == lowest}
    return found


def _metric(row: ComparisonRow, name: str) -> float | None:
    value = row.distance.mean if name == "distance" else getattr(row, name)
    return None if value is None or (name == "distance" and row.stochastic) or math.isnan(value) else float(value)


def _shows(row: ComparisonRow, metric: str) -> bool:
    return _metric(row, metric) is not None


def _samples(comparison: Comparison, images: int) -> Iterator[str]:
    """Yield a table of samples: a line a method, a column a number of steps; the reference first."""
    if _strip(comparison, comparison.reference_samples, images) is None:
        return
    counts = sorted({row.steps for row in comparison.rows})
    yield "<h2>Samples</h2>"
    yield '<p class="note">Sample i of every strip began at the same noise.</p>'
    reference = _strip(comparison, comparison.reference_samples, images)
    yield f"<figure>{reference}<figcaption>reference: {html.escape(comparison.reference)}, "
    yield f"{comparison.reference_steps} steps</figcaption></figure>"
    yield '<div class="scroll"><table class="strips"><tr><th>method</th>'
    yield from (f"<th>{count} steps</th>" for count in counts)
    yield "</tr>"
    for method in comparison.methods:
        yield f"<tr><td>{html.escape(method)}</td>"
        found = {row.steps: row for row in comparison.rows if row.method == method}
        for count in counts:
            yield f"<td>{_strip(comparison, found[count].samples, images) if count in found else ''}</td>"
        yield "</tr>"
    yield "</table></div>"


def _strip(comparison: Comparison, samples: Tensor, images: int) -> str | None:
    """Return an <img> of some samples, or None where they are neither images nor points."""
    decode = comparison.workload.decode
    shown = samples if decode is None else decode(samples)
    # Spread over the batch, whose conditions usually come in blocks.
    index = torch.linspace(0, len(shown) - 1, min(images, len(shown))).round().long()
    if shown.dim() == 4 and shown.shape[1] in (1, 3):
        scale = max(1, round(40 / shown.shape[-1]))
        data = grid_bytes(shown[index], columns=min(5, len(index)), scale=scale)
    elif shown.dim() == 2 and shown.shape[1] == 2:
        data = figure_bytes(plot_cloud([shown], paths=0, frames=1), dpi=60)
    else:
        return None
    return f'<img alt="samples" src="{_data_uri(data)}">'


def _picture(png: bytes, caption: str) -> str:
    text = html.escape(caption)
    return f'<figure><img alt="{text}" src="{_data_uri(png)}"><figcaption>{text}</figcaption></figure>'


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _spacing_steps(scheduler: BaseNoiseScheduler) -> int:
    return min(10, len(scheduler.alphas_cumprod))
