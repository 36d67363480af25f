# SPDX-License-Identifier: MIT
"""Files that are written whole or not at all.

The bytes go to a temporary file in the same folder, which then takes the target's place in one operation.  Whatever
happens before that (a full disk, an interrupt) leaves a file that was there as it was, and the temporary is removed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from pathlib import Path

from .errors import error_message


def write_whole(path: str | Path, data: bytes, *, operation: str, argument: str = "the file") -> None:
    """Write a file, or raise and leave what was there.

    A new file gets the permissions of the process' umask, one that is replaced keeps its own.  A symbolic link stays,
    and its target is replaced.  What is no regular file, such as ``/dev/stdout``, is written to.

    Args:
        path: of the file; its folder has to exist.
        data: all of its bytes.
        operation, argument: who asks for it and how the path was named, for messages.

    Raises:
        OSError: it cannot be written; `errno` says why, and the message is one sentence.
    """
    try:
        before = _checked(path)
        if before is None or stat.S_ISREG(before.st_mode):
            _replace(os.path.realpath(path), data, before)
        else:
            with open(path, "wb", buffering=0) as stream:
                _write_all(stream.fileno(), data)
    except OSError as error:
        explained = type(error)(_explanation(error, path, operation, argument))
        explained.errno = error.errno
        raise explained from error


def check_writable(path: str | Path, *, operation: str, argument: str) -> None:
    """Refuse a path that `write_whole` could not write, before the work whose result is to go there.

    Raises:
        ValueError: its folder is missing or read-only, it is a folder itself, or the file is write-protected.
    """
    try:
        before = _checked(path)
        if before is not None and not stat.S_ISREG(before.st_mode):
            return
        # Permissions do not tell of a file system that is mounted read-only: trying does.
        temporary = _temporary_beside(os.path.realpath(path))
        try:
            os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
    except OSError as error:
        raise ValueError(_explanation(error, path, operation, argument)) from error


def _replace(target: str, data: bytes, before: os.stat_result | None) -> None:
    """Write a temporary file and give it the target's place, with the permissions that the target had."""
    temporary = _temporary_beside(target)
    try:
        # The mode is narrowed by the umask, as that of a file that open() makes.
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            if before is not None:
                os.chmod(temporary, stat.S_IMODE(before.st_mode))
            _write_all(descriptor, data)
            os.fsync(descriptor)  # some file systems find out here that they are full
        finally:
            os.close(descriptor)
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def _checked(path: str | Path) -> os.stat_result | None:
    """Return the status of the file that a path leads to, None where there is none, after a look at its permissions."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, "it is a folder")
    if not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, "the file is write-protected")  # replacing it would not ask
    return found


def _temporary_beside(target: str) -> str:
    return os.path.join(os.path.dirname(target), f".fastdiff-{secrets.token_hex(8)}.tmp")


def _write_all(descriptor: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _explanation(error: OSError, path: str | Path, operation: str, argument: str) -> str:
    remedy = "choose another file, or make the folder first and check its permissions"
    if errno.errorcode.get(error.errno or 0) in ("ENOSPC", "EDQUOT"):
        remedy = "free some space, or choose a file on another disk"
    got = f"is {str(path)!r}, which cannot be written: {error.strerror or error}"
    return error_message(operation, argument, got, "a file in a folder that can be written to", remedy)
