"""Batches for one rank: training in an order that is a pure function of (seed, position), evaluation and clean images.

The state of a training stream is one number: the position, counted in samples from the start of the run. Position p is
sample `SampleOrder.samples(p)` in epoch p // n. Epochs follow each other without a gap, so a batch may hold the end of
one and the start of the next. Nothing is skipped on resume, and world size and threads do not enter.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lgp_dist.config.run_config import DataConfig, TrainConfig
from lgp_dist.data.augment.keyed_random import sample_keys
from lgp_dist.data.augment.mixing import Mixer
from lgp_dist.data.augment.pixels import Pixels
from lgp_dist.data.bad import BadSamples
from lgp_dist.data.loader import Loaded, Loader, Plan
from lgp_dist.data.order import LANES, DataCursor, SampleOrder
from lgp_dist.data.remote.roots import open_root
from lgp_dist.data.shards.decode import ShardFiles
from lgp_dist.data.shards.index import ShardIndex
from lgp_dist.data.shards.manifest import MANIFEST_NAME, ShardManifest
from lgp_dist.errors import UserError
from lgp_dist.protocols import Batch

CPU = torch.device("cpu")
LOOK = 64
"""Optimizer steps after which a remote source is told again what the next two times as many will read."""
NAMED = 3
"""Samples of a batch that a sentence names."""


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
    return replace(index, files=ShardFiles(index.files.paths, root.source))


def order_of(index: ShardIndex, data: DataConfig, seed: int) -> SampleOrder:
    """The order of a split; raises UserError for a window that is none."""
    if data.window < 1:
        raise UserError(f"data.window is {data.window}: set it to 1 or more shards.")
    return SampleOrder(tuple(np.bincount(index.shard, minlength=len(index.shards)).tolist()), seed, data.window)


def fingerprint_of(index: ShardIndex, data: DataConfig) -> str:
    """Stands for what an order is made of: every sample's place, size, key and label, and the rule's constants."""
    digest = blake2b(f"order 1/{LANES}/{data.window}/{'/'.join(index.shards)}".encode(), digest_size=12)
    for array in (index.shard, index.offset, index.size, index.label):
        digest.update(np.ascontiguousarray(array, dtype="<i8").tobytes())
    digest.update("/".join(index.keys.tolist()).encode())
    return digest.hexdigest()


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
    device: torch.device = CPU
    """Where batches are augmented and given."""
    origin: int = 0
    """Position of step 0: see `at`."""
    bad: BadSamples = field(init=False)
    """Bad samples so far."""

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world:
            raise ValueError(f"rank {self.rank} is not in a world of {self.world}")
        check_batch(self.train, self.world, len(self.index))
        object.__setattr__(self, "bad", BadSamples(self.data.max_bad))

    @property
    def per_rank(self) -> int:
        """Images of one rank in one micro-step."""
        return self.train.batch_size // (self.world * self.train.accumulate)

    @property
    def steps_per_epoch(self) -> float:
        """Optimizer steps of a pass over the split; need not be whole."""
        return len(self.index) / self.train.batch_size

    @cached_property
    def order(self) -> SampleOrder:
        """From position to sample."""
        return order_of(self.index, self.data, self.seed)

    @cached_property
    def fingerprint(self) -> str:
        """Of the index and the rule of the order."""
        return fingerprint_of(self.index, self.data)

    def cursor(self, step: int) -> DataCursor:
        """The state after `step` optimizer steps: the same on every rank."""
        return DataCursor(self.origin + step * self.train.batch_size, self.fingerprint)

    def at(self, cursor: DataCursor, step: int = 0) -> "TrainStream":
        """This stream with a step at a cursor, whatever world and batch size the cursor was made with.

        Raises UserError for a cursor of other shards.
        """
        cursor.check(self.fingerprint, f"those of {self.index.root}")
        return replace(self, origin=cursor.position - step * self.train.batch_size)

    def positions(self, step: int, micro: int) -> NDArray[np.int64]:
        """Positions [per_rank] of this rank's images, in the order of its batch.

        Step s has positions s * batch_size to (s + 1) * batch_size after the origin, and each micro-step its part of
        them. Ranks take turns in it, with pairs where samples mix with their neighbours: so a rank stays on the same
        lanes of the order, and with them on few shards, where the world size (twice that for pairs) divides the lanes.
        """
        turn = 2 if self.train.mixup > 0 or self.train.cutmix > 0 else 1
        start = self.origin + step * self.train.batch_size + micro * self.world * self.per_rank
        turns = np.arange(self.per_rank // turn, dtype=np.int64) * self.world + self.rank
        return (start + turns[:, None] * turn + np.arange(turn, dtype=np.int64)).ravel()

    def describe(self, step: int, micro: int, rank: int) -> str:
        """Shards and keys of the first samples of a rank's batch and how many more there are, for sentences."""
        samples = self.order.samples(replace(self, rank=rank).positions(step, micro)).tolist()
        more = [f"{len(samples) - NAMED} more"] * (len(samples) > NAMED)
        return "; ".join([*map(self.index.describe, samples[:NAMED]), *more])

    def shards_ahead(self, step: int, steps: int) -> list[str]:
        """Names of the shards that this rank reads in some steps, in the order of their first use."""
        found: dict[str, None] = {}
        for number in range(step * self.train.accumulate, (step + steps) * self.train.accumulate):
            samples = self.order.samples(self.positions(*divmod(number, self.train.accumulate)))
            found |= dict.fromkeys(self.index.shards[shard] for shard in self.index.shard[samples].tolist())
        return list(found)

    def batches(self, start_step: int, steps: int) -> Iterator[Batch]:
        """steps * accumulate batches, from optimizer step `start_step` on, those of a step one after the other.

        Their facts hold `bad_samples`, the number of images that stand in for bad ones, and what the source of the
        shards counted since the last. Raises UserError for a shard that cannot be read, and above data.max_bad for an
        image, with any number of threads.
        """
        source, before = self.index.files.source, self.index.files.source.counts()
        pixels = Pixels(self.data, self.device)
        mixer = Mixer(self.train, self.data.num_classes)
        accumulate = self.train.accumulate
        numbers = range(start_step * accumulate, (start_step + steps) * accumulate)
        for loaded in Loader(self.index, self.data, self.device).load(self._plans(numbers)):
            self.bad.note(self.index, loaded.plan.epoch, loaded.bad)
            keys = loaded.plan.keys
            assert keys is not None
            labels = torch.from_numpy(self.index.label[loaded.samples]).to(self.device)
            images, targets = mixer(pixels.augment(loaded.images, keys ^ np.uint64(4)), labels, keys ^ np.uint64(8))
            now = source.counts()
            facts = {"bad_samples": len(loaded.bad)} | {name: value - before[name] for name, value in now.items()}
            before = now
            yield Batch(images, targets, torch.ones(len(labels), device=self.device), facts)

    def __call__(self, start_step: int, steps: int) -> Iterator[Batch]:
        """The same as `batches`."""
        return self.batches(start_step, steps)

    def check_bad(self, lines: Sequence[Mapping[str, int]]) -> None:
        """Raises UserError where the bad samples of all ranks in an epoch are more than data.max_bad.

        lines: `step` and `bad_samples`, summed over ranks, of each optimizer step; the same on every rank.
        """
        self.bad.check_all({line["step"]: line["bad_samples"] for line in lines}, self._epoch)

    def _epoch(self, step: int) -> int:
        """The epoch in which a step begins."""
        return (self.origin + step * self.train.batch_size) // len(self.index)

    def _plans(self, numbers: range) -> Iterator[Plan]:
        """What is to be read for each micro-batch of the run."""
        source, last = self.index.files.source, 0
        for number in numbers:
            step, micro = divmod(number, self.train.accumulate)
            if source.fetches and step >= last:
                end = -(-numbers.stop // self.train.accumulate)
                source.prefetch(self.shards_ahead(step, min(2 * LOOK, end - step)))
                last = step + LOOK
            positions = self.positions(step, micro)
            samples = self.order.samples(positions)
            keys = sample_keys("augment", self.seed, positions // len(self.index), samples)
            yield Plan(samples, keys, self._epoch(step))


class ResumableStream:
    """A training stream whose state can be taken and put back."""

    def __init__(self, stream: TrainStream):
        self.now = stream

    def batches(self, start_step: int, steps: int) -> Iterator[Batch]:
        """As TrainStream.batches."""
        return self.now.batches(start_step, steps)

    def check(self, lines: Sequence[Mapping[str, int]]) -> None:
        """As TrainStream.check_bad."""
        self.now.check_bad(lines)

    def describe(self, step: int, micro: int, rank: int) -> str:
        """As TrainStream.describe."""
        return self.now.describe(step, micro, rank)

    def state(self, step: int) -> dict[str, Any]:
        """Plain values that say where the stream stands after `step` optimizer steps."""
        cursor = self.now.cursor(step)
        return {"position": cursor.position, "fingerprint": cursor.fingerprint, "bad": self.now.bad.counts()}

    def restore(self, state: Mapping[str, Any], step: int) -> None:
        """Goes on from such a state at a step; UserError where it belongs to other shards."""
        self.now = self.now.at(DataCursor(state["position"], state["fingerprint"]), step)
        self.now.bad.restore(state["bad"])


def evaluation_batches(
    index: ShardIndex,
    data: DataConfig,
    batch_size: int,
    rank: int,
    world: int,
    limit: int | None = None,
    device: torch.device = CPU,
) -> Iterator[Batch]:
    """This rank's batches of a split; over all ranks every sample comes once with weight 1.

    All batches of all ranks have one size, at most batch_size, and all ranks have as many; what is left over is
    filled with zero images of label 0 and weight 0, and so is the place of a bad sample: up to data.max_bad of them on
    a rank, then UserError. limit: only so many samples, evenly spread over the split.
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
    yield from _clean(index, data, (Plan(row, replaces=False) for row in mine), device)


def clean_batches(
    index: ShardIndex, data: DataConfig, count: int, batch_size: int, seed: int, device: torch.device = CPU
) -> Iterator[Batch]:
    """The first `count` samples (or all, if there are fewer) of epoch 0's order, not augmented; for one rank.

    The last batch may be smaller than batch_size. A bad sample is replaced as in training.
    """
    order = order_of(index, data, seed).samples(np.arange(min(count, len(index)), dtype=np.int64))
    rows = (order[start : start + batch_size] for start in range(0, len(order), batch_size))
    yield from _clean(index, data, map(Plan, rows), device)


def _clean(index: ShardIndex, data: DataConfig, plans: Iterable[Plan], device: torch.device) -> Iterator[Batch]:
    """Batches of given samples without augmentation."""
    pixels, bad = Pixels(data, device), BadSamples(data.max_bad)
    for loaded in Loader(index, data, device).load(plans):
        bad.note(index, 0, loaded.bad)
        images, labels, weight = _finish(index, pixels, loaded, device)
        yield Batch(images, labels, weight, {"bad_samples": len(loaded.bad)})


def _finish(index: ShardIndex, pixels: Pixels, loaded: Loaded, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Images, labels and weights; zeros where there is no sample."""
    there = loaded.samples >= 0
    weight = torch.from_numpy(there.astype(np.float32)).to(device)
    labels = torch.from_numpy(np.where(there, index.label[loaded.samples], 0).astype(np.int64)).to(device)
    return pixels.normalise(loaded.images) * weight.view(-1, 1, 1, 1), labels, weight


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
