# SPDX-License-Identifier: MIT
"""Atomic file writes: a file is replaced completely or not at all.

The bytes go to a temporary file in the same folder, which is then renamed to the target in one operation.  If anything
fails before that (a full disk, an interrupt), an existing target is unchanged and the temporary file is removed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from pathlib import Path

from .errors import error_message

_TEMPORARY_PREFIX, _TEMPORARY_SUFFIX = ".fastdiff-", ".tmp"


def write_whole(path: str | Path, data: bytes, *, operation: str, argument: str = "the file") -> None:
    """Write a file atomically; on an error an existing file is unchanged.

    A new file gets the permissions of the process' umask, an existing one keeps its own.  A symbolic link stays, and
    its target is replaced.  Anything that is not a regular file, such as ``/dev/stdout``, is written to directly.

    Args:
        path: path of the file, in an existing folder.
        data: the content.
        operation, argument: the operation and the name of the path argument, for error messages.

    Raises:
        OSError: the file cannot be written; `errno` has the reason, and the message is one sentence.
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


def read_whole(path: str | Path, limit: int, *, operation: str, argument: str = "the file") -> bytes:
    """Return the content of a file, or its first bytes.

    Args:
        path: path of the file.
        limit: the number of bytes to read at most.
        operation, argument: the operation and the name of the path argument, for error messages.

    Raises:
        OSError: the file cannot be read; `errno` has the reason, and the message is one sentence.
    """
    try:
        with open(path, "rb") as stream:
            return stream.read(limit)
    except OSError as error:
        got = f"is {str(path)!r}, which cannot be read: {error.strerror or error}"
        message = error_message(operation, argument, got, "a readable file", "check the path and its permissions")
        explained = type(error)(message)
        explained.errno = error.errno
        raise explained from error


def check_writable(path: str | Path, *, operation: str, argument: str) -> None:
    """Check that `write_whole` could write a path, before the work whose result it will hold.

    Raises:
        ValueError: its folder is missing or read-only, it is a folder itself, or the file is write-protected.
    """
    try:
        before = _checked(path)
        if before is not None and not stat.S_ISREG(before.st_mode):
            return
        # Permissions do not show a read-only file system; creating a file does.
        temporary = _temporary_beside(os.path.realpath(path))
        try:
            os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
    except OSError as error:
        raise ValueError(_explanation(error, path, operation, argument)) from error


def is_temporary(name: str) -> bool:
    """Return True for the name of a temporary file of `write_whole`; a process that was killed leaves one."""
    return name.startswith(_TEMPORARY_PREFIX) and name.endswith(_TEMPORARY_SUFFIX)


def _replace(target: str, data: bytes, before: os.stat_result | None) -> None:
    """Write a temporary file with the target's permissions and rename it to the target."""
    temporary = _temporary_beside(target)
    try:
        # The umask narrows the mode, like for a file that open() creates.
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            if before is not None:
                os.chmod(temporary, stat.S_IMODE(before.st_mode))
            _write_all(descriptor, data)
            os.fsync(descriptor)  # some file systems report a full disk only here
        finally:
            os.close(descriptor)
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def _checked(path: str | Path) -> os.stat_result | None:
    """Return the status of the file at a path, or None if there is none, after checking its type and permissions."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, "it is a folder")
    if not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, "the file is write-protected")  # a rename would ignore that
    return found


def _temporary_beside(target: str) -> str:
    return os.path.join(os.path.dirname(target), f"{_TEMPORARY_PREFIX}{secrets.token_hex(8)}{_TEMPORARY_SUFFIX}")


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
