# SPDX-License-Identifier: MIT
"""A guidance method for each sample of a batch."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import checked_type, error_message
from .method import Guidance


class MixedGuidance:
    """Guidance whose method differs from sample to sample, in one reduction and one pass.

    Args:
        methods: a method for each sample of the batch; one object may be given more than once.

    Attributes:
        branches: the branches of all methods.

    Raises:
        TypeError, ValueError: there is no method, or one that is no weighted sum of its branches.
    """

    def __init__(self, methods: Sequence[Guidance]) -> None:
        self.methods = tuple(methods)
        if not self.methods:
            raise ValueError(error_message("MixedGuidance", "methods", "is empty", "one a sample", "pass a list"))
        for i, method in enumerate(self.methods):
            remedy = "pass PlainGuidance(1.0) for a sample without guidance"
            checked_type("MixedGuidance", f"methods[{i}]", method, Guidance, "a Guidance", remedy)
            if not method.is_affine or getattr(method, "token_dims", None) is not None:
                got = f"is {type(method).__name__}"
                expected = "a method with one weight a branch and sample"
                remedy = "run these samples in a batch of their own"
                raise ValueError(error_message("MixedGuidance", f"methods[{i}]", got, expected, remedy))
        self.branches = tuple(dict.fromkeys(name for method in self.methods for name in method.branches))
