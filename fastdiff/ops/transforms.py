# SPDX-License-Identifier: MIT
"""Operators in eager autograd and under torch.func.

torch.func cannot transform the autograd that torch.library makes, and a Python operator takes a tenth of a millisecond
of the dispatcher.  `eager_operator` gives an operator both ways around it.  Its gradients are reverse-mode: tangents
are refused, and `differentiable_once` refuses a second derivative where a gradient has none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..errors import error_message
from .layout import in_memory


def refuse_tangents(operation: str, tensors: Iterable[tuple[str, Tensor]], remedy: str = "use torch.func.vjp") -> None:
    """Refuse named tensors that carry a forward-mode tangent."""
    for name, tensor in tensors:
        if forward_ad.unpack_dual(tensor).tangent is not None:  # type: ignore[no-untyped-call]
            raise _tangent_error(operation, name, remedy)


def _tangent_error(operation: str, name: str, remedy: str = "use torch.func.vjp") -> RuntimeError:
    got = "carries a forward-mode tangent and there are reverse-mode gradients only"
    return RuntimeError(error_message(operation, name, got, "a tensor without one", remedy))


def eager_operator(
    operation: str,
    names: Sequence[str],
    operator: Callable[..., Any],
    direct: Callable[..., Any],
    setup_context: Callable[[Any, tuple[Any, ...], Any], None],
    backward: Callable[..., Any],
    vmap: Callable[..., tuple[Any, Any]],
) -> Callable[..., Any]:
    """Return a function that runs an operator so that autograd, torch.func and compilers see it.

    Args:
        operation: the public function, for messages.
        names: of the arguments, in messages; those after the last tensor may be left out.
        operator: runs the operator by torch's dispatcher.
        direct: runs it on tensors in memory, without autograd.
        setup_context, backward: as in `torch.autograd.Function`.
        vmap: its rule for vmap, as in `torch.autograd.Function`.
    """

    def at_hand(*arguments: Any) -> Any:
        found = all(in_memory(a) for a in arguments if isinstance(a, Tensor))
        return _immutable((direct if found else operator)(*arguments))

    def recorded_forward(ctx: Any, *arguments: Any) -> Any:
        # With a setup_context of its own, torch would inspect the signature at each call.
        result = _immutable(direct(*arguments))
        setup_context(ctx, arguments, result)
        return result

    def refuse_jvp(ctx: Any, *tangents: Any) -> Any:
        # A tangent of an outer transform: torch.func.hessian is forward over reverse.
        raise _tangent_error(
            operation, next(n for n, tangent in zip(names, tangents, strict=False) if tangent is not None)
        )

    recorded = _function(operation, forward=recorded_forward, backward=backward)
    transformed = _function(
        operation, forward=at_hand, setup_context=setup_context, backward=backward, jvp=refuse_jvp, vmap=vmap
    )

    def apply(*arguments: Any) -> Any:
        tensors = [a for a in arguments if isinstance(a, Tensor)]
        traced = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
        # torch.func.functionalize has rules for operators alone.
        if traced or any(torch._is_functional_tensor(a) for a in tensors):
            return operator(*arguments)
        refuse_tangents(
            operation, (pair for pair in zip(names, arguments, strict=False) if isinstance(pair[1], Tensor))
        )
        if torch._C._are_functorch_transforms_active():
            return transformed.apply(*arguments)
        if not all(in_memory(a) for a in tensors):
            return operator(*arguments)
        if torch.is_grad_enabled() and any(a.requires_grad for a in tensors):
            return recorded.apply(*arguments)
        return direct(*arguments)

    return apply


def differentiable_once(
    operation: str, remedy: str, run: Callable[..., Sequence[Tensor]], vmap: Callable[..., tuple[Any, Any]]
) -> Callable[..., tuple[Tensor, ...]]:
    """Return a function that computes gradients where they are recorded, as with ``create_graph=True``.

    A derivative of its results is refused, with the remedy.

    Args:
        operation: the public function whose gradients they are, for messages.
        remedy: an expression that has second derivatives.
        run: computes the gradients, tensors, from the arguments.
        vmap: its rule for vmap, as in `torch.autograd.Function`.
    """

    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        return tuple(run(*arguments))

    def keep_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        return None

    def refuse(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(f"{operation}: trying to differentiate twice, expected once; {remedy}")

    def refuse_jvp(ctx: Any, *tangents: Any) -> Any:
        raise _tangent_error(operation, "gradient")

    function = _function(
        operation, forward=forward, setup_context=keep_nothing, backward=refuse, jvp=refuse_jvp, vmap=vmap
    )
    return function.apply  # type: ignore[no-any-return]


def gradient_is_recorded() -> bool:
    """Return whether autograd or torch.func may differentiate or map the backward that runs."""
    return torch.is_grad_enabled() or torch._C._are_functorch_transforms_active()


def _function(operation: str, **methods: Callable[..., Any]) -> Any:
    """Return a subclass of `torch.autograd.Function` of these static methods, whose nodes bear the operation's name."""
    metaclass: Any = type(torch.autograd.Function)
    static = {name: staticmethod(method) for name, method in methods.items()}
    return metaclass(operation, (torch.autograd.Function,), static)


def _immutable(results: Any) -> Any:
    """Return a list of results as the tuple that a function of autograd has to give."""
    return tuple(results) if isinstance(results, list) else results
