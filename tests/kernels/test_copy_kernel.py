# SPDX-License-Identifier: MIT
"""The benchmarks' copy kernel copies exactly the requested bytes."""

from __future__ import annotations

import pytest
import torch

from fastdiff import ops
from support.child_environment import child_environment
from support.fork_server import run_program

if ops.backends.extension is None:
    pytest.skip(ops.backends.extension_error, allow_module_level=True)
copy_kernel = ops.backends.extension._copy_kernel


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("offset", [(0, 0), (1, 0), (0, 1), (3, 17), (63, 33)])
def test_copy_kernel_copies_exactly_requested_bytes(streaming: bool, offset: tuple[int, int]) -> None:
    source = torch.randint(0, 256, (5000,), dtype=torch.uint8)
    for size in (*range(70), 127, 128, 129, 255, 256, 257, 300, 511, 1023, 4097):
        target = torch.full((5000,), 77, dtype=torch.uint8)
        at, to = offset
        copy_kernel(source[at : at + size], target[to : to + size], streaming)
        expected = torch.full((5000,), 77, dtype=torch.uint8)
        expected[to : to + size] = source[at : at + size]
        assert torch.equal(target, expected), size


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("size", [262144, 262145, 1 << 20, (1 << 20) + 13])
def test_copy_kernel_parallelizes_large_copies(size: int, threads: int, streaming: bool) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        source = torch.randint(0, 256, (size,), dtype=torch.uint8)
        target = torch.full((size + 2,), 77, dtype=torch.uint8)
        copy_kernel(source, target[1:-1], streaming)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(target[1:-1], source)
    assert target[[0, -1]].tolist() == [77, 77]


@pytest.mark.parametrize("build", ["generic", "avx2", "avx512"])
def test_copy_kernel_of_every_cpu_build(build: str) -> None:
    program = (
        "import torch\n"
        "from fastdiff import _C\n"
        f"assert _C.cpu_build == {build!r}\n"
        "source = torch.randn(1001)\n"
        "for streaming in (False, True):\n"
        "    target = torch.full((1003,), float('nan'))\n"
        "    _C._copy_kernel(source, target[1:-1], streaming)\n"
        "    assert torch.equal(target[1:-1], source)\n"
        "    assert target[[0, -1]].isnan().all()\n"
    )
    done = run_program(program, env=child_environment(FASTDIFF_CPU=build))
    if "one that this processor has" in done.stderr:
        pytest.skip(f"this processor has no {build}")
    assert done.returncode == 0, done.stderr


def test_copy_kernel_copies_rows_in_order() -> None:
    source, target = torch.randn(3, 40), torch.zeros(3, 64)
    copy_kernel(source, target[:, :40], False)
    assert torch.equal(target[:, :40], source)
    assert not target[:, 40:].any()
    again = torch.zeros(40)
    copy_kernel(source[:1].expand(5, 40), again.expand(5, 40), False)
    assert torch.equal(again, source[0])


@pytest.mark.parametrize(
    ("src", "dst", "word"),
    [
        (torch.zeros(4), torch.zeros(5), "shape"),
        (torch.zeros(4), torch.zeros(4, dtype=torch.float64), "Double"),
        (torch.zeros(8)[::2], torch.zeros(4), "laid out"),
        (torch.zeros(2, 2, 2), torch.zeros(2, 2, 2), "laid out"),
    ],
)
def test_copy_kernel_refuses_invalid_arguments(src: torch.Tensor, dst: torch.Tensor, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        copy_kernel(src, dst, False)
