# SPDX-License-Identifier: MIT
"""What goes to a device: nothing is copied where it is there, and copies of a table bring their own."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from fastdiff import create_sampler
from fastdiff import device_copy as transfer
from fastdiff.device_copy import OnDevice, to_device


def test_tensor_that_is_there_is_the_callers_own() -> None:
    x = torch.randn(3)
    assert to_device(x, "cpu") is x
    assert OnDevice(x, x.device).get() is x


def test_host_memory_goes_to_cuda_pinned_and_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU no more can be seen than which copy is asked for."""
    asked: list[str] = []

    class Host:
        device = torch.device("cpu")

        def pin_memory(self) -> Host:
            asked.append("pinned")
            return self

        def to(self, device: torch.device, non_blocking: bool = False) -> Host:
            asked.append(f"{device} {non_blocking}")
            return self

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    to_device(Host(), "cuda:1")  # type: ignore[arg-type]
    assert asked == ["pinned", "cuda:1 True"]
    # A graph would read the pinned memory again: torch's own copy refuses to be captured.
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    to_device(Host(), "cuda:1")  # type: ignore[arg-type]
    assert asked[2:] == ["cuda:1 False"]


def test_copies_of_a_table_leave_its_rows_on_devices_behind() -> None:
    table = create_sampler("linear", "ddim", num_inference_steps=3, thresholding=True).table
    for prediction in (False, True):
        rows = table.shared_coefficients(torch.float16, torch.device("cpu"), prediction=prediction)
        assert rows is table.shared_coefficients(torch.float32, torch.device("cpu"), prediction=prediction)
        assert torch.equal(rows, (table.prediction_rows() if prediction else table.coefficients).float())
    for other in (copy.copy(table), copy.deepcopy(table), pickle.loads(pickle.dumps(table))):
        assert other == table
        assert torch.equal(other.coefficients, table.coefficients)
        assert not other._shared
        assert torch.equal(other.shared_coefficients(torch.float32, torch.device("cpu")), table.coefficients.float())
    assert len(table._shared) == 2


@pytest.mark.gpu
def test_tensor_brought_on_one_stream_is_there_on_another() -> None:
    values = torch.arange(5, dtype=torch.float64)
    first, second = torch.cuda.Stream(), torch.cuda.Stream()
    with torch.cuda.stream(first):
        torch.cuda._sleep(1_000_000_000)
        there = transfer.OnDevice(values, torch.device("cuda"))
    with torch.cuda.stream(second):
        doubled = there.get() * 2
    torch.cuda.synchronize()
    assert torch.equal(doubled.cpu(), values * 2)
