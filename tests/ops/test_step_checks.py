# SPDX-License-Identifier: MIT
"""What a step refuses: a sentence that names the argument, nothing written, and gradients never lost in silence."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastdiff import ops
from support.oracle import backends_at_hand, device_of, plain_row

BACKENDS = backends_at_hand()
NAN = float("nan")

#: "step: <argument> <what it got>, expected <what>; <remedy>"
SENTENCE = re.compile(
    r"step: (?P<argument>[a-z_]+(\[\d\])?) (?P<got>(has|is|are|holds|shares|requires) .+), expected .+; .+"
)


def good_call(device: str = "cpu") -> dict[str, Any]:
    """Every argument, each as it should be, for samples [2, 3, 4]."""
    names = ("sample", "model_output", "uncond", "noise", "variance")
    call: dict[str, Any] = {name: torch.rand(2, 3, 4, device=device) for name in names}
    call |= {
        "table": plain_row(p=1.0, q=1.0, prev_x=1.0, prev_m=1.0, prev_d=1.0, prev_h0=1.0, prev_z=1.0, k0_x=1.0).to(
            device
        ),
        "row_index": 0,
        "guidance_scale": torch.tensor([1.0, 2.0], device=device),
        "history": [torch.rand(2, 3, 4, device=device), None],
        "threshold": torch.tensor([1.0, 2.0], device=device),
        "variance_kind": 1,
        "keeps": 1,
        "out": [torch.full((2, 3, 4), NAN, device=device) for _ in range(2)],
    }
    return call


def like_sample_faults(name: str, put: Callable[[Any], Any]) -> list[tuple[str, str, Any, type[Exception], str]]:
    """What can be wrong with any tensor like the sample; `put` places it among the arguments."""
    key, where = name.partition("[")[0], name
    return [
        (key, where, lambda c: put([1.0, 2.0]), TypeError, "is a list"),
        (key, where, lambda c: put(np.ones((2, 3, 4), np.float32)), TypeError, "is a ndarray"),
        (key, where, lambda c: put(torch.rand(2, 3, 5)), ValueError, "has shape [2, 3, 5]"),
        (key, where, lambda c: put(torch.rand(3, 4)), ValueError, "has shape [3, 4]"),
        (key, where, lambda c: put(torch.rand(2, 3, 4, dtype=torch.float64)), TypeError, "has dtype torch.float64"),
        (key, where, lambda c: put(torch.ones(2, 3, 4, dtype=torch.int64)), TypeError, "has dtype torch.int64"),
        (key, where, lambda c: put(torch.empty(2, 3, 4, device="meta")), ValueError, "is on meta"),
    ]


def same(value: Any) -> Any:
    return value


#: (argument to replace, argument to name, its new value, error, what the message says it got)
FAULTS: list[tuple[str, str, Any, type[Exception], str]] = [
    ("sample", "sample", lambda c: [1.0, 2.0], TypeError, "is a list"),
    ("sample", "sample", lambda c: None, TypeError, "is a NoneType"),
    ("sample", "sample", lambda c: np.ones((2, 3, 4), np.float32), TypeError, "is a ndarray"),
    ("sample", "sample", lambda c: torch.ones(2, 3, 4, dtype=torch.int64), TypeError, "has dtype torch.int64"),
    ("sample", "sample", lambda c: torch.ones(2, 3, 4, dtype=torch.complex64), TypeError, "has dtype torch.complex64"),
    ("model_output", "model_output", lambda c: None, TypeError, "is a NoneType"),
    *like_sample_faults("model_output", same),
    *like_sample_faults("uncond", same),
    *like_sample_faults("noise", same),
    *like_sample_faults("variance", same),
    *like_sample_faults("history[0]", lambda bad: [bad]),
    *like_sample_faults("history[2]", lambda bad: [None, None, bad]),
    *like_sample_faults("out[0]", lambda bad: [bad, torch.full((2, 3, 4), NAN)]),
    *like_sample_faults("out[1]", lambda bad: [torch.full((2, 3, 4), NAN), bad]),
    ("table", "table", lambda c: [[0.0] * 32], TypeError, "is a list"),
    ("table", "table", lambda c: torch.zeros(32), ValueError, "has shape [32]"),
    ("table", "table", lambda c: torch.zeros(1, 31), ValueError, "has shape [1, 31]"),
    ("table", "table", lambda c: torch.zeros(1, 32, dtype=torch.float64), TypeError, "has dtype torch.float64"),
    ("table", "table", lambda c: torch.zeros(1, 32, device="meta"), ValueError, "is on meta"),
    ("row_index", "row_index", lambda c: 1, ValueError, "is 1"),
    ("row_index", "row_index", lambda c: -1, ValueError, "is -1"),
    ("row_index", "row_index", lambda c: 2**70, ValueError, f"is {2**70}"),
    ("row_index", "row_index", lambda c: 0.0, TypeError, "is a float"),
    ("row_index", "row_index", lambda c: "0", TypeError, "is a str"),
    ("row_index", "row_index", lambda c: None, TypeError, "is a NoneType"),
    ("guidance_scale", "guidance_scale", lambda c: None, ValueError, "is missing"),
    ("guidance_scale", "guidance_scale", lambda c: "7.5", TypeError, "is a str"),
    ("guidance_scale", "guidance_scale", lambda c: torch.ones(3), ValueError, "has shape [3]"),
    ("guidance_scale", "guidance_scale", lambda c: torch.ones(2, 1), ValueError, "has shape [2, 1]"),
    ("guidance_scale", "guidance_scale", lambda c: torch.ones(0), ValueError, "has shape [0]"),
    ("guidance_scale", "guidance_scale", lambda c: torch.ones(2).half(), TypeError, "has dtype torch.float16"),
    ("guidance_scale", "guidance_scale", lambda c: torch.ones(2, device="meta"), ValueError, "is on meta"),
    ("uncond", "uncond", lambda c: None, ValueError, "is missing"),
    ("threshold", "threshold", lambda c: 1.0, TypeError, "is a float"),
    ("threshold", "threshold", lambda c: torch.ones(1), ValueError, "has shape [1]"),
    ("threshold", "threshold", lambda c: torch.ones(2, 1), ValueError, "has shape [2, 1]"),
    ("threshold", "threshold", lambda c: torch.ones(2, dtype=torch.float64), TypeError, "has dtype torch.float64"),
    ("threshold", "threshold", lambda c: torch.ones(2, device="meta"), ValueError, "is on meta"),
    ("variance", "variance", lambda c: None, ValueError, "is missing"),
    ("variance_kind", "variance", lambda c: 0, ValueError, "is given"),
    ("variance_kind", "variance_kind", lambda c: 3, ValueError, "is 3"),
    ("variance_kind", "variance_kind", lambda c: -1, ValueError, "is -1"),
    ("history", "history", lambda c: c["history"][0], TypeError, "is a Tensor"),
    ("history", "history", lambda c: 3, TypeError, "is a int"),
    ("out", "out", lambda c: c["out"][0], TypeError, "is a Tensor"),
    ("history", "history", lambda c: [None] * 5, ValueError, "holds 5 tensors"),
    ("keeps", "keeps", lambda c: 3, ValueError, "is 3"),
    ("keeps", "keeps", lambda c: -1, ValueError, "is -1"),
    ("keeps", "keeps", lambda c: 2**70, ValueError, f"is {2**70}"),
    ("variance_kind", "variance_kind", lambda c: 2**70, ValueError, f"is {2**70}"),
    ("keeps", "out", lambda c: 0, ValueError, "holds 2 tensors"),
    ("out", "out", lambda c: c["out"][:1], ValueError, "holds 1 tensors"),
    ("out", "out", lambda c: [], ValueError, "holds 0 tensors"),
    ("out", "out[1]", lambda c: c["out"][:1] * 2, ValueError, "shares memory with another output"),
    ("out", "out[1]", lambda c: [c["out"][0], torch.full((2, 3, 1), NAN).expand(2, 3, 4)], ValueError, "holds the"),
    ("out", "out[0]", lambda c: [c["out"][0].requires_grad_(), c["out"][1]], ValueError, "requires grad"),
]  # fmt: skip


def call_step(call: dict[str, Any], backend: str | None) -> tuple[Tensor, ...]:
    rest = dict(call)
    positional = [rest.pop(name) for name in ("sample", "model_output", "table", "row_index")]
    return ops.step(*positional, **rest, backend=backend)


@pytest.mark.parametrize("backend", [None, *BACKENDS])
def test_the_good_call_is_taken(backend: str | None) -> None:
    # Without this the refusals below might all have one cause.
    call = good_call(device_of(backend or ""))
    for output in call_step(call, backend):
        assert not bool(output.isnan().any())


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize(
    ("replaced", "named", "value", "error", "got"), FAULTS, ids=[f"{f[1]} {f[4]}".replace(" ", "-") for f in FAULTS]
)
def test_a_wrong_argument_is_refused_in_a_sentence_and_nothing_is_written(
    replaced: str, named: str, value: Callable[[dict[str, Any]], Any], error: type[Exception], got: str,
    backend: str | None,
) -> None:  # fmt: skip
    call = good_call()
    call[replaced] = value(call)
    with pytest.raises(error) as raised:
        call_step(call, backend)
    message = str(raised.value)
    match = SENTENCE.fullmatch(message)
    assert match is not None, message
    assert match["argument"] == named
    assert match["got"].startswith(got), message
    for output in call["out"]:
        if isinstance(output, Tensor) and output.device.type == "cpu" and output.is_floating_point():
            written = output.detach() if output.requires_grad else output
            # Outputs that `like_sample_faults` made hold numbers from the start; all others hold NaN.
            assert bool(written.isnan().all()) or (replaced == "out" and "out[" in named)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize(
    ("shape", "remedy"),
    [
        ((4, 3, 4), "pass the unconditional half as uncond"),
        ((2, 6, 4), "pass the second half of the channels as variance"),
        ((2, 3, 5), "reshape it to match"),
    ],
)
def test_a_model_output_of_the_wrong_shape_gets_the_remedy_that_fits(
    backend: str | None, shape: tuple[int, ...], remedy: str
) -> None:
    with pytest.raises(ValueError, match=f"; {remedy}$"):
        ops.step(torch.ones(2, 3, 4), torch.ones(shape), plain_row(), 0, backend=backend)


def test_a_double_table_is_wanted_for_double_samples_and_no_other() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        x = torch.ones(2, dtype=dtype)
        wanted = torch.float64 if dtype == torch.float64 else torch.float32
        for given in (torch.float32, torch.float64):
            table = plain_row(prev_x=1.0).to(given)
            if given == wanted:
                assert ops.step(x, x, table, 0)[0].dtype == dtype
            else:
                with pytest.raises(TypeError, match=f"^step: table has dtype {given}, expected {wanted} "):
                    ops.step(x, x, table, 0)
