# SPDX-License-Identifier: MIT
"""The report of a comparison: one HTML file without scripts or addresses, shown by a browser without a network."""

from __future__ import annotations

import base64
import io
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fastdiff.analysis import Comparison, compare_methods, write_report
from fastdiff.analysis.report import check_report_folder, render_report
from support.analysis_cases import images_workload, points_workload

pytest.importorskip("matplotlib")
image = pytest.importorskip("PIL.Image")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"),
)


class Page(HTMLParser):
    """The parts of a page that a test looks at."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.alternatives: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        given = dict(attributes)
        self.addresses += [value or "" for name, value in attributes if name in ("src", "href", "srcset", "action")]
        if tag == "img":
            self.alternatives.append(given.get("alt") or "")

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    return compare_methods(
        images_workload(), ["ddim", "dpmsolver++", "ddpm"], [3, 6], reference_steps=12, progress=False
    )


@pytest.fixture(scope="module")
def report(comparison: Comparison) -> str:
    return render_report(comparison, images=4)


def test_report_embeds_every_picture_and_runs_no_script(report: str) -> None:
    page = Page(report)
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert "url(" not in report
    assert "default-src 'none'; img-src data:" in report
    # Five metrics, the schedule, the spacings, the reference and a strip a row.
    assert page.tags.count("img") == len(page.addresses) == 5 + 2 + 1 + 6
    assert all(page.alternatives)
    for address in page.addresses:
        kind, _, data = address.partition(",")
        assert kind == "data:image/png;base64"
        with image.open(io.BytesIO(base64.b64decode(data, validate=True))) as picture:
            picture.load()
            assert min(picture.size) >= 8


def test_report_escapes_names_and_holds_all_figures(report: str, comparison: Comparison) -> None:
    page = Page(report)
    assert "<b>grey & small</b>" in page.text
    assert "b" not in page.tags
    for row in comparison.rows:
        assert f"{row.distance.mean:.4f} ±" in page.text
    assert "ddpm∗" in page.text
    assert page.tags.count("tr") == 1 + 6 + 1 + 3


def test_report_of_points_shows_clouds_and_leaves_out_metrics_of_images() -> None:
    page = Page(render_report(compare_methods(points_workload(), ["ddim"], [3], reference_steps=6, progress=False)))
    assert page.tags.count("img") == 1 + 2 + 1 + 1
    assert "–" in page.text


def test_report_of_latents_has_no_samples_section() -> None:
    from dataclasses import replace

    workload = replace(images_workload(), latents=images_workload().latents.expand(8, 4, 6, 6).contiguous())
    workload = replace(workload, real=None, encoder=None, classifier=None)
    found = compare_methods(workload, ["ddim"], [3], reference_steps=6, progress=False)
    assert "Samples" not in render_report(found)
    from fastdiff.analysis import Workload

    decoded = replace(workload, decode=lambda samples: samples[:, :3].clamp(-1, 1))
    assert isinstance(decoded, Workload)
    found = compare_methods(decoded, ["ddim"], [3], reference_steps=6, progress=False)
    assert "Samples" in render_report(found)


def test_report_folder_is_made_or_refused(tmp_path: Path) -> None:
    path = check_report_folder(tmp_path / "a" / "b", operation="compare", argument="--out")
    assert path == tmp_path / "a" / "b" / "index.html"
    assert list(path.parent.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"^compare: --out is .*file"):
        check_report_folder(tmp_path / "file", operation="compare", argument="--out")


def test_examples_of_the_documentation_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "analysis.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) == 2
    monkeypatch.chdir(tmp_path)
    exec("\n".join(blocks), {})
    assert "Take dpmsolver++" in capsys.readouterr().out
    assert (tmp_path / "ring.html").stat().st_size > 50_000


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (Debian's package is chromium)")
def test_chromium_shows_report_without_network(comparison: Comparison, tmp_path: Path) -> None:
    page, shot = tmp_path / "index.html", tmp_path / "shot.png"
    write_report(comparison, page, images=4)
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1250,1500"]
    done = subprocess.run(
        [*command, "--host-resolver-rules=MAP * ~NOTFOUND", f"--screenshot={shot}", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    with image.open(shot) as picture:
        colours = {colour: count for count, colour in picture.convert("RGB").getcolors(1 << 20)}
    # The first series of a picture is drawn in this blue, which the style of the page does not use.
    assert colours.get((0x00, 0x72, 0xB2), 0) > 100, "the pictures are shown"
    assert colours[(255, 255, 255)] > 100_000
