# SPDX-License-Identifier: MIT
"""Comparison of this checkout with another commit, which is checked out and built in a temporary worktree.

This version of the benchmark measures both, each in its own process. The two processes alternate round by round, so
that a change of the machine's speed affects both. Several pairs of processes are started, because the placement in
memory differs between processes and is part of the spread.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fastdiff
from fastdiff.errors import error_message

from .cases import Case
from .options import cases
from .timing import quantiles, ratios

#: The name by which the processes import this folder: `benchmarks` would find a checkout's own folder.
ALIAS = "fastdiff_bench"


def compare(options: Any, report: dict[str, Any]) -> None:
    """Add a line per case to the report: both medians and their ratio, or why one side lacks the case."""
    root = checkout()
    commit = resolve(root, options.base)
    report["base"], report["base_commit"] = options.base, commit
    rounds = max(1, options.rounds // options.processes)
    samples: dict[tuple[Case, int, str], dict[str, list[float]]] = {}
    absent: dict[tuple[Case, int, str], str] = {}
    with (
        tempfile.TemporaryDirectory(prefix="fastdiff-bench-") as folder,
        checked_out(root, commit, Path(folder)) as tree,
    ):
        print(f"building {options.base} ({commit[:10]})", file=sys.stderr, flush=True)
        extension = same_extension(root, commit)
        if extension is not None:
            shutil.copy2(extension, tree / "fastdiff")
        else:
            build(tree)
        names = Path(folder) / "names"
        names.mkdir()
        (names / ALIAS).symlink_to(Path(__file__).resolve().parent)
        for number in range(options.processes):
            print(f"processes {number + 1} of {options.processes}", file=sys.stderr, flush=True)
            with Worker(root, names) as this, Worker(tree, names) as base:
                sides = {"this": this, "base": base}
                for key in _keys(options):
                    if key in absent:
                        continue
                    reason = _prepare(sides, key, options.seconds / options.rounds)
                    if reason:
                        absent[key] = reason
                        continue
                    taken = samples.setdefault(key, {"this": [], "base": []})
                    for turn in range(rounds):
                        for side in ("this", "base") if turn % 2 == 0 else ("base", "this"):
                            taken[side].append(sides[side].ask(do="time")["microseconds"])
    report["results"] = [_line(key, samples.get(key), absent.get(key)) for key in _keys(options)]


def _keys(options: Any) -> list[tuple[Case, int, str]]:
    return [
        (case, threads, cache) for threads in options.threads for case in cases(options) for cache in options.caches
    ]


def _prepare(sides: dict[str, Worker], key: tuple[Case, int, str], seconds: float) -> str:
    case, threads, cache = key
    order = {"op": case.op, "shape": case.shape, "dtype": case.dtype, "threads": threads, "cache": cache}
    for side, worker in sides.items():
        answer = worker.ask(do="prepare", seconds=seconds, **order)
        if "absent" in answer:
            return f"{side} code: {answer['absent']}"
    return ""


def _line(key: tuple[Case, int, str], taken: dict[str, list[float]] | None, absent: str | None) -> dict[str, Any]:
    case, threads, cache = key
    line: dict[str, Any] = {
        "op": case.op,
        "shape": list(case.shape),
        "dtype": case.dtype,
        "threads": threads,
        "cache": cache,
        "microseconds": {},
    }
    if taken is None:
        return {**line, "absent": absent}
    line["microseconds"] = {side: quantiles(values) for side, values in taken.items()}
    return {**line, "base_over_this": quantiles(ratios(taken["base"], taken["this"]))}


class Worker:
    """Process that measures the fastdiff in `tree`."""

    def __init__(self, tree: Path, names: Path) -> None:
        paths = [str(names), str(tree), *filter(None, [os.environ.get("PYTHONPATH")])]
        environ = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"{ALIAS}.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environ,
            cwd=names,  # `python -m` searches the current folder first, which must not contain fastdiff
        )
        answer = self._answer()
        if not Path(answer["fastdiff"]).resolve().is_relative_to(tree.resolve()):
            self._process.kill()
            raise RuntimeError(f"bench: --base imported {answer['fastdiff']}, expected fastdiff from {tree}")

    def ask(self, **order: Any) -> dict[str, Any]:
        """Send an order and return its answer."""
        assert self._process.stdin is not None
        print(json.dumps(order), file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            raise RuntimeError(
                error_message(
                    "bench",
                    "--base",
                    f"started a process that ended with status {code}",
                    "one that measures",
                    "read its message above; a commit from before the step tables cannot be measured",
                )
            )
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


def checkout() -> Path:
    """Return the root of the git checkout that this fastdiff is imported from.

    Raises:
        RuntimeError: it is not imported from a checkout.
    """
    root = Path(fastdiff.__file__).resolve().parents[1]
    top = _git(root, "rev-parse", "--show-toplevel") if (root / "setup.py").is_file() else None
    if top is None or top.returncode != 0 or Path(top.stdout.strip()).resolve() != root:
        raise RuntimeError(
            error_message(
                "bench",
                "--base",
                f"was given while fastdiff is imported from {root}",
                "a git checkout of fastdiff, which has the other commit",
                "clone the repository and run it there",
            )
        )
    return root


def resolve(root: Path, revision: str) -> str:
    """Return the commit hash of a revision.

    Raises:
        ValueError: there is no such revision.
    """
    done = _git(root, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
    if done.returncode != 0:
        raise ValueError(
            error_message(
                "bench", "--base", f"is {revision!r}", "a commit, branch or tag of this checkout", "see git log"
            )
        )
    return done.stdout.strip()


@contextmanager
def checked_out(root: Path, commit: str, folder: Path) -> Iterator[Path]:
    """Check a commit out into a worktree in `folder`; remove the worktree on exit."""
    tree = folder / "tree"
    done = _git(root, "worktree", "add", "--detach", str(tree), commit)
    if done.returncode != 0:
        raise RuntimeError(
            error_message("bench", "--base", f"cannot be checked out ({done.stderr.strip()})", "room for a worktree",
                     "read git's message")
        )  # fmt: skip
    try:
        yield tree
    finally:
        _git(root, "worktree", "remove", "--force", str(tree))


def same_extension(root: Path, commit: str) -> Path | None:
    """Return this checkout's extension where the commit has the same sources for it; None where it has to be built."""
    sources = ("csrc", "setup.py")
    unchanged = (
        _git(root, "diff", "--quiet", commit, "--", *sources).returncode == 0
        and not _git(root, "status", "--porcelain", "--", *sources).stdout.strip()
    )
    built = sorted((root / "fastdiff").glob("_C*.so"))
    return built[0] if unchanged and len(built) == 1 else None


def build(tree: Path) -> None:
    """Compile the extension of a checkout in place.

    Raises:
        RuntimeError: it does not compile.
    """
    done = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"],
        cwd=tree,
        env={**os.environ, "FASTDIFF_BUILD": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        last = "\n".join((done.stdout + done.stderr).splitlines()[-20:])
        raise RuntimeError(
            error_message(
                "bench", "--base", "does not build", "a commit that compiles here", f"read its messages:\n{last}"
            )
        )


def _git(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise RuntimeError(
            error_message("bench", "--base", "needs git", "git on PATH", "install it, or leave --base away")
        ) from error
