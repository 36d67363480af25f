# SPDX-License-Identifier: MIT
"""The benchmarks measure what they say: bytes, rotation, peers, the table. No time is asserted."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import compiled_peer, k_diffusion_peer, torch_noise
from benchmarks.__main__ import main
from benchmarks.cases import GUIDANCE, OPS, Case, seeded
from benchmarks.copying import copies_for, copy_walk, last_level_cache, why_absent
from benchmarks.measure import Rotation, quantiles, ratios
from benchmarks.options import parse
from benchmarks.peers import PEERS, Walk, walks
from benchmarks.traffic import bytes_a_step, tensors_moved
from fastdiff.noise.torch_normals import why_by_torch
from fastdiff.row_layout import Variance
from fastdiff.solvers.affine import HISTORY, MODEL_OUTPUT, NOISE, PREDICTION, SAMPLE
from fastdiff.solvers.table import Row, StepTable

ROOT = Path(__file__).resolve().parents[2]
SMALL = (2, 1, 4, 4)

needs_copy = pytest.mark.skipif(bool(why_absent()), reason=why_absent())


# ---------------------------------------------------------------------------------------------------- bytes to be moved


@pytest.mark.parametrize(
    ("row", "plain", "guided"),
    [
        # Read x and m (and u), write x.
        (Row(0.0, SAMPLE + MODEL_OUTPUT, (1.0, 1.0)), 3, 4),
        # d = p·x + q·m stands for both; a p of 0 leaves x out.
        (Row(0.0, 1.0 * PREDICTION, (1.0, 1.0)), 3, 4),
        (Row(0.0, 1.0 * PREDICTION, (0.0, 1.0)), 2, 3),
        (Row(0.0, SAMPLE + PREDICTION, (1.0, 1.0)), 3, 4),
        # Without the model's output there is nothing to guide.
        (Row(0.0, 2.0 * SAMPLE, (1.0, 1.0)), 2, 2),
        (Row(0.0, SAMPLE + MODEL_OUTPUT + NOISE, (1.0, 1.0)), 4, 5),
        # What is kept is one more output; what it reads counts as well, and once.
        (Row(0.0, SAMPLE + MODEL_OUTPUT, (1.0, 1.0), kept=(1.0 * MODEL_OUTPUT,), slots=(0,)), 4, 5),
        (Row(0.0, 1.0 * MODEL_OUTPUT, (1.0, 1.0), kept=(SAMPLE, SAMPLE + MODEL_OUTPUT), slots=(0, 2)), 5, 6),
    ],
)
def test_tensors_moved_are_those_that_the_row_uses(row: Row, plain: int, guided: int) -> None:
    table = StepTable((row,), drop_unread=False)
    assert tensors_moved(table, 0, guided=False) == plain
    assert tensors_moved(table, 0, guided=True) == guided
    in_kernel = tensors_moved(table, 0, guided=False, noise_in_memory=False)
    assert in_kernel == plain - table.draws_noise[0]


def test_tensors_moved_count_history_and_learned_variance() -> None:
    rows = (
        Row(1.0, SAMPLE + MODEL_OUTPUT, (1.0, 1.0), kept=(SAMPLE, 1.0 * MODEL_OUTPUT), slots=(0, 1)),
        Row(0.0, SAMPLE + HISTORY[0] + HISTORY[1] + NOISE, (1.0, 1.0), kept=(1.0 * HISTORY[0],), slots=(1,)),
    )
    table = StepTable(rows, variance=Variance.LEARNED, drop_unread=False)
    # x, m → x, two kept; then x, two of history, noise and its variance → x, one kept.
    assert [tensors_moved(table, i, guided=False) for i in range(2)] == [5, 7]
    assert bytes_a_step(table, 10, guided=False) == 60.0


@pytest.mark.parametrize(
    ("op", "moved"),
    [
        ("ddim", 4.0),  # x, c, u → x
        (
            "dpmsolver++2m",
            (5 + 17 * 6 + 5 + 4) / 20,
        ),  # the last row is of order 1: it reads and keeps nothing
        ("heun", (19 * 5 + 19 * 5 + 4) / 39),  # keeps the slope, then reads it
        ("ddpm", (19 * 5 + 4) / 20),  # no noise in the last step
    ],
)
def test_bytes_of_known_samplers(op: str, moved: float) -> None:
    assert Case(op, SMALL).bytes_a_step == pytest.approx(moved * 32 * 4)
    assert Case(op, SMALL, "bfloat16").bytes_a_step == pytest.approx(moved * 32 * 2)


def test_noise_drawn_in_the_kernel_is_not_among_the_bytes() -> None:
    op = seeded(OPS["ddpm"])
    assert op.seeded
    table = Case("ddpm", SMALL).table
    assert bytes_a_step(table, 1, guided=True, noise_in_memory=not op.seeded) == 4.0


# --------------------------------------------------------------------------------------------------------- the rotation


@needs_copy
@pytest.mark.parametrize("cache", ["warm", "cold"])
def test_copy_walk_moves_as_many_bytes_as_the_step(cache: str) -> None:
    walk = copy_walk(3000.0, cache, "ordinary")
    src, dst, streaming = walk.advance.args  # type: ignore[attr-defined]
    assert src.shape == dst.shape == (walk.steps, 1500)
    assert not streaming
    reach = src.untyped_storage().nbytes() + dst.untyped_storage().nbytes()
    assert reach < 4096 if cache == "warm" else reach > 2 * last_level_cache()
    walk.advance()


def test_cold_rotation_goes_round_more_than_the_cache_holds() -> None:
    assert copies_for("warm", 1000) == 1
    for footprint in (1000, 1 << 20, 1 << 30):
        assert (copies_for("cold", footprint) - 1) * footprint >= 2 * last_level_cache()
    sets = Case("ddim", SMALL).tensors(4)
    memory = [tensor.data_ptr() for tensors in sets for tensor in tensors]
    assert len(set(memory)) == 12


def test_rotation_takes_turns_across_rounds_and_mixes_rows() -> None:
    visits: list[int] = []
    rotation = Rotation([Walk(lambda i=i: visits.append(i)) for i in range(5)], loop=3)  # type: ignore[misc]
    assert sorted(visits) == [1, 2, 2, 4], "walk i begins at step i of its loop of 3"
    visits.clear()
    for calls in (3, 4, 1):
        rotation.time(calls)
    assert visits == [0, 1, 2, 3, 4, 0, 1, 2]


def test_rotation_of_one_takes_whole_loops() -> None:
    visits: list[int] = []
    rotation = Rotation([Walk(lambda: visits.append(0))], loop=7)
    rotation.calibrate(1e-6)
    visits.clear()
    rotation.time()
    assert len(visits) > 0
    assert len(visits) % 7 == 0


@pytest.mark.parametrize("cache_copies", [1, 3])
@pytest.mark.parametrize("op", OPS)
def test_every_walk_of_fastdiff_has_tensors_of_its_own(op: str, cache_copies: int) -> None:
    case = Case(op, SMALL, steps=4)
    sets = case.tensors(cache_copies)
    made = walks("fastdiff", case, sets)
    assert len(made) == cache_copies
    before = [tensor.clone() for tensors in sets for tensor in tensors]
    for walk in made:
        for _ in range(2 * len(case.table) + 1):
            walk.advance()
    after = [tensor for tensors in sets for tensor in tensors]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), "what a loop starts from is not written"


def test_quantiles_and_ratios() -> None:
    assert quantiles([3.0]) == {"median": 3.0, "p20": 3.0, "p80": 3.0}
    assert quantiles([float(i) for i in range(11)]) == {"median": 5.0, "p20": 2.0, "p80": 8.0}
    assert ratios([4.0, 9.0], [2.0, 3.0]) == [2.0, 3.0]


# ------------------------------------------------------------------------------------------------------------ the peers


@pytest.mark.parametrize("op", OPS)
def test_compiled_formula_takes_the_same_steps(op: str) -> None:
    """Uncompiled, in float64: the peer does the work that it is timed for."""
    case = Case(op, SMALL, "float64", steps=5)
    (tensors,) = case.tensors()
    generator = torch.Generator().manual_seed(0)
    stepper = case.sampler.stepper("reference")
    expected = tensors.sample.clone()
    plans = compiled_peer.plans(case, 1)
    sample, registers = tensors.sample.clone(), {j: torch.zeros_like(expected) for j in range(4)}
    for plan in plans:
        noise = torch.randn(SMALL, generator=generator, dtype=torch.float64) if plan.draws_noise else None
        expected = stepper.step(expected, tensors.cond, uncond=tensors.uncond, guidance_scale=GUIDANCE, noise=noise)
        plain = plan.step._torchdynamo_orig_callable  # type: ignore[attr-defined]
        history, kept = (tuple(registers[j] for j in places) for places in (plan.reads, plan.slots))
        plain(sample, tensors.cond, tensors.uncond, plan.scalars, history, noise, kept)
        torch.testing.assert_close(sample, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("peer", PEERS)
def test_every_peer_walks_or_says_why_not(peer: str) -> None:
    case = Case("dpmsolver++2m", SMALL, steps=4)
    try:
        with torch.no_grad():
            made = walks(peer, case, case.tensors(2))
            for walk in made:
                for _ in range(9 if walk.steps == 1 else 2):
                    walk.advance()
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"{peer}: {error}")
    assert len(made) * made[0].steps in (2, 4)


def test_k_diffusion_is_its_own_code_without_its_training_stack() -> None:
    if importlib.util.find_spec("k_diffusion") is None:
        with pytest.raises(ImportError, match="not installed"):
            k_diffusion_peer.load_sampling.__wrapped__()
        return
    try:
        sampling = k_diffusion_peer.load_sampling()
    except ImportError as error:
        pytest.skip(f"k-diffusion is here, and something that it imports is not: {error}")
    found = importlib.util.find_spec("k_diffusion")
    assert found is not None
    assert found.origin is not None
    assert Path(sampling.__file__ or "").parent == Path(found.origin).parent
    assert set(vars(sampling.utils)) >= {"append_dims"}
    assert "k_diffusion" not in sys.modules
    for op in OPS.values():
        assert op.k_diffusion is None or callable(getattr(sampling, op.k_diffusion[0]))


# ------------------------------------------------------------------------------------------------ the table, the report

TINY = ("--samplers", "ddim", "heun", "--shapes", "2x1x4x4", "--rounds", "2", "--seconds", "0.002")


def test_bench_prints_one_table_and_stores_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich")
    out, picture = tmp_path / "out.json", tmp_path / "out.png"
    arguments = [*TINY, "--caches", "warm", "--peers", "reference", "diffusers", "k-diffusion", "--json", str(out)]
    plotted = importlib.util.find_spec("matplotlib") is not None
    grad, threads = torch.is_grad_enabled(), torch.get_num_threads()
    main([*arguments, "--dtypes", "float32", "bfloat16", *(["--plot", str(picture)] if plotted else [])])
    assert (torch.is_grad_enabled(), torch.get_num_threads()) == (grad, threads)
    text = capsys.readouterr().out
    for word in (
        "op",
        "µs/step",
        "bytes",
        "% of copy",
        "reference",
        "diffusers",
        "ddim",
        "2x1x4x4",
        "bfloat16",
        "warm",
    ):
        assert word in text
    assert "load_average" in text
    assert picture.exists() == plotted

    report = json.loads(out.read_text())
    assert set(report) == {"schema", "conditions", "absent", "results"}
    assert report["schema"] == 2
    assert {"date", "cpu", "cpu_build", "torch", "diffusers", "load_average"} <= set(report["conditions"])
    assert [(line["op"], line["dtype"]) for line in report["results"]] == [
        (op, dtype) for dtype in ("float32", "bfloat16") for op in ("ddim", "heun")
    ]
    for line in report["results"]:
        assert line["shape"] == [2, 1, 4, 4]
        assert line["threads"] == 1
        assert line["cache"] == "warm"
        figures = [*line["microseconds"].values(), *line["over_fastdiff"].values()]
        figures += [line["share_of_copy"]] if line["share_of_copy"] else []
        for figure in figures:
            assert 0 < figure["p20"] <= figure["median"] <= figure["p80"]
        assert set(line["over_fastdiff"]) | set(report["absent"]) >= {"reference", "diffusers", "k-diffusion"}
        assert bool(line["share_of_copy"]) == (not why_absent())


def test_bench_lists_an_absent_peer_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("rich")
    for package in ("diffusers", "k_diffusion"):
        monkeypatch.setitem(sys.modules, package, None)
    k_diffusion_peer.load_sampling.cache_clear()
    main([*TINY, "--caches", "warm", "--peers", "diffusers", "k-diffusion"])
    k_diffusion_peer.load_sampling.cache_clear()
    text = capsys.readouterr().out
    assert "absent: diffusers: " in text
    assert "absent: k-diffusion: " in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--samplers", "nope"), ("--samplers", "'nope'", "ddim")),
        (("--shapes", "8x"), ("--shapes", "'8x'", "2x4x32x32")),
        (("--dtypes", "int8"), ("--dtypes", "bfloat16")),
        (("--threads", "0"), ("--threads is 0", "the cores here")),
        (("--threads", "many"), ("--threads", "many", "--help")),
        (("--caches", "hot"), ("--caches", "cold, warm")),
        (("--peers", "them"), ("--peers", "diffusers")),
        (("--rounds", "0"), ("--rounds is 0", "1 or more")),
        (("--seconds", "-1"), ("--seconds", "more than 0")),
        (("--json", "/no/such/folder/x.json"), ("--json", "/no/such/folder")),
        (("--frobnicate",), ("--frobnicate", "--help")),
    ],
)
def test_bench_refuses_bad_input_in_a_sentence(arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"^bench: .+, expected .+; .+") as refusal:
        parse(arguments, "fastdiff bench")
    for word in words:
        assert word in str(refusal.value)


def test_quick_keeps_what_is_given() -> None:
    options = parse(["--quick", "--rounds", "3"], "fastdiff bench")
    assert options.rounds == 3
    assert len(options.samplers) < len(OPS)


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False, cwd=ROOT)


def test_bench_is_a_command_of_fastdiff() -> None:
    for package in ("typer", "rich"):
        pytest.importorskip(package)
    done = _run("-m", "fastdiff", "bench", *TINY, "--caches", "warm", "--peers", "reference", "--threads", "1")
    assert done.returncode == 0, done.stderr
    assert "% of copy" in done.stdout
    done = _run("-m", "fastdiff", "bench", "--help")
    assert "--base REV" in done.stdout
    for start in (("-m", "fastdiff", "bench"), ("-m", "benchmarks")):
        done = _run(*start, "--rounds", "0")
        assert done.returncode == 2
        assert "--rounds is 0" in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.skipif(bool(why_by_torch()), reason=why_by_torch())
def test_draws_of_torchs_noise_are_timed_both_ways(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    torch_noise.main(
        ["--shapes", "2x16,40", "--threads", "1,2", "--rounds", "3", "--json", str(tmp_path / "times.json")]
    )
    assert torch.get_num_threads() == threads
    lines = json.loads((tmp_path / "times.json").read_text())["lines"]
    assert [(line["shape"], line["threads"]) for line in lines] == [("2x16", 1), ("2x16", 2), ("40", 1), ("40", 2)]
    assert all(line[what]["median"] > 0 for line in lines for what in ("torch", "fastdiff", "times"))
    assert len(capsys.readouterr().out.splitlines()) == 6
