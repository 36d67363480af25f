# SPDX-License-Identifier: MIT
"""Python programs in processes forked from one that has imported torch, which is most of a short program's time.

Run as a program, this module is that process: it reads a request a line and forks for each. A forked process has the
environment of its request, imports fastdiff itself and ends without the interpreter's exit handlers. Variables that
torch reads at its import have the value of the first request's process; programs about them, about the interpreter's
end or about what torch imports need a process of their own.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import IO, Any


@functools.cache
def _server() -> subprocess.Popen[str]:
    environ = {n: value for n, value in os.environ.items() if not n.startswith(("FASTDIFF_", "TRITON_", "PYTHONPATH"))}
    server = subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environ
    )
    atexit.register(server.__exit__, None, None, None)  # closes its pipes and waits
    return server


def run_program(code: str, *, env: dict[str, str], cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run code like ``python -c`` with torch imported, and return its exit status and what it printed."""
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / name for name in ("stdout", "stderr")]
        server.stdin.write(json.dumps([code, env, str(cwd or Path.cwd()), *map(str, paths)]) + "\n")
        server.stdin.flush()
        answer = server.stdout.readline()
        assert answer, f"the server of forks ended with {server.wait()}"
        printed = [path.read_text(encoding="utf-8") for path in paths]
    return subprocess.CompletedProcess([sys.executable, "-c", code], int(answer), *printed)


def run_module(name: str, *arguments: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a module like ``python -m`` with torch imported; see `run_program`."""
    code = f"import runpy, sys; sys.argv[1:] = {list(arguments)}; runpy.run_module({name!r}, run_name='__main__')"
    return run_program(code, env=env)


def _become(request: list[Any], path: list[str]) -> None:
    """Run a request in this process, which ends."""
    code, environ, folder, *outputs = request
    for descriptor, output in zip((1, 2), outputs, strict=True):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT, 0o600), descriptor)
    os.environ.clear()
    os.environ.update(environ)
    os.chdir(folder)
    first = [] if environ.get("PYTHONSAFEPATH") else [""]
    sys.path[:] = [*first, *filter(None, environ.get("PYTHONPATH", "").split(os.pathsep)), *path]
    sys.argv[:] = ["-c"]
    status = 0
    try:
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _serve(requests: IO[str], answers: IO[str]) -> None:
    import torch  # noqa: F401  # what forked processes have without importing it

    path = sys.path[1:]  # without this file's folder
    for line in requests:
        child = os.fork()
        if child == 0:
            _become(json.loads(line), path)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), file=answers, flush=True)


if __name__ == "__main__":
    _serve(sys.stdin, os.fdopen(os.dup(1), "w"))
