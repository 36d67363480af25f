# SPDX-License-Identifier: MIT
"""Checkpoints: whole or not at all, read without running code, back to the bit."""

from __future__ import annotations

import errno
import hashlib
import importlib
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fastdiff.training import checkpoints, load_checkpoint, save_checkpoint
from fastdiff.training.checkpoints import (
    latest_checkpoint,
    list_checkpoints,
    load_optimizer_state,
    optimizer_state,
    read_checkpoint,
    read_state,
    remove_old_checkpoints,
    write_checkpoint,
)
from fastdiff.training.model.from_checkpoint import read_folder


class Tied(nn.Module):
    """Two layers that share their weight, a norm with buffers, and a buffer that is not kept."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("scratch", torch.zeros(2), persistent=False)


def _trained(kind: type[torch.optim.Optimizer], **options: Any) -> tuple[Tied, torch.optim.Optimizer]:
    model = Tied()
    optimizer = kind(model.parameters(), lr=0.1, **options)  # type: ignore[call-arg]
    for _ in range(2):
        optimizer.zero_grad()
        model.norm(model.second(model.first(torch.randn(4, 3)))).square().sum().backward()
        optimizer.step()
    return model, optimizer


def _tensors(model: nn.Module) -> list[torch.Tensor]:
    return list(model.state_dict().values())


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.AdamW, {"fused": True}),
        (torch.optim.AdamW, {"amsgrad": True}),
        (torch.optim.SGD, {"momentum": 0.9}),
        (torch.optim.RMSprop, {}),
    ],
)
def test_checkpoint_restores_model_and_optimizer(
    tmp_path: Path, kind: type[torch.optim.Optimizer], options: dict[str, Any]
) -> None:
    model, optimizer = _trained(kind, **options)
    folder = save_checkpoint(model, optimizer, 3, torch.tensor(0.25), tmp_path / "saved")
    other, other_optimizer = _trained(kind, **options)
    assert load_checkpoint(folder, other, other_optimizer) == {"epoch": 3, "loss": 0.25}
    assert all(torch.equal(a, b) for a, b in zip(_tensors(model), _tensors(other), strict=True))
    assert other.first.weight is other.second.weight
    for trained in ((model, optimizer), (other, other_optimizer)):
        torch.manual_seed(1)
        trained[1].zero_grad()
        trained[0].norm(trained[0].first(torch.randn(4, 3))).square().sum().backward()
        trained[1].step()
    assert all(torch.equal(a, b) for a, b in zip(_tensors(model), _tensors(other), strict=True))


def test_default_path_and_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model, optimizer = _trained(torch.optim.AdamW)
    folder = save_checkpoint(model, optimizer, 7, 1.5)
    assert folder == Path("checkpoint-7")
    assert sorted(path.name for path in folder.iterdir()) == [
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]
    mask = os.umask(0)
    os.umask(mask)
    assert (folder / "model.safetensors").stat().st_mode & 0o777 == 0o666 & ~mask


def _cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])


def _flip(folder: Path, name: str = "model.safetensors") -> None:
    path = folder / name
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def _pickled(folder: Path) -> None:
    torch.save({"a": torch.ones(1)}, folder / "model.safetensors")


def _pickled_alone(folder: Path) -> None:
    (folder / "state.json").unlink()
    (folder / "model.safetensors").unlink()
    (folder / "model.bin").write_bytes(pickle.dumps({"a": 1}))


def _without_state(folder: Path) -> None:
    (folder / "state.json").unlink()


def _cut_state(folder: Path) -> None:
    path = folder / "state.json"
    path.write_text(path.read_text()[:-20])


def _other_version(folder: Path) -> None:
    path = folder / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 2}))


def _missing(folder: Path) -> None:
    (folder / "optimizer.safetensors").unlink()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_cut, "bytes instead of"),
        (_flip, "another content"),
        (_pickled, "pickled objects"),
        (_pickled_alone, "pickled objects"),
        (_without_state, "has no state.json"),
        (_cut_state, "damaged"),
        (_other_version, "version 1"),
        (_missing, "lacks optimizer.safetensors"),
    ],
)
def test_damaged_checkpoint_is_refused_in_one_sentence(
    tmp_path: Path, damage: Callable[[Path], None], reason: str
) -> None:
    model, optimizer = _trained(torch.optim.AdamW)
    folder = save_checkpoint(model, optimizer, 0, 1.0, tmp_path / "saved")
    damage(folder)
    before = [tensor.clone() for tensor in _tensors(model)]
    with pytest.raises(ValueError, match=reason) as refused:
        load_checkpoint(folder, model, optimizer)
    assert str(refused.value).startswith("load_checkpoint: ")
    assert "\n" not in str(refused.value)
    assert all(torch.equal(a, b) for a, b in zip(before, _tensors(model), strict=True))


def test_weights_are_read_without_the_optimizer(tmp_path: Path) -> None:
    model, optimizer = _trained(torch.optim.AdamW)
    expected = [tensor.clone() for tensor in _tensors(model)]
    folder = save_checkpoint(model, optimizer, 0, 1.0, tmp_path / "saved")
    _flip(folder, "optimizer.safetensors")
    with torch.no_grad():
        for tensor in _tensors(model):
            tensor.zero_()
    load_checkpoint(folder, model)
    assert all(torch.equal(a, b) for a, b in zip(expected, _tensors(model), strict=True))
    with pytest.raises(ValueError, match=r"whose optimizer\.safetensors has another content"):
        load_checkpoint(folder, model, optimizer)


def test_pickle_is_not_run(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    for protocol in (2, 4):
        (tmp_path / "model.pt").write_bytes(pickle.dumps(Attack(), protocol=protocol))
        with pytest.raises(ValueError, match="pickled objects"):
            read_checkpoint(tmp_path / "model.pt")
    assert not (tmp_path / "ran").exists()


def test_other_model_or_optimizer_is_refused_and_unchanged(tmp_path: Path) -> None:
    model, optimizer = _trained(torch.optim.AdamW)
    folder = save_checkpoint(model, optimizer, 0, 1.0, tmp_path / "saved")
    wider = nn.Linear(4, 4)
    with pytest.raises(ValueError, match=r"load_checkpoint: model (has|lacks)"):
        load_checkpoint(folder, wider)
    fewer = torch.optim.AdamW([model.first.bias])
    before = [tensor.clone() for tensor in _tensors(model)]
    with torch.no_grad():
        model.first.bias += 1
    with pytest.raises(ValueError, match="load_checkpoint: optimizer has groups"):
        load_checkpoint(folder, model, fewer)
    assert torch.equal(model.first.bias, before[1] + 1)
    with pytest.raises(ValueError, match="no averaged weights"):
        load_checkpoint(folder, model, ema=True)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_checkpoint(tmp_path / "nothing", model)


def test_optimizer_of_another_kind_is_refused(tmp_path: Path) -> None:
    model, optimizer = _trained(torch.optim.SGD, momentum=0.9)
    folder = save_checkpoint(model, optimizer, 0, 1.0, tmp_path / "saved")
    with pytest.raises(ValueError, match="optimizer is a AdamW, expected one with dampening, momentum, nesterov"):
        load_checkpoint(folder, model, torch.optim.AdamW(model.parameters()))


def test_learning_rate_in_a_tensor_is_kept(tmp_path: Path) -> None:
    model = Tied()
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.25))
    folder = save_checkpoint(model, optimizer, 0, 1.0, tmp_path / "saved")
    other = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.5))
    load_checkpoint(folder, model, other)
    assert float(other.param_groups[0]["lr"]) == 0.25


def test_full_disk_keeps_the_last_checkpoint_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = _trained(torch.optim.AdamW)
    folder = save_checkpoint(model, optimizer, 0, 1.0, tmp_path / "saved")
    kept = {path.name: path.read_bytes() for path in folder.iterdir()}
    import safetensors.torch

    whole = safetensors.torch.save_file

    def fill(tensors: Any, path: Any) -> None:
        whole(tensors, path)
        if Path(path).name == "optimizer.safetensors":
            Path(path).write_bytes(b"short")
            from safetensors import SafetensorError

            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as full:
        full.setattr(safetensors.torch, "save_file", fill)
        with pytest.raises(OSError, match=r"No space left on device, .*; free some space") as error:
            save_checkpoint(model, optimizer, 1, 2.0, folder)
    assert error.value.errno == errno.ENOSPC
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == kept
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot be written"):
        save_checkpoint(model, optimizer, 1, 2.0, tmp_path / "file" / "below")


def test_checkpoint_between_two_renames_is_found(tmp_path: Path) -> None:
    model, optimizer = _trained(torch.optim.AdamW)
    folder = save_checkpoint(model, optimizer, 0, 1.0, tmp_path / "saved")
    folder.rename(tmp_path / ".older-saved")
    assert load_checkpoint(folder, model)["epoch"] == 0
    save_checkpoint(model, optimizer, 1, 1.0, folder)
    assert load_checkpoint(folder, model)["epoch"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def _write_step(parent: Path, step: int, value: float) -> None:
    tensors = {"x": torch.full((3,), value)}
    write_checkpoint(parent / f"step-{step:08d}", {"value": value}, {"a": tensors, "b": tensors})


def _before(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, action: Callable[[], None], number: int) -> None:
    """Let `action` run before the call of a number of a function, or before all calls for number 0."""
    real, calls = getattr(module, name), iter(range(1, 1000))

    def wrapped(*args: Any, **options: Any) -> Any:
        if number in (0, next(calls)):
            with monkeypatch.context() as patch:
                patch.setattr(module, name, real)
                action()
        return real(*args, **options)

    monkeypatch.setattr(module, name, wrapped)


@pytest.mark.parametrize(
    ("module", "name", "number"),
    [("model.from_checkpoint", "read_checkpoint", 1), ("checkpoints", "_checksum", 1), ("checkpoints", "_checksum", 2)],
)
@pytest.mark.parametrize("again", [False, True])
def test_reader_gets_a_whole_checkpoint_while_a_training_writes(
    module: str, name: str, number: int, again: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The training removes the chosen checkpoint, or writes it again, before or while its files are read."""
    parent = tmp_path / "checkpoints"
    _write_step(parent, 1, 1.0)

    def train() -> None:
        _write_step(parent, 1 if again else 2, 2.0)
        remove_old_checkpoints(parent, 1)

    target = importlib.import_module(f"fastdiff.training.{module}")
    _before(monkeypatch, target, name, train, number)
    path, found = read_folder(tmp_path)
    assert path.name == ("step-00000001" if again else "step-00000002")
    assert found.state == {"value": 2.0}
    assert all(torch.equal(found.tensors[file]["x"], torch.full((3,), 2.0)) for file in ("a", "b"))
    assert found.digest == hashlib.sha256((path / "state.json").read_bytes()).hexdigest()


@pytest.mark.parametrize("again", [False, True])
def test_checkpoints_that_never_stay_are_refused_in_one_sentence(
    again: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent, steps = tmp_path / "checkpoints", iter(range(2, 100))
    _write_step(parent, 1, 1.0)

    def train() -> None:
        _write_step(parent, 1 if again else next(steps), 2.0)
        remove_old_checkpoints(parent, 1)

    _before(monkeypatch, checkpoints, "_is_pickle", train, 0)
    with pytest.raises(FileNotFoundError, match="was replaced or removed 5 times while it was read, expected"):
        read_folder(tmp_path)
    chosen = parent / "step-00000000"
    with pytest.raises(FileNotFoundError, match="step-00000000', which does not exist"):
        read_folder(chosen)


@pytest.mark.parametrize(
    ("module", "name", "number", "value"),
    [
        (checkpoints, "_checksum", 1, 1.0),
        (checkpoints, "_flush", 1, 1.0),
        (os, "replace", 1, 1.0),
        (os, "replace", 2, 1.0),
        (checkpoints, "_flush", 5, 2.0),
    ],
)
def test_interrupted_write_leaves_a_whole_checkpoint(
    module: Any, name: str, number: int, value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a folder with a space and other letters than ASCII; the last case is after the new one is in place."""
    parent = tmp_path / "ü x"
    _write_step(parent, 1, 1.0)

    def interrupt() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        _before(patch, module, name, interrupt, number)
        with pytest.raises(KeyboardInterrupt):
            _write_step(parent, 1, 2.0)
    assert not list(parent.glob(".partial-*"))
    assert read_folder(f"{parent}/")[1].state == {"value": value}
    remove_old_checkpoints(parent, 1)
    assert [path.name for path in parent.iterdir()] == ["step-00000001"]


def test_reader_between_two_renames_does_not_disturb_the_writer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write_step(tmp_path, 1, 1.0)
    seen: list[Any] = []

    def read() -> None:
        seen.append(read_checkpoint(tmp_path / "step-00000001").state)
        seen.append(read_state(tmp_path / "step-00000001"))

    _before(monkeypatch, os, "replace", read, 2)
    _write_step(tmp_path, 1, 2.0)
    assert seen == [{"value": 1.0}, {"value": 1.0}]
    assert read_checkpoint(tmp_path / "step-00000001").state == {"value": 2.0}
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_only_checkpoints_are_replaced(tmp_path: Path) -> None:
    model, optimizer = _trained(torch.optim.AdamW)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.iterdir())
    for path in (tmp_path, tmp_path / "file"):
        with pytest.raises(FileExistsError, match="holds something else than a checkpoint"):
            save_checkpoint(model, optimizer, 0, 1.0, path)
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "file").read_text() == "mine"
    assert load_checkpoint(save_checkpoint(model, optimizer, 3, 1.0, tmp_path / "empty"), model)["epoch"] == 3


def test_latest_and_old_checkpoints(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "nothing") is None
    for step in (5, 20, 100):
        write_checkpoint(tmp_path / f"step-{step:08d}", {}, {"a": {"x": torch.ones(1)}})
    (tmp_path / ".partial-step-00000200-aa").mkdir()
    (tmp_path / "notes").mkdir()
    assert latest_checkpoint(tmp_path) == tmp_path / "step-00000100"
    remove_old_checkpoints(tmp_path, 2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000020", "step-00000100"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", "step-00000020", "step-00000100"]
    (tmp_path / "step-00000100").rename(tmp_path / ".older-step-00000100")  # the process ended between two renames
    latest = latest_checkpoint(tmp_path)
    assert latest == tmp_path / "step-00000100"
    assert read_checkpoint(latest).tensors["a"]["x"] == 1
    (tmp_path / "step-00000020").rename(tmp_path / ".older-step-00000020")
    remove_old_checkpoints(tmp_path, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", "step-00000100"]


def test_state_of_other_kinds_is_refused() -> None:
    class Odd(torch.optim.SGD):
        def state_dict(self) -> Any:
            return {"state": {0: {"odd": object()}}, "param_groups": []}

    with pytest.raises(TypeError, match="tensors and numbers"):
        optimizer_state(Odd([nn.Parameter(torch.ones(1))]))
    _, optimizer = _trained(torch.optim.AdamW)
    values, tensors = optimizer_state(optimizer)
    load_optimizer_state(optimizer, json.loads(json.dumps(values)), tensors)
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.999)


def test_extra_state_is_refused(tmp_path: Path) -> None:
    class Extra(Tied):
        def get_extra_state(self) -> torch.Tensor:
            return torch.ones(1)

        def set_extra_state(self, state: Any) -> None:
            pass

    model = Extra()
    with pytest.raises(TypeError, match="keeps extra state under '_extra_state'"):
        save_checkpoint(model, torch.optim.SGD(model.parameters(), lr=0.1), 0, 1.0, tmp_path / "saved")


def test_parameters_over_one_storage_are_saved_and_resumed_to_the_bit(tmp_path: Path) -> None:
    """Whole tensors, halves and overlapping parts of one storage, each a parameter object of its own."""

    def make(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        generator = torch.Generator().manual_seed(seed)
        storage, model = torch.randn(6, generator=generator), nn.Module()
        for name, part in (("whole", storage), ("tied", storage), ("tail", storage[3:]), ("middle", storage[1:5])):
            model.register_parameter(name, nn.Parameter(part))
        return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        sum((i + 1) * parameter.square().sum() for i, parameter in enumerate(model.parameters())).backward()  # type: ignore[union-attr]
        optimizer.step()

    model, optimizer = make(0)
    step(model, optimizer)
    folder = save_checkpoint(model, optimizer, 0, 0.0, tmp_path / "saved")
    other, other_optimizer = make(1)
    load_checkpoint(folder, other, other_optimizer)
    for _ in range(2):
        step(model, optimizer)
        step(other, other_optimizer)
        assert all(torch.equal(a, b) for a, b in zip(_tensors(model), _tensors(other), strict=True))
