# SPDX-License-Identifier: MIT
"""examples/serve_fastapi.py starts, answers with pictures, and refuses what does not fit with the library's words."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

SERVER = Path(__file__).resolve().parents[2] / "examples" / "serve_fastapi.py"
#: Seconds that the server gets to import torch on a busy machine.
START = 120.0


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen([sys.executable, str(SERVER), "--port", str(port)])
    address = f"http://127.0.0.1:{port}"
    try:
        limit = time.monotonic() + START
        while True:
            assert process.poll() is None, "the server has ended"
            assert time.monotonic() < limit, "the server does not answer"
            try:
                urllib.request.urlopen(f"{address}/openapi.json", timeout=5).close()
                break
            except OSError:
                time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        process.wait(timeout=30)


def _picture(address: str, path: str) -> bytes:
    with urllib.request.urlopen(f"{address}{path}", timeout=60) as answer:
        assert answer.headers["content-type"] == "image/png"
        picture: bytes = answer.read()
    assert picture.startswith(b"\x89PNG")
    return picture


def test_request_gets_the_picture_of_its_seed(address: str) -> None:
    first = _picture(address, "/digits/7?seed=3&steps=4")
    assert _picture(address, "/digits/7?seed=3&steps=4") == first
    assert _picture(address, "/digits/7?seed=4&steps=4") != first
    assert _picture(address, "/digits/7?seed=3&steps=4&method=ddim") != first


@pytest.mark.parametrize(
    ("path", "word"),
    [("/digits/12", "encoder_hidden_states"), ("/digits/1?method=best", "method"), ("/digits/1?steps=0", "steps")],
)
def test_arguments_that_do_not_fit_are_refused(address: str, path: str, word: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(f"{address}{path}", timeout=60)
    assert caught.value.code == 422
    assert word in json.loads(caught.value.read())["detail"]
