# SPDX-License-Identifier: MIT
"""What can become of a tensor, or of another argument, on its way into a call of the step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode


class Labelled(torch.Tensor):
    """A subclass that changes nothing."""


class Wrapper(torch.Tensor):
    """A subclass without memory, as those of DTensor and quantisation libraries are."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapper:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError("a wrapper without an operation")


def in_a_room(tensor: Tensor, before: int, step: int = 1) -> Tensor:
    """The values at every `step`-th place of a longer buffer."""
    room = torch.full((before + step * tensor.numel() + 3,), 7.0).to(tensor.dtype)
    view = room[before : before + step * tensor.numel() : step] if tensor.numel() else room[:0]
    return view.copy_(tensor.reshape(-1)).view(tensor.shape)


def _resized(tensor: Tensor, part: int) -> Tensor:
    """Its storage freed or cut short behind its back; torch itself reads on past such an end."""
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(tensor.untyped_storage().nbytes() * part // 4)
    return tensor


def _inference(tensor: Tensor) -> Tensor:
    with torch.inference_mode():
        return tensor.clone()


def _set(tensor: Tensor) -> Tensor:
    return torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage(), 0, tensor.shape, tensor.stride())


def _meaningless_strides(tensor: Tensor) -> Tensor:
    """Strides of 2⁴⁰ and 0 where there is one element, which no address depends on."""
    strides = [[2**40, 0][i % 2] if size == 1 else s for i, (size, s) in enumerate(zip(tensor.shape, tensor.stride()))]  # noqa: B905
    return tensor.as_strided(tensor.shape, strides)


#: What can become of a tensor on its way into a call.
TENSOR_CHANGES: dict[str, Callable[[Tensor], Any]] = {
    "none": lambda t: None,
    "list": lambda t: [1.0, 2.0],
    "text": lambda t: "tensor",
    "number": lambda t: 3,
    "class": lambda t: Tensor,
    "numpy": lambda t: t.float().numpy(),
    "float64": lambda t: t.double(),
    "float16": lambda t: t.half(),
    "int64": lambda t: t.long(),
    "bool": lambda t: t > 0,
    "complex": lambda t: t.to(torch.complex64),
    "float8": lambda t: t.to(torch.float8_e4m3fn),
    "quantized": lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.quint8),
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "csr": lambda t: t.reshape(1, -1).to_sparse_csr(),
    "mkldnn": lambda t: t.float().to_mkldnn(),
    "nested": lambda t: torch.nested.nested_tensor([t.float(), t.float()]),
    "jagged": lambda t: torch.nested.nested_tensor([t.reshape(-1).float()] * 2, layout=torch.jagged),
    "fake": lambda t: FakeTensorMode(allow_non_fake_inputs=True).from_tensor(t),
    "wrapper": Wrapper,
    "functional": torch._to_functional_tensor,
    "subclass": lambda t: t.as_subclass(Labelled),
    "parameter": torch.nn.Parameter,
    "graph": lambda t: t.detach().requires_grad_() * 1.0,
    "uninitialised": lambda t: torch.nn.UninitializedParameter(),
    "inference": _inference,
    "copy on write": lambda t: torch._lazy_clone(t),
    "set": _set,
    "freed": lambda t: _resized(t, 0),
    "cut": lambda t: _resized(t, 3),
    "negative": torch._neg_view,
    "expanded": lambda t: t[:1].expand(t.shape) if t.dim() else t.expand(2),
    "transposed": lambda t: t.t().contiguous().t() if t.dim() == 2 else t.transpose(0, -1) if t.dim() else t,
    "strided": lambda t: in_a_room(t, 0, 2),
    "shifted": lambda t: in_a_room(t, 1),
    "sliding": lambda t: in_a_room(t, 0).as_strided(t.shape, [1] * t.dim()),
    "meaningless strides": _meaningless_strides,
    "flat": lambda t: t.reshape(-1),
    "more dimensions": lambda t: t[None],
    "longer": lambda t: torch.cat([t.reshape(-1), t.reshape(-1)]),
    "empty": lambda t: t.reshape(-1)[:0],
    "one number": lambda t: t.reshape(-1)[:1].reshape(()),
    "nan": lambda t: torch.full_like(t, float("nan")),
    "infinite": lambda t: torch.full_like(t, -float("inf")),
    "read only": lambda t: torch.from_numpy(np.frombuffer(t.float().numpy().tobytes(), np.float32)).view(t.shape),
}
#: Those that cannot be read, not even by torch, without an exception or the end of the process.
UNREADABLE = {"freed", "cut", "wrapper", "uninitialised", "fake", "functional", "meta", "nested", "jagged", "mkldnn"}
#: Those that the public step may answer with a tensor of the same kind.
SYMBOLIC = {"fake", "functional", "meta"}
OTHER_CHANGES: dict[str, Any] = {
    "true": True, "minus one": -1, "three": 3, "2^31": 2**31, "2^63 - 1": 2**63 - 1, "-2^63": -(2**63), "2^63": 2**63,
    "2^2000": 2**2000, "float": 0.5, "nan": float("nan"), "text": "0", "none": None, "tensor": torch.zeros(()),
    "numpy": np.int64(0), "numpy float": np.float32(1.5), "complex": 1j, "object": object(), "list": [0], "empty": (),
    "dict": {0: 1}, "nones": [None] * 5, "lists": [[None]], "texts": ("a",), "numbers": [1, 2], "generator": range(2),
}  # fmt: skip
