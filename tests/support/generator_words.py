# SPDX-License-Identifier: MIT
"""Generators of torch's that hold chosen words: what torch draws with can be chosen, not only seeded."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch

#: Words of mt19937's state, and where torch keeps them in `get_state`: behind the seed (8 bytes), how many are left
#: before the next 624 (4), whether it was seeded (4) and where the next one is (8); each in 8 bytes.
STATE_WORDS = 624
_LEFT, _NEXT, _WORDS = 8, 16, 24
#: Words that a generator of ours gives before it makes new ones. One less would do; these are whole groups of 16.
CHOSEN = 608

#: As torch.randn, with the generator second.
Draw = Callable[[tuple[int, ...], torch.Generator], torch.Tensor]


def by_torch(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator)


def untempered(words: np.ndarray) -> np.ndarray:
    """The words of the state that the generator gives as `words`, uint32; tempering is a bijection."""
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
    """States ``[n, bytes]`` of generators that give ``words[n]`` of ``[n, CHOSEN]`` next."""
    seeded = torch.Generator("cpu").manual_seed(0).get_state().numpy()
    states = np.repeat(seeded[None], len(words), axis=0)
    states[:, _LEFT : _LEFT + 4].view(np.int32)[:] = STATE_WORDS
    states[:, _NEXT : _NEXT + 8].view(np.uint64)[:] = 1
    held = states[:, _WORDS : _WORDS + 8 * STATE_WORDS].view(np.uint64)
    held[:, 1 : 1 + CHOSEN] = untempered(words.astype(np.uint32))
    return torch.from_numpy(states)


def pairs_of(first: np.ndarray, second: np.ndarray) -> Iterator[tuple[torch.Tensor, int]]:
    """States whose next draws take their pairs of uniforms from these words, in order, and how many pairs count.

    Args:
        first, second: ``[n]``, below 2³²; the low 24 bits are what counts.
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
            # A copy, for torch reads a state from where its storage begins.
            yield state.clone(), min(per_state, count - row * per_state)


def numbers_of(first: np.ndarray, second: np.ndarray, draw: Draw = by_torch) -> torch.Tensor:
    """What is made of pairs of words: ``[n, 2]``, with a cosine and with a sine."""
    generator, parts = torch.Generator("cpu"), []
    for state, count in pairs_of(first, second):
        generator.set_state(state)
        drawn = draw((CHOSEN,), generator).view(-1, 2, 8).transpose(1, 2).reshape(-1, 2)
        parts.append(drawn[:count])
    return torch.cat(parts)


def differing(first: np.ndarray, second: np.ndarray, draw: Draw) -> int:
    """How many of these pairs of words become other bits in a draw than in torch's."""
    drawn, expected = numbers_of(first, second, draw), numbers_of(first, second)
    return int((drawn.view(torch.int32) != expected.view(torch.int32)).any(dim=1).sum())


def one_of_radius_one() -> int:
    """A word whose radius, √(−2 ln u1), is 1 in torch's arithmetic."""
    around = round((1 - np.exp(-0.5)) * 2**24)
    near = np.arange(around - 400, around + 400, dtype=np.uint32)
    ones = near[numbers_of(near, np.zeros_like(near))[:, 0].numpy() == 1.0]
    assert len(ones) > 0
    return int(ones[0])


def with_counters(state: torch.Tensor, left: int, following: int) -> torch.Tensor:
    """The state, with other counts of what is left and of where the next word is."""
    changed = state.clone().numpy()
    changed[_LEFT : _LEFT + 4].view(np.int32)[:] = left
    changed[_NEXT : _NEXT + 8].view(np.uint64)[:] = following
    return torch.from_numpy(changed)
