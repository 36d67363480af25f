# SPDX-License-Identifier: MIT
"""The order of samples, as a function of seed and epoch, shared out among processes.

Each sample has a number, its index in the data set.  What is drawn for it in an epoch follows from (seed, number,
epoch) alone, so a resumed run and a run on more processes see the same samples with the same draws.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
)

from ...errors import error_message
from ...noise import sample_seeds
from .batches import read_batch

#: The number that stands for a whole epoch rather than for one of its samples.
_EPOCH_ORDER = -1


@dataclass(frozen=True)
class Share:
    """One process' share of a batch.

    Attributes:
        data: what the data set's collate function gave.
        sample_ids: numbers of the samples, ``[B]`` int64 on the CPU.
        total: samples of the batch over all processes.
    """

    data: Any
    sample_ids: Tensor
    total: int


@contextmanager
def seeded_draws(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Seed the random numbers of torch, Python and NumPy within a block; afterwards they go on as before.

    Args:
        seed: any integer of 64 bits.
        device: an accelerator whose generator is seeded too.
    """
    python, numpy = random.getstate(), sys.modules.get("numpy")
    numpy_state = None if numpy is None else numpy.random.get_state()
    accelerator = None if device is None or device.type in ("cpu", "meta") else device
    with torch.random.fork_rng(
        devices=[] if accelerator is None else [accelerator.index or 0],
        device_type="cuda" if accelerator is None else accelerator.type,
    ):
        torch.default_generator.manual_seed(seed)
        if accelerator is not None:
            torch.get_device_module(accelerator).manual_seed(seed)
        random.seed(seed)
        if numpy is not None:
            numpy.random.seed(seed & 0xFFFFFFFF)
        try:
            yield
        finally:
            random.setstate(python)
            if numpy is not None:
                numpy.random.set_state(numpy_state)


def epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    """Return the numbers 0 to ``count`` − 1 in the random order of an epoch."""
    generator = torch.Generator().manual_seed(int(sample_seeds(seed, torch.tensor([_EPOCH_ORDER]), epoch)))
    return torch.randperm(count, generator=generator).tolist()


class DataOrder:
    """The batches of a data loader, epoch by epoch, from any of them on.

    A `torch.utils.data.DataLoader` over a data set with indices is read in an order of ours: random if it shuffles,
    else its own; its workers, collate function and memory pinning are used as they are.  Random transforms in the data
    set are seeded for each sample.  Everything else that is iterated over (a loader with a sampler of its own, a
    stream, a list of batches) is taken in its own order, read whole by each process; its samples are numbered as they
    come.
    ``batch_size`` is that of one process: the batch of a step has as many samples from each.

    Args:
        loader: the data loader or the iterable.
        seed: of the order and of the data set's transforms.
        rank, world: this process' number, and how many there are.
        complete: give each sample to one process, also of batches with fewer samples than processes, so that some
            processes get no share of these.  Steps of a training need a share of each process.

    Raises:
        TypeError: the loader cannot be iterated over.
        ValueError: it is empty, has fewer samples than processes, or shares samples out among processes by itself.
    """

    def __init__(self, loader: Any, seed: int, rank: int = 0, world: int = 1, *, complete: bool = False) -> None:
        self._loader, self._seed, self._rank, self._world = loader, seed, rank, world
        self._least = 1 if complete else world
        self._indexed = isinstance(loader, DataLoader) and _has_usual_order(loader)
        if not isinstance(loader, Iterable) and not hasattr(loader, "__getitem__"):
            got, remedy = f"is a {type(loader).__name__}", "pass a torch DataLoader"
            raise TypeError(error_message("train", "dataloader", got, "an iterable of batches", remedy))
        if world > 1 and _is_shared_out(loader):
            got, expected = "gives each process other samples", "the same ones in all processes"
            remedy = "leave DistributedSampler and accelerator.prepare out: batches are shared out here"
            raise ValueError(error_message("train", "dataloader", got, expected, remedy))
        if self._indexed and not self.batches:
            samples = len(loader.dataset)
            least = self._loader.batch_size * self._least if loader.drop_last else self._least
            got, remedy = f"has {samples} samples", "give more samples, or take smaller batches"
            raise ValueError(error_message("train", "dataloader", got, f"at least {least}", remedy))

    @property
    def global_batch(self) -> int | None:
        """Samples of a whole batch over all processes; None where the loader does not know."""
        return self._global_batch if self._indexed else None

    @property
    def _global_batch(self) -> int:
        size: int = self._loader.batch_size * self._world
        return size

    @property
    def _samples(self) -> int:
        """Samples of a pass: without a rest that the loader drops, of a batch of those that are given out together."""
        count: int = len(self._loader.dataset)
        return count - count % (self._loader.batch_size * self._least) if self._loader.drop_last else count

    @property
    def batches(self) -> int | None:
        """Batches of an epoch; None where the loader does not know."""
        if self._indexed:
            count, size = self._samples, self._global_batch
            return count // size + (count % size >= self._least)
        try:
            return -(-(len(self._loader) - self._least + 1) // self._world)
        except TypeError:  # a DataLoader has __len__, which raises where its IterableDataset has none
            return None

    def epoch(self, number: int, skip: int = 0) -> Iterator[Share]:
        """Yield this process' shares of an epoch's batches, without the first ``skip`` of them."""
        return self._by_index(number, skip) if self._indexed else self._as_it_comes(skip)

    def _by_index(self, number: int, skip: int) -> Iterator[Share]:
        loader, size = self._loader, self._global_batch
        count = len(loader.dataset)
        shuffled = isinstance(loader.sampler, RandomSampler)
        order = (epoch_order(count, self._seed, number) if shuffled else list(range(count)))[: self._samples]
        shares, totals = [], []
        for i in range(skip, self.batches or 0):
            whole = order[i * size : (i + 1) * size]
            edges = [rank * len(whole) // self._world for rank in (self._rank, self._rank + 1)]
            if edges[0] < edges[1]:
                shares.append(whole[edges[0] : edges[1]])
                totals.append(len(whole))
        ours = DataLoader(
            _Numbered(loader.dataset, self._seed, number),
            batch_sampler=shares,
            num_workers=loader.num_workers,
            collate_fn=_Collate(loader.collate_fn),
            pin_memory=loader.pin_memory,
            timeout=loader.timeout,
            worker_init_fn=loader.worker_init_fn,
            multiprocessing_context=loader.multiprocessing_context,
            prefetch_factor=loader.prefetch_factor,
            generator=torch.Generator().manual_seed(0),  # workers' seeds: not drawn from torch's own generator
        )
        for (ids, data), total in zip(ours, totals, strict=True):
            yield Share(data, ids, total)

    def _as_it_comes(self, skip: int) -> Iterator[Share]:
        first, batches = 0, iter(self._loader)
        while True:
            group = list(islice(batches, self._world))
            if len(group) < self._least:
                return
            sizes = [len(read_batch(batch, "train").images) for batch in group]
            if skip > 0:
                skip -= 1
            elif self._rank < len(group):
                begin = first + sum(sizes[: self._rank])
                ids = torch.arange(begin, begin + sizes[self._rank])
                yield Share(group[self._rank], ids, sum(sizes))
            first += sum(sizes)


def _has_usual_order(loader: DataLoader[Any]) -> bool:
    """Return True for a loader that gives each index once, in random order or in its own."""
    sampler, dataset = loader.sampler, loader.dataset
    if isinstance(dataset, IterableDataset) or loader.batch_size is None:
        return False
    if type(sampler) not in (SequentialSampler, RandomSampler) or len(sampler) != len(dataset):  # type: ignore[arg-type]
        return False
    return not getattr(sampler, "replacement", False)


def _is_shared_out(loader: object) -> bool:
    """Return True for a loader that gives each process other samples: torch's sampler, or accelerate's loaders."""
    prepared = any(kind.__name__ == "DataLoaderStateMixin" for kind in type(loader).__mro__)
    return prepared or isinstance(getattr(loader, "sampler", None), DistributedSampler)


class _Numbered(Dataset[Any]):
    """A data set whose items come with their numbers, each drawn from its own seed."""

    def __init__(self, dataset: Any, seed: int, epoch: int) -> None:
        self._dataset, self._seed, self._epoch = dataset, seed, epoch

    def __getitem__(self, index: int) -> tuple[int, Any]:
        if type(self._dataset) is TensorDataset:  # it draws nothing; a subclass may
            return index, self._dataset[index]
        with seeded_draws(int(sample_seeds(self._seed, torch.tensor([index]), self._epoch))):
            return index, self._dataset[index]

    def __len__(self) -> int:
        return len(self._dataset)


class _Collate:
    """Collate items with their numbers."""

    def __init__(self, collate: Any) -> None:
        self._collate = collate

    def __call__(self, items: list[tuple[int, Any]]) -> tuple[Tensor, Any]:
        return torch.tensor([number for number, _ in items], dtype=torch.int64), self._collate(
            [item for _, item in items]
        )
