"""Batches for one rank: training in an order that is a pure function of (seed, position), evaluation and clean images.

The state of a training stream is one number: position p, counted in samples from the start of the run, is sample
position_to_sample(seed, p // n, n)[p % n]. Epochs follow each other without a gap, so a batch may hold the end of one
and the start of the next. Nothing is skipped on resume, and world size and workers do not enter.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from lgp_dist.config import DataConfig, TrainConfig
from lgp_dist.data.augment import Mixer, Transform, eval_transform, sample_rng, train_transform
from lgp_dist.data.decode import ShardFiles
from lgp_dist.data.index import ShardIndex, read_image
from lgp_dist.data.manifest import MANIFEST_NAME, ShardManifest
from lgp_dist.data.order import position_to_sample, stream_key
from lgp_dist.data.roots import open_root
from lgp_dist.errors import UserError
from lgp_dist.protocols import Batch

Parts = tuple[Tensor, Tensor, Tensor]
"""Images, targets and weight of a Batch."""


class Items(Protocol):
    """Micro-batches by number, as pure functions of it."""

    def __getitem__(self, number: int) -> Parts: ...


def open_split(data: DataConfig, split: str) -> ShardIndex:
    """The index of a split of data.root, after all checks that need no decoding; raises UserError at the first."""
    root = open_root(data)
    manifest = ShardManifest.load(root.folder)
    root.open_index(manifest, split)
    if manifest.classes and len(manifest.classes) != data.num_classes:
        raise UserError(
            f"{manifest.root / MANIFEST_NAME} has {len(manifest.classes)} classes but data.num_classes is"
            f" {data.num_classes}: set data.num_classes to {len(manifest.classes)}, or data.root to other shards."
        )
    index = ShardIndex.load(manifest, split, data.num_classes)
    return replace(index, files=ShardFiles(index.files.paths, root.open))


@dataclass(frozen=True, eq=False)
class TrainStream:
    """Training batches of one rank. Raises UserError when made if the batch does not fit world or data."""

    index: ShardIndex
    """The training split."""
    data: DataConfig
    """Input and augmentation."""
    train: TrainConfig
    """Batch size, micro-steps and mixing."""
    seed: int
    """Seeds order, augmentation and mixing."""
    rank: int
    """This process, 0 .. world - 1."""
    world: int
    """Number of processes."""

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world:
            raise ValueError(f"rank {self.rank} is not in a world of {self.world}")
        check_batch(self.train, self.world, len(self.index))

    @property
    def per_rank(self) -> int:
        """Images of one rank in one micro-step."""
        return self.train.batch_size // (self.world * self.train.accumulate)

    @property
    def steps_per_epoch(self) -> float:
        """Optimizer steps of a pass over the split; need not be whole."""
        return len(self.index) / self.train.batch_size

    def positions(self, step: int, micro: int) -> NDArray[np.int64]:
        """Positions [per_rank] of this rank's images, in the order of its batch.

        Step s has positions s * batch_size to (s + 1) * batch_size; micro-steps and in them ranks take theirs in turn.
        """
        start = step * self.train.batch_size + (micro * self.world + self.rank) * self.per_rank
        return np.arange(start, start + self.per_rank, dtype=np.int64)

    def batches(self, start_step: int, steps: int) -> Iterator[Batch]:
        """steps * accumulate batches, from optimizer step `start_step` on, those of a step one after the other.

        Raises UserError for an image that cannot be read or decoded, with any number of workers.
        """
        items = _TrainItems(self, train_transform(self.data), Mixer(self.train, self.data.num_classes))
        accumulate = self.train.accumulate
        yield from _load(items, range(start_step * accumulate, (start_step + steps) * accumulate), self.data.workers)

    def __call__(self, start_step: int, steps: int) -> Iterator[Batch]:
        """The same as `batches`."""
        return self.batches(start_step, steps)


def evaluation_batches(
    index: ShardIndex, data: DataConfig, batch_size: int, rank: int, world: int, limit: int | None = None
) -> Iterator[Batch]:
    """This rank's batches of a split; over all ranks every sample comes once with weight 1.

    All batches of all ranks have one size, at most batch_size, and all ranks have as many; what is left over is
    filled with zero images of label 0 and weight 0. limit: only so many samples, evenly spread over the split.
    """
    if batch_size < 1:
        raise UserError(f"The evaluation's batch_size is {batch_size}: set evaluate.batch_size to 1 or more.")
    count = len(index) if limit is None else min(limit, len(index))
    samples = np.arange(count, dtype=np.int64) * len(index) // max(count, 1)
    rounds = -(-count // (batch_size * world))
    size = -(-count // max(rounds * world, 1))
    table = np.full(rounds * world * size, -1, dtype=np.int64)
    table[:count] = samples
    mine = table.reshape(rounds, world, size)[:, rank]
    yield from _load(_CleanItems(index, data, eval_transform(data), tuple(mine)), range(rounds), data.workers)


def clean_batches(index: ShardIndex, data: DataConfig, count: int, batch_size: int, seed: int) -> Iterator[Batch]:
    """The first `count` samples (or all, if there are fewer) of epoch 0's order, not augmented; for one rank.

    The last batch may be smaller than batch_size.
    """
    order = position_to_sample(seed, 0, len(index))[:count]
    rows = tuple(order[start : start + batch_size] for start in range(0, len(order), batch_size))
    yield from _load(_CleanItems(index, data, eval_transform(data), rows), range(len(rows)), data.workers)


@dataclass(frozen=True, eq=False)
class _TrainItems:
    """Micro-batch k of the run, for one rank: step k // accumulate, micro-step k % accumulate."""

    stream: TrainStream
    transform: Transform
    mixer: Mixer

    def __getitem__(self, number: int) -> Parts:
        stream = self.stream
        positions = stream.positions(*divmod(number, stream.train.accumulate))
        images, labels = [], []
        for position in positions.tolist():
            epoch, place = divmod(position, len(stream.index))
            sample = int(self._order(epoch)[place])
            image = read_image(stream.index, sample, stream.data.channels)
            with sample_rng(stream.seed, epoch, sample):
                images.append(self.transform(image))
            labels.append(int(stream.index.label[sample]))
        key = stream_key("mix", stream.seed, int(positions[0]))
        mixed, targets = self.mixer(torch.stack(images), torch.tensor(labels), key)
        return mixed, targets, torch.ones(len(labels))

    @cached_property
    def _orders(self) -> dict[int, NDArray[np.int64]]:
        """Orders of the epochs that were needed last, at most two: a batch is no larger than an epoch."""
        return {}

    def _order(self, epoch: int) -> NDArray[np.int64]:
        """Order of an epoch, computed at most once for neighbouring batches."""
        if epoch not in self._orders:
            while len(self._orders) > 1:
                self._orders.pop(next(iter(self._orders)))
            self._orders[epoch] = position_to_sample(self.stream.seed, epoch, len(self.stream.index))
        return self._orders[epoch]


@dataclass(frozen=True, eq=False)
class _CleanItems:
    """Batches of given samples without augmentation; sample -1 is a filler."""

    index: ShardIndex
    data: DataConfig
    transform: Transform
    rows: Sequence[NDArray[np.int64]]

    def __getitem__(self, number: int) -> Parts:
        row = self.rows[number]
        images = torch.zeros(len(row), self.data.channels, self.data.image_size, self.data.image_size)
        labels, weight = torch.zeros(len(row), dtype=torch.int64), torch.zeros(len(row))
        for place, sample in enumerate(row.tolist()):
            if sample >= 0:
                images[place] = self.transform(read_image(self.index, sample, self.data.channels))
                labels[place], weight[place] = int(self.index.label[sample]), 1.0
        return images, labels, weight


@dataclass(frozen=True)
class _Failure:
    """A UserError on its way out of a worker: torch would wrap the error itself and add a traceback to its text."""

    sentence: str


@dataclass(frozen=True, eq=False)
class _Guarded:
    """Items that return a _Failure where they would raise UserError."""

    items: Items

    def __getitem__(self, number: int) -> Parts | _Failure:
        try:
            return self.items[number]
        except UserError as error:
            return _Failure(str(error))


def _unchanged(item: Any) -> Any:
    """No collation: an item is a batch already."""
    return item


def _load(items: Items, numbers: range, workers: int) -> Iterator[Batch]:
    """The numbered items in order, made by `workers` processes (0: in this one), in pinned memory if there is CUDA."""
    if workers < 0:
        raise UserError(f"data.workers is {workers}: set it to 0 or to a number of processes.")
    loader = DataLoader(
        _Guarded(items),  # type: ignore[arg-type]  # torch asks only for __getitem__
        sampler=numbers,
        batch_size=None,
        num_workers=min(workers, len(numbers)),
        collate_fn=_unchanged,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # its base seed is not used; taking it from here leaves the global one alone
    )
    for item in loader:
        if isinstance(item, _Failure):
            raise UserError(item.sentence)
        yield Batch(*item)


def check_batch(train: TrainConfig, world: int, n: int, prefix: str = "") -> None:
    """Raises UserError unless a global batch can be cut into equal parts and an epoch of n images can feed it.

    prefix: of the keys that the sentence names, such as `finetune.train.`.
    """
    size, accumulate = train.batch_size, train.accumulate
    for key, value in (("batch_size", size), ("accumulate", accumulate)):
        if value < 1:
            raise UserError(f"{prefix}{key} is {value}: set it to 1 or more.")
    if size > n:
        raise UserError(
            f"{n} images cannot feed a batch of {size} at world size {world}: set {prefix}batch_size to {n} or less,"
            " or use more images."
        )
    mixes = train.mixup > 0 or train.cutmix > 0
    unit = world * accumulate * (2 if mixes else 1)
    if size % unit:
        near = [value for value in (size // unit * unit, size // unit * unit + unit) if 0 < value <= n]
        fits = f"set {prefix}batch_size to {' or '.join(map(str, near))}" if near else "use fewer ranks or micro-steps"
        pairs = ", in even parts because mixup and cutmix pair images" if mixes else ""
        raise UserError(
            f"{prefix}batch_size {size} cannot be cut into equal parts for world size {world} and accumulate"
            f" {accumulate}{pairs}: {fits}."
        )
