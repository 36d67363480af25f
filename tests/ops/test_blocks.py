# SPDX-License-Identifier: MIT
"""New outputs on the CPU: ordinary tensors in memory that is reused by one of them at a time."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastdiff
from fastdiff import ops
from fastdiff.ops import backends, memory
from support.child_environment import child_environment
from support.fork_server import run_program
from support.oracle import DTYPES, plain_row

if backends.extension is None:
    pytest.skip(backends.extension_error, allow_module_level=True)
extension = backends.extension

MIB = 1 << 20
#: By what such a build is known from here: it keeps nothing unless it is told to.
SANITIZED = memory.kept_memory_limit() == 0 and not os.environ.get("FASTDIFF_KEEP_MIB")


@pytest.fixture(autouse=True)
def empty_lists() -> Iterator[None]:
    """Start each test with an empty cache and the default limit; with sanitizers nothing is cached."""
    before = memory.kept_memory_limit()
    gc.collect()  # what other tests have left in circles is not to come back in the middle of one
    extension.limit_kept_memory(256 * MIB)
    yield
    extension.limit_kept_memory(before)


def doubled(x: Tensor, keeps: int = 0) -> tuple[Tensor, ...]:
    """Return 2x, and on request 3x and 4x, as new outputs of a step."""
    row = plain_row(x.dtype, prev_x=2.0, k0_x=3.0, k1_x=4.0)
    made: tuple[Tensor, ...] = ops.step(x, x, row, 0, keeps=keeps)
    return made


def in_fork(program: str, mib: str) -> subprocess.CompletedProcess[str]:
    """Run a program that shares torch's import, with this limit."""
    return run_program(program, env=child_environment(FASTDIFF_BACKEND="", FASTDIFF_KEEP_MIB=mib))


def run(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program],
        env=child_environment(**{"FASTDIFF_BACKEND": "", "FASTDIFF_KEEP_MIB": "", **environment}),
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip


# --- Reuse -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("elements", [1, 1000, 16384, MIB])
def test_freed_memory_is_reused_for_equal_size(elements: int) -> None:
    x = torch.randn(elements)
    (made,) = doubled(x)
    address = made.data_ptr()
    assert address % 64 == 0
    assert memory.held_memory() == 0
    del made
    assert memory.held_memory() == x.nbytes
    other = torch.randn(elements + 1)
    (of_another_size,) = doubled(other)
    assert of_another_size.data_ptr() != address
    assert memory.held_memory() == x.nbytes
    (again,) = doubled(x)
    assert again.data_ptr() == address
    assert memory.held_memory() == 0
    assert torch.equal(again, 2 * x)


def test_reuse_depends_on_bytes_not_dtype_or_shape() -> None:
    (made,) = doubled(torch.randn(4, 6))
    address = made.data_ptr()
    del made
    (again,) = doubled(torch.randn(2, 24, dtype=torch.float64).to(torch.bfloat16))
    assert again.data_ptr() == address


def test_loop_reuses_memory_of_first_steps() -> None:
    x, seen = torch.randn(1, 4, 64, 64), set()
    kept: list[Tensor] = []
    for _ in range(12):
        x, *kept = doubled(x * 0.1, keeps=2)
        seen |= {t.data_ptr() for t in (x, *kept)}
    assert len(seen) == 6  # three of this step and three of the one before


def test_view_keeps_memory_alive() -> None:
    x = torch.randn(300)
    view = doubled(x)[0][10:20]
    assert memory.held_memory() == 0
    (other,) = doubled(x)
    other.fill_(float("nan"))
    assert torch.equal(view, 2 * x[10:20])
    array = doubled(x)[0].numpy()
    (other,) = doubled(x)
    other.fill_(float("nan"))
    assert (array == 2 * x.numpy()).all()
    held = memory.held_memory()
    del array
    assert memory.held_memory() == held + x.nbytes


# --- Ordinary tensors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("inference", [False, True])
def test_output_equals_empty_strided(dtype: torch.dtype, inference: bool) -> None:
    layouts: tuple[Callable[[Tensor], Tensor], ...] = (
        lambda x: x,
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: x.permute(3, 0, 2, 1),
        lambda x: x[:1, :1, :1, :1].reshape(()),
    )
    for layout in layouts:
        x = layout(torch.randn(2, 3, 4, 5).to(dtype))
        with torch.inference_mode(inference):
            expected = torch.empty_strided(x.shape, x.stride(), dtype=dtype)
            for made in doubled(x, keeps=2):
                keys = torch._C._dispatch_keys
                assert keys(made) == keys(expected)
                assert (made.dtype, made.shape, made.stride()) == (expected.dtype, expected.shape, expected.stride())
                assert made.untyped_storage().nbytes() == expected.untyped_storage().nbytes()
                assert made.untyped_storage().resizable()
                assert made.is_inference() == expected.is_inference() == inference
                assert made.requires_grad is made.is_pinned() is made.is_shared() is False
                assert made.is_leaf == expected.is_leaf
                if not inference:
                    assert made._version == 0
                    made.add_(1)
                    assert made._version == 1


def test_autograd_works_through_output() -> None:
    (made,) = doubled(torch.randn(7))
    made.requires_grad_()
    (made**2).sum().backward()
    assert torch.equal(made.grad, 2 * made.detach())


def _resized(made: Tensor) -> Tensor:
    return made.resize_(5000)[:50].clone()


def _storage_resized(made: Tensor) -> Tensor:
    made.untyped_storage().resize_(8000)
    return made.clone()


def _emptied(made: Tensor) -> Tensor:
    values = made.clone()
    made.untyped_storage().resize_(0)
    return values


def _set_elsewhere(made: Tensor) -> Tensor:
    values = made.clone()
    made.set_(torch.empty(3))
    return values


def _pickled(made: Tensor) -> Tensor:
    loaded: Tensor = pickle.loads(pickle.dumps(made))
    return loaded


def _saved(made: Tensor) -> Tensor:
    file = io.BytesIO()
    torch.save(made, file)
    file.seek(0)
    loaded: Tensor = torch.load(file)
    return loaded


def _copied_on_write(made: Tensor) -> Tensor:
    lazy = torch._lazy_clone(made)
    values = made.clone()
    made.fill_(float("nan"))
    assert torch.equal(lazy, values)
    return lazy


@pytest.mark.parametrize(
    "use",
    [
        _resized, _storage_resized, _emptied, _set_elsewhere, _pickled, _saved, _copied_on_write, copy.deepcopy,
        lambda made: made.share_memory_(), lambda made: torch.from_dlpack(made), lambda made: made.swapaxes(0, 0).data,
    ],
)  # fmt: skip
def test_any_operation_on_output_is_safe(use: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(50)
    (made,) = doubled(x)
    result = use(made)
    del made
    # The block is free or in use; who takes one now must not meet the result.
    taken = [doubled(x)[0].fill_(float("nan")) for _ in range(4)]
    assert torch.equal(result, 2 * x)
    del taken, result
    assert memory.held_memory() <= 6 * x.nbytes
    assert torch.equal(doubled(x)[0], 2 * x)


@settings(max_examples=60)
@given(
    actions=st.lists(
        st.tuples(
            st.sampled_from(["step", "step", "step", "drop", "view", "resize", "thread", "release"]),
            st.integers(0, 1 << 16),
        ),
        max_size=40,
    )
)
def test_no_two_living_tensors_share_memory(actions: list[tuple[str, int]]) -> None:
    living: list[tuple[Tensor, Tensor]] = []
    for action, number in actions:
        if action == "step" or not living:
            x = torch.randn((3, 5, 64, 1000)[number % 4]).to(DTYPES[number // 4 % 4])
            living += [(made, made.clone()) for made in doubled(x, keeps=number // 16 % 3)]
            continue
        at = number % len(living)
        made, values = living[at]
        if action == "drop":
            del living[at]
        elif action == "view":
            living[at] = (made[1:], values[1:]) if made.dim() and len(made) > 1 else (made, values)
        elif action == "resize":
            made.resize_(len(values) // 2 + 1)
            living[at] = made, values[: len(made)]
        elif action == "thread":
            del living[at]
            box = [made]
            del made
            thread = threading.Thread(target=box.clear)
            thread.start()
            thread.join()
        else:
            memory.release_memory()
        made = values = None  # type: ignore[assignment]
    for made, values in living:
        assert torch.equal(made, values)


# --- Limits ----------------------------------------------------------------------------------------------------------


def test_limit_evicts_least_recently_used() -> None:
    extension.limit_kept_memory(4000)
    made = [doubled(torch.randn(size))[0] for size in (100, 200, 300, 400)]  # 400 to 1600 bytes, 4000 in all
    addresses = [t.data_ptr() for t in made]
    for _ in range(4):
        del made[0]
    assert memory.held_memory() == 4000
    (large,) = doubled(torch.randn(250))
    del large  # 1000 bytes: the two oldest make room
    assert memory.held_memory() == 3800
    assert doubled(torch.randn(300))[0].data_ptr() == addresses[2]
    assert doubled(torch.randn(400))[0].data_ptr() == addresses[3]


def test_memory_beyond_limit_is_not_cached() -> None:
    extension.limit_kept_memory(4000)
    made = doubled(torch.randn(1001))
    del made
    assert memory.held_memory() == 0
    # One that was made before the limit fell.
    extension.limit_kept_memory(8000)
    made = doubled(torch.randn(1001))
    extension.limit_kept_memory(4000)
    del made
    assert memory.held_memory() == 0


def test_number_of_blocks_is_bounded() -> None:
    made = [doubled(torch.randn(size))[0] for size in range(1, 101)]
    for _ in range(100):
        del made[0]
    assert memory.held_memory() == 4 * sum(range(37, 101))  # the 64 last ones


def test_release_frees_cached_memory_only() -> None:
    x = torch.randn(1000)
    made = [doubled(x)[0] for _ in range(3)]
    made.pop()
    assert memory.held_memory() == x.nbytes
    assert fastdiff.release_memory() == x.nbytes
    assert fastdiff.release_memory() == memory.held_memory() == 0
    assert all(torch.equal(t, 2 * x) for t in made)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system does not say what a process holds")
@pytest.mark.skipif(SANITIZED, reason="AddressSanitizer keeps what is freed in quarantine")
def test_released_memory_returns_to_system() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    x = torch.randn(16 * MIB)
    (made,) = doubled(x)
    del made
    assert memory.held_memory() == 64 * MIB
    before = resident()
    fastdiff.release_memory()
    assert before - resident() > 56 * MIB


_IN_THE_HEAP = (
    "import ctypes, os, torch, fastdiff\n"
    "from pathlib import Path\n"
    "from fastdiff import ops\n"
    "from support.oracle import plain_row\n"
    "libc = ctypes.CDLL(None)\n"
    "libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]\n"
    "libc.free.argtypes = [ctypes.c_void_p]\n"
    "libc.free(libc.malloc(31 << 20))\n"  # from now on malloc takes less than this from its heap
    "blocks = [libc.malloc(20 << 20) for _ in range(8)]\n"
    "above = libc.malloc(1 << 20)\n"
    "for block in blocks: libc.free(block)\n"  # a hole, which the next output fits into
    "def resident(): return int(Path('/proc/self/statm').read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE')\n"
    "x = torch.ones(16 << 20)\n"
    "(made,) = ops.step(x, x, plain_row(prev_x=2.0), 0)\n"
    "del made\n"
    "before = resident()\n"
    "fastdiff.release_memory()\n"
    "print(before - resident())\n"
)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system does not say what a process holds")
@pytest.mark.skipif(SANITIZED, reason="AddressSanitizer keeps what is freed in quarantine")
def test_released_memory_from_heap_returns_to_system() -> None:
    done = run(_IN_THE_HEAP)
    assert int(done.stdout) > 56 * MIB, done.stderr


# --- The switch ------------------------------------------------------------------------------------------------------

_KEPT = (
    "import torch, fastdiff\n"
    "from fastdiff import memory\n"
    "from support.oracle import plain_row\n"
    "x = torch.randn(5000)\n"
    "(made,) = fastdiff.ops.step(x, x, plain_row(prev_x=2.0), 0)\n"
    "assert torch.equal(made, 2 * x)\n"
    "del made\n"
    "print(memory.held_memory(), memory.kept_memory_limit())\n"
)


@pytest.mark.parametrize(("mib", "held"), [("0", 0), ("64", 20000)])
def test_environment_sets_limit(mib: str, held: int) -> None:
    done = in_fork(_KEPT, mib)
    assert done.stdout.split() == [str(held), str(int(mib) << 20)], done.stderr


@pytest.mark.parametrize("value", ["-1", "1.5", "many", "²", "99999999999"])
def test_bad_limit_is_an_error_with_remedy(value: str) -> None:
    with pytest.raises(ValueError, match=r"FASTDIFF_KEEP_MIB is .*expected a whole number of MiB.*unset it"):
        memory.keep_limit(value)


def test_bad_limit_in_environment_fails_import() -> None:
    done = in_fork("import fastdiff", "lots")
    assert done.returncode == 1
    assert "ValueError: fastdiff: FASTDIFF_KEEP_MIB is 'lots', expected a whole number" in done.stderr


# --- Threads, forks and the end --------------------------------------------------------------------------------------


def test_threads_allocate_and_free_concurrently() -> None:
    failures: list[str] = []
    handed: list[Tensor] = []

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for turn in range(150):
            x = torch.randn((64, 5000, 70000)[turn % 3], generator=generator)  # the last lets go of the GIL
            made = doubled(x, keeps=1)
            expected = 2 * x, 3 * x
            if handed and turn % 4 == 0:
                with contextlib.suppress(IndexError):
                    handed.pop()  # freed here, made elsewhere
            if not all(torch.equal(a, b) for a, b in zip(made, expected, strict=True)):
                failures.append(f"thread {seed}, turn {turn}")
            handed.append(made[turn % 2])

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system cannot fork")
@pytest.mark.skipif(SANITIZED, reason="AddressSanitizer's allocator holds a lock of its own across a fork")
def test_forked_child_works_after_other_threads() -> None:
    done = run(
        "import os, threading, torch, fastdiff\n"
        "from support.oracle import plain_row\n"
        "torch.set_num_threads(1)\n"
        "row, stop = plain_row(prev_x=2.0), False\n"
        "def step(x):\n"
        "    (made,) = fastdiff.ops.step(x, x, row, 0)\n"
        "    assert torch.equal(made, 2 * x)\n"
        "def work():\n"
        "    x = torch.randn(1000)\n"
        "    while not stop: step(x)\n"
        "threads = [threading.Thread(target=work) for _ in range(2)]\n"
        "for thread in threads: thread.start()\n"
        "for _ in range(30):\n"
        "    child = os.fork()\n"
        "    if child == 0:\n"
        "        for size in (1000, 7): step(torch.randn(size))\n"
        "        fastdiff.release_memory()\n"
        "        os._exit(7)\n"
        "    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7\n"
        "stop = True\n"
        "for thread in threads: thread.join()\n"
        "print('done')\n"
    )
    assert done.stdout == "done\n", done.stderr


def test_tensor_may_outlive_interpreter_state() -> None:
    # Held by a module that is torn down last, and by a thread that never ends.
    done = run(
        "import builtins, threading, time, torch, fastdiff\n"
        "from support.oracle import plain_row\n"
        "x = torch.randn(100)\n"
        "builtins.kept = fastdiff.ops.step(x, x, plain_row(prev_x=2.0), 0)\n"
        "threading.Thread(target=lambda held: time.sleep(60), args=(builtins.kept,), daemon=True).start()\n"
    )
    assert (done.returncode, done.stderr) == (0, "")
