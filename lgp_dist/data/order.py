"""Orders and keys as pure functions of numbers: the same on every rank, thread, machine and library version."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from lgp_dist.paths.stratified import key_digest

LANES = 64
"""Lanes of an epoch, which positions visit in turn. Where the ranks divide them, few ranks read each shard."""


def stream_key(purpose: str, *numbers: int) -> int:
    """A 128-bit key for one use of randomness: its name and its numbers, hashed."""
    return int.from_bytes(key_digest(purpose, *numbers), "little")


def permutation(n: int, purpose: str, *numbers: int) -> NDArray[np.int64]:
    """A permutation of range(n) for one use of randomness."""
    # The order in which n 64-bit outputs of the counter-based generator Philox sort. NumPy guarantees these outputs for
    # all its versions, but not the result of Generator.permutation.
    raw = np.random.Philox(key=stream_key(purpose, *numbers)).random_raw(n)
    return np.argsort(raw, kind="stable").astype(np.int64, copy=False)


def position_to_sample(seed: int, epoch: int, n: int) -> NDArray[np.int64]:
    """The order of an epoch whose window holds all shards: element i is the sample at position i."""
    return permutation(n, "order", seed, epoch)


def nth_of_class(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each of labels [k] the number of equal ones before it; sorting by it gives one of each class in turn."""
    order = np.argsort(labels, kind="stable")
    ordered = labels[order]
    found = np.empty(len(labels), dtype=np.int64)
    found[order] = np.arange(len(labels)) - np.searchsorted(ordered, ordered)
    return found


@dataclass(frozen=True, eq=False)
class SampleOrder:
    """From position to sample. Position p, counted from the start of the run, belongs to epoch p // n."""

    # With at most `window` shards, an epoch is one window: a permutation of all samples. More shards cannot all be open
    # or cached at once, so an epoch shuffles in two levels: it permutes the shards, divides the sequence of their
    # samples into lanes, each lane into windows, and permutes the samples within each window. Position p takes the next
    # sample of lane p % lanes, so a batch mixes samples of all lanes, about `window` shards are in use at a time, and
    # the memory is that of two windows per lane. Every sample comes once per epoch; any position is found by itself.

    sizes: tuple[int, ...]
    """Samples of each shard; samples are numbered shard after shard."""
    seed: int
    """Of the run."""
    window: int
    """Shards that are mixed at a time, 1 or more."""

    @cached_property
    def n(self) -> int:
        """Samples of an epoch."""
        return sum(self.sizes)

    @property
    def whole(self) -> bool:
        """Whether one window holds all shards."""
        return len(self.sizes) <= self.window

    @property
    def lanes(self) -> int:
        """Number of lanes."""
        return 1 if self.whole else min(LANES, self.window)

    def samples(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Sample at each position; positions [k], 0 or more, in any order."""
        found = np.empty(len(positions), dtype=np.int64)
        epochs = positions // self.n
        groups = epochs * self.lanes + positions % self.lanes
        for group in np.unique(groups).tolist():
            mine = np.flatnonzero(groups == group)
            found[mine] = self._of_lane(group // self.lanes, group % self.lanes, positions[mine])
        return found

    def _of_lane(self, epoch: int, lane: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Samples at positions of one epoch and lane."""
        first = epoch * self.n + (lane - epoch * self.n) % self.lanes
        places = (positions - first) // self.lanes
        begin, end = self._lane(epoch, lane)
        count = self._windows(end - begin)
        found = np.empty(len(places), dtype=np.int64)
        edges = (end - begin) * np.arange(count + 1, dtype=np.int64) // count
        numbers = np.searchsorted(edges, places, side="right") - 1
        for number in np.unique(numbers).tolist():
            inside = numbers == number
            low, high = begin + int(edges[number]), begin + int(edges[number + 1])
            order = self._cached_window(epoch, lane, number, low, high)
            found[inside] = order[places[inside] - int(edges[number])]
        return found

    def _lane(self, epoch: int, lane: int) -> tuple[int, int]:
        """First place of a lane in the sequence of permuted shards, and the first after it."""
        lengths = [self._length(epoch, other) for other in range(lane + 1)]
        return sum(lengths[:-1]), sum(lengths)

    def _length(self, epoch: int, lane: int) -> int:
        """Number of an epoch's positions in one lane."""
        start = epoch * self.n
        return (start + self.n - lane - 1) // self.lanes - (start - lane - 1) // self.lanes

    def _windows(self, length: int) -> int:
        """Number of windows of a lane of so many samples."""
        return (
            1 if self.whole else max(1, round(length * len(self.sizes) * self.lanes / (self.window * max(self.n, 1))))
        )

    def _window(self, epoch: int, lane: int, number: int, low: int, high: int) -> NDArray[np.int64]:
        """Samples of one window in their order; low, high: its places in the sequence of permuted shards."""
        if self.whole:
            return position_to_sample(self.seed, epoch, self.n)
        order, ends = self._cached_shards(epoch)
        places = low + permutation(high - low, "window", self.seed, epoch, lane, number)
        rank = np.searchsorted(ends, places, side="right")
        shard = order[rank]
        return self._starts[shard] + places - (ends[rank] - self._sizes[shard])

    def _shards(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The permuted shards of an epoch, and the place after each in the sequence of their samples."""
        order = permutation(len(self.sizes), "shards", self.seed, epoch)
        return order, np.cumsum(self._sizes[order])

    @cached_property
    def _cached_window(self) -> Callable[..., NDArray[np.int64]]:
        """`_window`; keeps as many as two windows of each lane."""
        return lru_cache(2 * self.lanes)(self._window)

    @cached_property
    def _cached_shards(self) -> Callable[[int], tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """`_shards`; keeps two epochs."""
        return lru_cache(2)(self._shards)

    @cached_property
    def _sizes(self) -> NDArray[np.int64]:
        return np.array(self.sizes, dtype=np.int64)

    @cached_property
    def _starts(self) -> NDArray[np.int64]:
        return np.cumsum(self._sizes) - self._sizes
