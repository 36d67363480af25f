# SPDX-License-Identifier: MIT
"""A small text encoder that is trained with the model: hashed words, two transformer layers, no vocabulary file."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ...errors import checked_integer, checked_type, error_message

#: Words and single marks; everything else separates.
_WORDS = re.compile(r"\w+|[^\w\s]")
_PADDING, _BEGIN, _FIRST_WORD = 0, 1, 2

#: A callable from a list of prompts to the model's condition, ``[B, ...]``.
TextEncoder = Callable[[Sequence[str]], Tensor]


@torch.no_grad()
def encode_prompts(text_encoder: TextEncoder, prompts: Sequence[str], like: Tensor) -> Tensor:
    """Return the condition of prompts, ``[B, ...]``, detached, on the device of `like`; float ones in its dtype."""
    encoded = text_encoder(prompts).to(like.device)
    return encoded.to(like.dtype) if encoded.is_floating_point() else encoded


class SmallTextEncoder(nn.Module):
    """Encode prompts for cross-attention.

    A word's number is a checksum of its lower-case letters modulo the size of the table, so words may share one; at
    the default size two of a thousand different words do so with a probability of 0.6 %.  The empty prompt, which
    classifier-free guidance takes as the null condition, is a beginning without words.

    Args:
        context_dim: width of the embeddings.
        length: tokens a prompt, its beginning included; later words are cut off.
        vocabulary: rows of the table.
        layers, heads: of the transformer; heads divide `context_dim`.
    """

    def __init__(
        self, context_dim: int, *, length: int = 32, vocabulary: int = 8192, layers: int = 2, heads: int = 4
    ) -> None:
        super().__init__()
        operation = "SmallTextEncoder"
        for name, value, least in (("length", length, 2), ("vocabulary", vocabulary, 3), ("layers", layers, 1)):
            checked_integer(operation, name, value, least)
        if checked_integer(operation, "context_dim", context_dim, 1) % checked_integer(operation, "heads", heads, 1):
            got, expected = f"is {context_dim}", f"a multiple of {heads} heads"
            raise ValueError(error_message(operation, "context_dim", got, expected, "take fewer heads"))
        self.context_dim, self.length, self.vocabulary = context_dim, length, vocabulary
        self.words = nn.Embedding(vocabulary, context_dim, padding_idx=_PADDING)
        self.places = nn.Parameter(torch.randn(length, context_dim) * 0.02)
        layer = nn.TransformerEncoderLayer(
            context_dim, heads, 2 * context_dim, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.transformer = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(context_dim)

    def tokens(self, prompts: Sequence[str]) -> Tensor:
        """Return the numbers of the prompts' words, ``[B, length]`` int64 on the CPU; 0 where a prompt has ended.

        Raises:
            TypeError: a prompt is no string.
        """
        rows = []
        for prompt in prompts:
            checked_type("SmallTextEncoder", "a prompt", prompt, str, "a string", "pass one a sample")
            words = _WORDS.findall(prompt.lower())[: self.length - 1]
            numbers = [zlib.crc32(word.encode()) % (self.vocabulary - _FIRST_WORD) + _FIRST_WORD for word in words]
            rows.append([_BEGIN, *numbers, *[_PADDING] * (self.length - 1 - len(words))])
        return torch.tensor(rows, dtype=torch.int64).reshape(-1, self.length)

    def forward(self, prompts: Sequence[str] | Tensor) -> Tensor:
        """Encode prompts.

        Args:
            prompts: strings, or what `tokens` made of them, ``[B, length]``, on any device.

        Returns:
            ``[B, length, context_dim]`` in the dtype of the weights; zeros after a prompt's end.
        """
        tokens = prompts if isinstance(prompts, Tensor) else self.tokens(prompts)
        tokens = tokens.to(self.places.device)
        ended = tokens == _PADDING
        hidden = self.transformer(self.words(tokens) + self.places, src_key_padding_mask=ended)
        encoded: Tensor = self.norm(hidden).masked_fill(ended[:, :, None], 0.0)
        return encoded
