# SPDX-License-Identifier: MIT
"""States of torch generators that produce chosen words, for exhaustive tests of the normal numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch

#: Words of mt19937's state, and their offset in `get_state`: after the seed (8 bytes), the number of words left (4),
#: the flag for seeded (4) and the position of the next word (8); each word takes 8 bytes.
STATE_WORDS = 624
_LEFT, _NEXT, _WORDS = 8, 16, 24
#: Chosen words per state, whole groups of 16; up to 623 would fit.
CHOSEN = 608

#: Function like torch.randn, with the generator as the second argument.
Draw = Callable[[tuple[int, ...], torch.Generator], torch.Tensor]


def by_torch(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator)


def untempered(words: np.ndarray) -> np.ndarray:
    """Invert mt19937's tempering: return the state words, uint32, from which the generator produces `words`."""
    words = words ^ (words >> np.uint32(18))
    words = words ^ ((words << np.uint32(15)) & np.uint32(0xEFC60000))
    seven = words
    for _ in range(4):  # seven bits more each time
        seven = words ^ ((seven << np.uint32(7)) & np.uint32(0x9D2C5680))
    eleven = seven
    for _ in range(2):
        eleven = seven ^ (eleven >> np.uint32(11))
    return eleven


def states_giving(words: np.ndarray) -> torch.Tensor:
    """Return states ``[n, bytes]`` of generators that produce the words ``[n, CHOSEN]`` next."""
    seeded = torch.Generator("cpu").manual_seed(0).get_state().numpy()
    states = np.repeat(seeded[None], len(words), axis=0)
    states[:, _LEFT : _LEFT + 4].view(np.int32)[:] = STATE_WORDS
    states[:, _NEXT : _NEXT + 8].view(np.uint64)[:] = 1
    state_words = states[:, _WORDS : _WORDS + 8 * STATE_WORDS].view(np.uint64)
    state_words[:, 1 : 1 + CHOSEN] = untempered(words.astype(np.uint32))
    return torch.from_numpy(states)


def pairs_of(first: np.ndarray, second: np.ndarray) -> Iterator[tuple[torch.Tensor, int]]:
    """Yield states whose next draws use these words as pairs of uniforms, in order, and the number of valid pairs.

    Args:
        first, second: words ``[n]``, below 2³², of which only the low 24 bits matter.
    """
    per_state, at_once = CHOSEN // 2, 2048
    step = per_state * at_once
    for start in range(0, len(first), step):
        count = len(first[start : start + step])
        rows = -(-count // per_state)
        words = np.zeros((rows, CHOSEN // 16, 2, 8), np.uint32)
        for which, given in enumerate((first, second)):
            padded = np.zeros(rows * per_state, np.uint32)
            padded[:count] = given[start : start + step]
            words[:, :, which] = padded.reshape(rows, -1, 8)
        for row, state in enumerate(states_giving(words.reshape(rows, CHOSEN))):
            # A copy, because torch reads a state from the beginning of its storage.
            yield state.clone(), min(per_state, count - row * per_state)


def numbers_of(first: np.ndarray, second: np.ndarray, draw: Draw = by_torch) -> torch.Tensor:
    """Return the normal numbers of pairs of words, ``[n, 2]``: by cosine and by sine."""
    generator, parts = torch.Generator("cpu"), []
    for state, count in pairs_of(first, second):
        generator.set_state(state)
        drawn = draw((CHOSEN,), generator).view(-1, 2, 8).transpose(1, 2).reshape(-1, 2)
        parts.append(drawn[:count])
    return torch.cat(parts)


def differing(first: np.ndarray, second: np.ndarray, draw: Draw) -> int:
    """Count the pairs of words for which a draw differs in a bit from torch's."""
    drawn, expected = numbers_of(first, second, draw), numbers_of(first, second)
    return int((drawn.view(torch.int32) != expected.view(torch.int32)).any(dim=1).sum())


def one_of_radius_one() -> int:
    """Return a word whose radius √(−2 ln u1) is 1 in torch's arithmetic."""
    around = round((1 - np.exp(-0.5)) * 2**24)
    near = np.arange(around - 400, around + 400, dtype=np.uint32)
    ones = near[numbers_of(near, np.zeros_like(near))[:, 0].numpy() == 1.0]
    assert len(ones) > 0
    return int(ones[0])


def with_counters(state: torch.Tensor, left: int, following: int) -> torch.Tensor:
    """Return the state with other values for the number of words left and the position of the next word."""
    changed = state.clone().numpy()
    changed[_LEFT : _LEFT + 4].view(np.int32)[:] = left
    changed[_NEXT : _NEXT + 8].view(np.uint64)[:] = following
    return torch.from_numpy(changed)
