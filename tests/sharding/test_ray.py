# SPDX-License-Identifier: MIT
"""Jobs on Ray: the files of one process, errors of workers with their type, and a clean end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fastdiff.sharding import ShardJob, on_ray, sample_shards
from support.child_environment import child_environment
from support.shard_jobs import Drawn, Refuses, tree

PROGRAM = """
import sys
from pathlib import Path

import ray
import ray.data

from fastdiff.sharding import sample_shards_on_ray
from support.shard_jobs import Drawn, Refuses

ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
folder = Path(sys.argv[1])
try:
    sample_shards_on_ray(Refuses(), folder / "refused", 6, batch_size=2, workers=2, progress=False)
except ValueError as error:
    print("error:", error)
report = sample_shards_on_ray(Drawn(coupled=True), folder / "ray", 11, batch_size=2, workers=2, progress=False)
print("report:", report.drawn, report.skipped, report.remade, report.images, report.manifest.name)
print("connected:", ray.is_initialized(), "bars:", ray.data.DataContext.get_current().enable_progress_bars)
ray.shutdown()
"""


@pytest.mark.slow
def test_two_workers_leave_the_files_of_one_process(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    pytest.importorskip("pyarrow")
    pytest.importorskip("PIL")
    environment = child_environment(RAY_USAGE_STATS_ENABLED="0", RAY_DATA_LOG_LEVEL="ERROR")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        env=environment, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # Ray may report on the same stream that it killed the workers of the job that failed.
    ours = ("error:", "report:", "connected:")
    error, *lines = [line for line in done.stdout.splitlines() if line.startswith(ours)]
    assert error in {f"error: drawn: {ids}" for ids in ([0, 1], [2, 3], [4, 5])}
    assert lines == ["report: 6 0 0 11 manifest.json", "connected: True bars: True"]
    sample_shards(Drawn(coupled=True), tmp_path / "one", 11, batch_size=2, rank=0, world_size=1, progress=False)
    assert tree(tmp_path / "ray") == tree(tmp_path / "one")
    assert not list(tmp_path.glob("refused/records/*"))


class FakeRay(SimpleNamespace):
    """Notes calls of `init` and `shutdown`."""

    def __init__(self, connected: bool = False, error: Exception | None = None, **resources: float) -> None:
        super().__init__(connected=connected, error=error, resources=resources, calls=[])

    def is_initialized(self) -> bool:
        return self.connected

    def init(self, **arguments: Any) -> None:
        self.calls.append(arguments)
        if self.error is not None:
            raise self.error

    def shutdown(self) -> None:
        self.calls.append("shutdown")

    def cluster_resources(self) -> dict[str, float]:
        return self.resources


def test_connection_made_here_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_USAGE_STATS_ENABLED", raising=False)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "")  # restored at the end of the test
    monkeypatch.delenv("RAY_USAGE_STATS_ENABLED")
    ray = FakeRay()
    with pytest.raises(KeyError), on_ray._connected(ray, "local", 2):
        raise KeyError
    assert ray.calls[0]["num_cpus"] == 2
    assert ray.calls[0]["include_dashboard"] is False
    assert ray.calls[1:] == ["shutdown"]
    ray = FakeRay(connected=True)
    with on_ray._connected(ray, "auto", 2):
        pass
    assert ray.calls == [], "the caller's connection is used and stays"


def test_absent_cluster_is_one_sentence() -> None:
    ray = FakeRay(error=ConnectionError("nobody answers"))
    with (
        pytest.raises(ConnectionError, match=r"^sample_shards: address is '10.0.0.1:1', .*nobody answers.*ray start"),
        on_ray._connected(ray, "10.0.0.1:1", None),
    ):
        pytest.fail("there is no cluster")
    assert "shutdown" not in ray.calls


@pytest.mark.parametrize(
    ("workers", "gpus", "resources", "count"),
    [
        (None, 0, {"CPU": 8.0}, 8),
        (None, 0, {"CPU": 64.0}, 10),  # no more than batches
        (3, 0, {"CPU": 8.0}, 3),
        (None, 1, {"CPU": 8.0, "GPU": 4.0}, 4),
        (None, 0.5, {"CPU": 8.0, "GPU": 3.0}, 6),
        (9, 0, {"CPU": 8.0}, None),
        (None, 1, {"CPU": 8.0}, None),
    ],
)
def test_worker_count_fits_the_cluster(
    workers: int | None, gpus: float, resources: dict[str, float], count: int | None
) -> None:
    ray, job = FakeRay(**resources), ShardJob(20, 2)
    if count is None:
        with pytest.raises(RuntimeError, match=r"where the cluster has room for [08]"):
            on_ray._worker_count(ray, job, workers, gpus)
    else:
        assert on_ray._worker_count(ray, job, workers, gpus) == count


def test_missing_ray_names_its_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"sample_shards: the package 'ray' .*fastdiff-kernels\[ray\]"):
        on_ray.sample_shards_on_ray(Refuses(), tmp_path / "new", 2)
    assert not list(tmp_path.iterdir())
