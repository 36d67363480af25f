# SPDX-License-Identifier: MIT
"""Files are written whole or not at all."""

from __future__ import annotations

import errno
import os
import stat
import threading
from pathlib import Path

import pytest

from fastdiff import files
from fastdiff.files import check_writable, write_whole


def write(path: Path, data: bytes = b"new") -> None:
    write_whole(path, data, operation="sample", argument="--out")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_a_new_file_gets_the_umasks_permissions_and_an_old_one_keeps_its_own(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        write(tmp_path / "new")
        (tmp_path / "old").write_bytes(b"old")
        (tmp_path / "old").chmod(0o604)
        write(tmp_path / "old")
    finally:
        os.umask(before)
    assert mode(tmp_path / "new") == 0o666 & ~umask
    assert mode(tmp_path / "old") == 0o604
    assert [path.read_bytes() for path in sorted(tmp_path.iterdir())] == [b"new", b"new"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), OSError(errno.EIO, "broken"), KeyboardInterrupt()])
@pytest.mark.parametrize("place", ["write", "fsync", "replace", "chmod"])
def test_a_failure_at_any_point_leaves_what_was_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, place: str, error: BaseException
) -> None:
    target, sound = tmp_path / "picture.png", getattr(os, place)
    target.write_bytes(b"old")

    def fail(*arguments: object) -> None:
        if place == "write":
            sound(arguments[0], b"ne")  # a part of it is on the disk
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(files.os, place, fail)
        with pytest.raises(type(error)) as raised:
            write(target)
    if isinstance(raised.value, OSError):
        assert raised.value.errno == error.errno  # type: ignore[attr-defined]
        assert str(raised.value).startswith(f"sample: --out is '{target}', which cannot be written: ")
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target], "the temporary is gone"


def test_short_writes_are_gone_on_with(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sound = os.write
    monkeypatch.setattr(files.os, "write", lambda descriptor, data: sound(descriptor, data[:3]))
    write(tmp_path / "file", b"0123456789")
    assert (tmp_path / "file").read_bytes() == b"0123456789"


def test_a_link_stays_and_its_target_is_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    for name in ("there", "dangling"):
        (tmp_path / name).symlink_to(folder / name)
    (folder / "there").write_bytes(b"old")
    for name in ("there", "dangling"):
        check_writable(tmp_path / name, operation="sample", argument="--out")
        write(tmp_path / name)
        assert (tmp_path / name).is_symlink()
        assert (folder / name).read_bytes() == b"new"
    assert len(list(tmp_path.iterdir())) == 3


def test_a_pipe_is_written_to(tmp_path: Path) -> None:
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    write(pipe, b"x" * 300_000)
    reader.join()
    assert read == [b"x" * 300_000]
    assert stat.S_ISFIFO(pipe.stat().st_mode)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_device_is_named_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device, .*; free some space") as full:
        write(tmp_path / "link")
    assert full.value.errno == errno.ENOSPC
    assert stat.S_ISCHR(Path("/dev/full").stat().st_mode)


UNWRITABLE = {
    "a missing folder": "none/x",
    "a folder": "",
    "a file as a folder": "file/x",
    "a loop of links": "loop",
    "too long a name": "x" * 300,
    "no file system for files": "/proc/x",
}


@pytest.mark.parametrize("kind", UNWRITABLE)
def test_what_cannot_be_written_is_refused_before_and_at_writing(tmp_path: Path, kind: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    path = tmp_path / UNWRITABLE[kind]
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"^sample: --out is '.*', which cannot be written: .*; choose another file"):
        check_writable(path, operation="sample", argument="--out")
    with pytest.raises(OSError, match=r"^sample: --out is '.*', which cannot be written: "):
        write(path)
    assert sorted(tmp_path.iterdir()) == before


def test_a_write_protected_file_or_folder_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_bytes(b"old")
    target.chmod(0o444)
    monkeypatch.setattr(files.os, "access", lambda path, wanted: False)  # as it is for everybody but root
    with pytest.raises(ValueError, match="the file is write-protected"):
        check_writable(target, operation="sample", argument="--out")
    with pytest.raises(PermissionError, match="the file is write-protected"):
        write(target)
    assert target.read_bytes() == b"old"
    if os.geteuid() != 0:
        monkeypatch.undo()
        tmp_path.chmod(0o555)
        with pytest.raises(ValueError, match="Permission denied"):
            check_writable(tmp_path / "new", operation="sample", argument="--out")
        tmp_path.chmod(0o755)


def test_checking_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "old").write_bytes(b"old")
    for name in ("old", "new"):
        check_writable(tmp_path / name, operation="sample", argument="--out")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]
