# SPDX-License-Identifier: MIT
"""Checkpoints: folders of safetensors and JSON, written whole or not at all, read without running code.

A checkpoint is a folder with ``state.json`` and one safetensors file for each set of tensors (``model``, ``ema``,
``optimizer``, ``text_encoder``).  It is written under another name, flushed to the disk and renamed, so a folder with
the name of a checkpoint is complete; ``state.json`` has the size and checksum of each file, which are compared when it
is read.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import zlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import error_message, require
from .state_tensors import (
    check_same_tensors,
    load_module_tensors,
    load_optimizer_state,
    module_tensors,
    optimizer_state,
)

_FORMAT, _VERSION = "fastdiff checkpoint", 1
_STATE = "state.json"
_NAME = re.compile(r"step-(\d{8,})")
_PARTIAL, _OLDER = ".partial-", ".older-"
#: Times that a checkpoint which a training replaces or removes meanwhile is looked for and read.
ATTEMPTS = 5
_REMEDY = "take an earlier checkpoint, or train again"


class Checkpoint(NamedTuple):
    """What a checkpoint holds.

    Attributes:
        state: JSON values.
        tensors: by file, without its ending, and name.
        digest: SHA-256 of ``state.json``, which has the checksums of all tensors.
    """

    state: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]
    digest: str


def write_checkpoint(folder: str | Path, state: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Tensor]]) -> Path:
    """Write a checkpoint whole: on an error there is no new folder, and an old one of that name is as it was.

    Args:
        folder: of the checkpoint; its parent is made if it is missing.
        state: values of standard JSON.
        tensors: by file, without its ending, and name; on any device, contiguous or not.  Those that share storage are
            written as copies.

    Raises:
        OSError: it cannot be written (a full disk, a read-only folder), or something else than a checkpoint is there,
            which is never replaced; the message is one sentence.
    """
    target = Path(folder).absolute()
    if target.exists() and not is_checkpoint(target) and not (target.is_dir() and not any(target.iterdir())):
        got = f"is {str(target)!r}, which holds something else than a checkpoint"
        remedy = "name a folder that does not exist yet"
        raise FileExistsError(error_message("save_checkpoint", "path", got, "a new folder or a checkpoint", remedy))
    partial = target.with_name(f"{_PARTIAL}{target.name}-{secrets.token_hex(4)}")
    library = require("safetensors.torch", "training", "save_checkpoint")
    try:
        partial.mkdir(parents=True)
        files = {}
        for name, named in tensors.items():
            path = partial / f"{name}.safetensors"
            library.save_file(_in_own_storage(named), path)
            # safetensors makes files that their owner alone can read; the umask of the process should decide.
            path.chmod(0o666 & ~_umask())
            files[path.name] = {"bytes": path.stat().st_size, "crc32": _checksum(path)}
        document = {"format": _FORMAT, "version": _VERSION, "files": files, "state": dict(state)}
        (partial / _STATE).write_text(json.dumps(document, allow_nan=False, indent=1) + "\n", encoding="utf-8")
        for path in partial.iterdir():
            _flush(path)
        _flush(partial)
        _put_in_place(partial, target)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
            raise _write_error(error, target) from error
        raise
    return Path(folder)


def read_checkpoint(folder: str | Path, *, without: Collection[str] = ()) -> Checkpoint:
    """Read a checkpoint, after its files' sizes and checksums have been compared; nothing on the disk is changed.

    A training may write the checkpoint again meanwhile: what is read is one or the other.

    Args:
        folder: of the checkpoint.
        without: files, without their ending, whose content is not read; their size is compared all the same.  The state
            of an optimizer is twice the model, and sampling has no use for it.

    Raises:
        FileNotFoundError: there is none, or it was removed or replaced again and again while it was read.
        ValueError: it is damaged, is no such folder, or holds pickled objects, which are never read.
    """
    path = Path(folder)
    for _ in range(ATTEMPTS):
        place = _present(path)
        begun = _identity(place)
        try:
            found = _read_files(path, place, without)
        except (OSError, ValueError):
            if (place, begun) == (_present(path), _identity(_present(path))):
                raise
        else:
            # Files of two checkpoints, if the folder is another one now; moved or removed, it was read before that.
            if _identity(_present(path)) in (begun, None):
                return found
    raise unsteady(path)


def unsteady(path: Path) -> FileNotFoundError:
    """Return the error of a checkpoint that a training replaces or removes whenever it is read."""
    got = f"is {str(path)!r}, whose checkpoint was replaced or removed {ATTEMPTS} times while it was read"
    remedy = "let the training keep more checkpoints, or write them less often"
    return FileNotFoundError(error_message("load_checkpoint", "path", got, "a checkpoint that stays", remedy))


def _read_files(path: Path, place: Path, without: Collection[str]) -> Checkpoint:
    """Read the checkpoint `path` from the folder where it is at present."""
    if not place.exists():
        got = f"is {str(path)!r}, which does not exist"
        raise FileNotFoundError(
            error_message("load_checkpoint", "path", got, "a checkpoint's folder", "check the path")
        )
    if place.is_file() or not (place / _STATE).is_file():
        pickled = [file for file in ([place] if place.is_file() else sorted(place.iterdir())) if _is_pickle(file)]
        if pickled:
            got = f"is {str(pickled[0])!r}, which holds pickled objects, that can run code when they are read"
            remedy = "save its tensors with save_checkpoint where you trust the file"
        else:
            got, remedy = f"is {str(path)!r}, which has no {_STATE}", "name the folder that save_checkpoint made"
        raise ValueError(error_message("load_checkpoint", "path", got, "a folder of safetensors and JSON", remedy))
    library = require("safetensors.torch", "training", "load_checkpoint")
    text = (place / _STATE).read_bytes()
    files, state = _read_document(path, text)
    tensors = {}
    for name, expected in files.items():
        file = place / Path(name).name
        if not file.is_file():
            raise _refused(path, f"which lacks {name}")
        if _is_pickle(file):
            raise _refused(path, f"whose {name} holds pickled objects, that can run code when they are read")
        size = file.stat().st_size
        if size != expected["bytes"]:
            raise _refused(path, f"whose {name} has {size} bytes instead of {expected['bytes']}")
        if file.stem in without:
            continue
        if _checksum(file) != expected["crc32"]:
            raise _refused(path, f"whose {name} has another content than was written")
        tensors[file.stem] = library.load_file(file)
    return Checkpoint(state, tensors, hashlib.sha256(text).hexdigest())


def is_checkpoint(folder: str | Path) -> bool:
    """Return True for the folder of a checkpoint."""
    return (Path(folder) / _STATE).is_file()


def read_state(folder: str | Path) -> dict[str, Any]:
    """Return the JSON values of a checkpoint, without a look at its tensors.

    Raises:
        OSError, ValueError: there is no ``state.json``, or it is damaged.
    """
    path = Path(folder)
    return _read_document(path, (_present(path) / _STATE).read_bytes())[1]


def checkpoint_folder(parent: str | Path, step: int) -> Path:
    """Return the folder of the checkpoint of a step."""
    return Path(parent) / f"step-{step:08d}"


def list_checkpoints(parent: str | Path) -> list[Path]:
    """Return the checkpoints in a folder, by step; also one that `read_checkpoint` finds between two renames."""
    path = Path(parent)
    names = {entry.name.removeprefix(_OLDER) for entry in path.iterdir()} if path.is_dir() else set()
    found = [(int(match[1]), path / match[0]) for name in names if (match := _NAME.fullmatch(name))]
    return [entry for _, entry in sorted(found)]


def latest_checkpoint(parent: str | Path) -> Path | None:
    """Return the checkpoint of the latest step in a folder; None if there is none."""
    found = list_checkpoints(parent)
    return found[-1] if found else None


def remove_old_checkpoints(parent: str | Path, keep: int) -> None:
    """Remove all but the latest checkpoints of a folder, and what interrupted writes have left there."""
    found = list_checkpoints(parent)
    for each in found:
        if each.exists():
            shutil.rmtree(_older(each), ignore_errors=True)
        else:  # the process ended between two renames
            os.replace(_older(each), each)
    for old in found[:-keep]:
        # Renamed first: an interrupted removal leaves nothing that looks like a checkpoint.
        gone = old.with_name(f"{_PARTIAL}{old.name}-removed")
        shutil.rmtree(gone, ignore_errors=True)
        os.replace(old, gone)
    for partial in Path(parent).glob(f"{_PARTIAL}*"):
        shutil.rmtree(partial, ignore_errors=True)


def save_checkpoint(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    epoch: int,
    loss: float | Tensor,
    path: str | Path | None = None,
) -> Path:
    """Write model, optimizer, epoch and loss as a checkpoint, whole or not at all.

    Args:
        model: its parameters and kept buffers are written.
        optimizer: any of torch's whose state is tensors and numbers.
        epoch, loss: numbers to find again.
        path: the folder to make; None for ``checkpoint-<epoch>`` in the current folder.

    Returns:
        the folder.

    Raises:
        OSError: it cannot be written; what was there is unchanged.
        TypeError: model or optimizer keep something that is no tensor or number.
    """
    values, tensors = optimizer_state(optimizer)
    state = {"epoch": int(epoch), "loss": float(loss), "optimizer": values}
    folder = Path(f"checkpoint-{epoch}") if path is None else Path(path)
    return write_checkpoint(folder, state, {"model": module_tensors(model), "optimizer": tensors})


def load_checkpoint(
    path: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None, *, ema: bool = False
) -> dict[str, Any]:
    """Load a checkpoint of `save_checkpoint` or of a trainer into a model and an optimizer, in place.

    Args:
        path: the checkpoint's folder.
        model: as it was when it was saved; wrappers of other libraries taken off.
        optimizer: made over the same parameters, or None.
        ema: take the averaged weights, for sampling.

    Returns:
        the checkpoint's numbers: ``epoch``, ``loss``, and ``step`` where a trainer wrote it.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged or pickled, or belongs to another model; model and optimizer are unchanged.
    """
    found = read_checkpoint(path, without=() if optimizer is not None else ("optimizer",))
    name = "ema" if ema else "model"
    if name not in found.tensors:
        got, remedy = f"is {str(path)!r}, which has no averaged weights", "pass ema=False"
        raise ValueError(error_message("load_checkpoint", "path", got, "a checkpoint with ema.safetensors", remedy))
    check_same_tensors(module_tensors(model), found.tensors[name], "load_checkpoint", "model")
    if optimizer is not None:
        load_optimizer_state(optimizer, found.state["optimizer"], found.tensors["optimizer"])
    load_module_tensors(model, found.tensors[name], "load_checkpoint", "model")
    return {key: found.state[key] for key in ("epoch", "loss", "step") if key in found.state}


def _read_document(path: Path, text: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return ``files`` and ``state`` of the JSON of the checkpoint `path`."""
    try:
        document = json.loads(text.decode("utf-8"))
        if isinstance(document, dict) and (document.get("format"), document.get("version")) == (_FORMAT, _VERSION):
            return document["files"], document["state"]
    except (ValueError, KeyError) as error:
        raise _refused(path, f"whose {_STATE} is damaged ({type(error).__name__})") from error
    raise _refused(path, f"whose {_STATE} is not of {_FORMAT!r}, version {_VERSION}")


def _in_own_storage(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return contiguous tensors, copied where one before shares their storage, which safetensors refuses."""
    found: dict[str, Tensor] = {}
    seen: set[tuple[torch.device, int]] = set()
    for name, value in named.items():
        tensor = value.detach().contiguous()
        place = tensor.device, tensor.untyped_storage().data_ptr()
        found[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return found


def _put_in_place(partial: Path, target: Path) -> None:
    """Rename a complete folder to its name; an older folder there is moved aside first and then removed."""
    older = _older(target)
    replaces = target.exists()
    if replaces:
        shutil.rmtree(older, ignore_errors=True)
        os.replace(target, older)
    try:
        os.replace(partial, target)
    except BaseException:
        if replaces:
            os.replace(older, target)
        raise
    _flush(target.parent)
    shutil.rmtree(older, ignore_errors=True)


def _older(target: Path) -> Path:
    """Return the name of a folder between the two renames that replace it; `read_checkpoint` finds it there."""
    return target.with_name(f"{_OLDER}{target.name}")


def _present(path: Path) -> Path:
    """Return the folder where a checkpoint is at present, which between two renames has another name.

    It stays there: a reader that renamed it would stop the training which is about to.
    """
    older = _older(path) if path.name else path
    return older if not path.exists() and older.is_dir() else path


def _identity(place: Path) -> tuple[int, int] | None:
    """Return numbers that differ for two folders of one name; None where there is none."""
    try:
        found = place.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def _flush(path: Path) -> None:
    """Wait until a file or a folder's entries are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            value = zlib.crc32(block, value)
    return value


def _is_pickle(path: Path) -> bool:
    """Return True for a file of `torch.save` (a zip archive or a plain pickle)."""
    with contextlib.suppress(OSError), path.open("rb") as stream:
        return stream.read(4)[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
    return False


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _refused(path: Path, why: str) -> ValueError:
    got = f"is {str(path)!r}, {why}"
    return ValueError(error_message("load_checkpoint", "path", got, "a checkpoint as it was written", _REMEDY))


def _write_error(error: BaseException, target: Path) -> OSError:
    """Return an error of safetensors or of the system as an OSError with one sentence."""
    text = str(error)
    found = re.search(r"os error (\d+)", text)
    number = error.errno if isinstance(error, OSError) else int(found[1]) if found else errno.EIO
    reason = os.strerror(number or errno.EIO)
    full = errno.errorcode.get(number or 0) in ("ENOSPC", "EDQUOT", "EFBIG")
    remedy = "free some space, or choose a folder on another disk" if full else "choose a folder that can be written to"
    got = f"is {str(target)!r}, which cannot be written: {reason}"
    explained = OSError(error_message("save_checkpoint", "path", got, "a folder with enough space", remedy))
    explained.errno = number
    return explained
