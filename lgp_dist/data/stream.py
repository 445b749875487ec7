"""Batches for one rank: training in an order that is a pure function of (seed, position), evaluation and clean images.

The state of a training stream is one number: the position, counted in samples from the start of the run. Position p is
sample `SampleOrder.samples(p)` in epoch p // n. Epochs follow each other without a gap, so a batch may hold the end of
one and the start of the next. A resume skips nothing: it computes the next positions. World size and threads do not
matter, since ranks share the positions of a step and each image's randomness is keyed by its sample and epoch.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch
from numpy.typing import NDArray

from lgp_dist.config.data_config import DataConfig
from lgp_dist.config.ranges import check_data, check_value
from lgp_dist.config.run_config import TrainConfig
from lgp_dist.data.augment.keyed_random import sample_keys
from lgp_dist.data.augment.mixing import Mixer
from lgp_dist.data.augment.pixels import Pixels
from lgp_dist.data.loader import Loader, Plan
from lgp_dist.data.order import LANES, SampleOrder
from lgp_dist.data.remote.roots import RemoteRoot, open_root
from lgp_dist.data.shards.decode import BadImage, ShardFiles
from lgp_dist.data.shards.index import ShardIndex
from lgp_dist.data.shards.manifest import MANIFEST_NAME, ShardManifest
from lgp_dist.errors import UserError
from lgp_dist.protocols import Batch

log = logging.getLogger("lgp")

CPU = torch.device("cpu")
LOOK = 64
"""Every so many optimizer steps, a remote source is told which shards twice as many steps will read."""
NAMED = 3
"""Samples of a batch that a sentence names."""


class StreamState(TypedDict):
    """Where a training stream stands: the same on every rank, for any world size and batch size."""

    position: int
    """Samples that the optimizer has consumed since the start of the run."""
    fingerprint: str
    """Of the index and the rule of the order."""
    bad: dict[str, int]
    """Bad samples of all ranks by epoch."""


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
    if isinstance(root, RemoteRoot):
        return replace(index, files=ShardFiles([Path(name) for name in index.shards], root.cache))
    return index


def order_of(index: ShardIndex, data: DataConfig, seed: int) -> SampleOrder:
    """The order of a split."""
    return SampleOrder(tuple(np.bincount(index.shard, minlength=len(index.shards)).tolist()), seed, data.window)


def fingerprint_of(index: ShardIndex, data: DataConfig) -> str:
    """Hash of what an order depends on: every sample's place, size, key and label, and the rule's constants."""
    digest = blake2b(f"order 1/{LANES}/{data.window}/{'/'.join(index.shards)}".encode(), digest_size=12)
    for array in (index.shard, index.offset, index.size, index.label):
        digest.update(np.ascontiguousarray(array, dtype="<i8").tobytes())
    digest.update("/".join(index.keys.tolist()).encode())
    return digest.hexdigest()


class BadSamples:
    """The bad samples that one rank met, counted by epoch: in an epoch every sample comes once."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.reasons: dict[int, str] = {}
        """Sample -> what is wrong with it, in the order they were met."""
        self._here: Counter[int] = Counter()
        self._everywhere: Counter[int] = Counter()
        self._last = ""

    def note(self, index: ShardIndex, epoch: int, found: Sequence[tuple[int, BadImage]]) -> None:
        """Counts those of a batch; UserError where this rank alone has more than the limit in an epoch."""
        for sample, error in found:
            if sample not in self.reasons:
                self.reasons[sample] = error.reason
                log.warning("bad sample: %s: %s", index.describe(sample), error.reason)
            self._here[epoch] += 1
            self._last = str(error)
            if self._here[epoch] > self.limit:
                self._stop(self._here[epoch], epoch)

    def add(self, epoch: int, count: int) -> None:
        """Adds a count of all ranks; UserError where the epoch then has more than the limit."""
        self._everywhere[epoch] += count
        if self._everywhere[epoch] > self.limit:
            self._stop(self._everywhere[epoch], epoch)

    def counts(self) -> dict[str, int]:
        """Bad samples of all ranks by epoch, for JSON."""
        return {str(epoch): count for epoch, count in self._everywhere.items()}

    def restore(self, counts: Mapping[str, int]) -> None:
        """Continues from the counts of an earlier start."""
        self._everywhere = Counter({int(epoch): count for epoch, count in counts.items()})

    def _stop(self, count: int, epoch: int) -> None:
        last = f"; the last of this rank: {self._last}" if self._last else ": the log names them."
        raise UserError(f"{count} images of epoch {epoch} are bad, and data.max_bad allows {self.limit}{last}")


@dataclass(eq=False)
class TrainStream:
    """Training batches of one rank. UserError when made if a setting is out of range, or the batch does not fit world
    or data."""

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
    """Where batches are augmented and returned."""
    origin: int = 0
    """Position of step 0."""

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world:
            raise ValueError(f"rank {self.rank} is not in a world of {self.world}")
        check_data(self.data)
        check_batch(self.train, self.world, len(self.index))
        self.bad = BadSamples(self.data.max_bad)

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

    def position(self, step: int) -> int:
        """Samples that are consumed after `step` optimizer steps."""
        return self.origin + step * self.train.batch_size

    def state(self, step: int) -> StreamState:
        """Where the stream stands after `step` optimizer steps."""
        return StreamState(position=self.position(step), fingerprint=self.fingerprint, bad=self.bad.counts())

    def restore(self, state: StreamState, step: int) -> None:
        """Continues from such a state with `step`, also that of another world and batch size; UserError where it is of
        other shards."""
        position, fingerprint = state["position"], state["fingerprint"]
        if position < 0:
            raise UserError(f"The data position {position} is below 0: resume from another checkpoint.")
        if fingerprint != self.fingerprint:
            raise UserError(
                f"The data position {position} belongs to other shards or another data.window ({fingerprint}) than"
                f" those of {self.index.root} ({self.fingerprint}): set data.root and data.window as they were, or"
                " begin a new run."
            )
        self.origin = position - step * self.train.batch_size
        self.bad.restore(state["bad"])

    def positions(self, step: int, micro: int) -> NDArray[np.int64]:
        """Positions [per_rank] of this rank's images, in the order of its batch.

        Step s has positions s * batch_size to (s + 1) * batch_size after the origin, and each micro-step its part of
        them.
        """
        # Ranks take turns, one position at a time, or a pair where neighbours mix. A rank thus stays on the same lanes
        # of the order, and so on few shards, where the world size (twice that for pairs) divides the lanes.
        turn = 2 if self.train.mixup > 0 or self.train.cutmix > 0 else 1
        start = self.position(step) + micro * self.world * self.per_rank
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
        """steps * accumulate batches from optimizer step `start_step` on, the micro-steps of a step in order.

        Their facts hold `bad_samples`, the number of images that replace bad ones, and what the source of the shards
        counted since the last batch. Raises UserError for a shard that cannot be read, and for an image above
        data.max_bad, at the same batch for any number of threads.
        """
        source = self.index.files.source
        before = source.counts() if source else {}
        pixels = Pixels(self.data, self.device)
        mixer = Mixer(self.train, self.data.num_classes)
        for loaded in Loader(self.index, self.data, self.device).load(self.plans(start_step, steps)):
            self.bad.note(self.index, loaded.plan.epoch, loaded.bad)
            keys = loaded.plan.keys
            assert keys is not None
            labels = torch.from_numpy(self.index.label[loaded.samples]).to(self.device)
            images, targets = mixer(pixels.augment(loaded.images, keys ^ np.uint64(4)), labels, keys ^ np.uint64(8))
            now = source.counts() if source else {}
            facts = {"bad_samples": len(loaded.bad)} | {name: value - before[name] for name, value in now.items()}
            before = now
            yield Batch(images, targets, torch.ones(len(labels), device=self.device), facts)

    def check_bad(self, lines: Sequence[Mapping[str, int]]) -> None:
        """UserError where the bad samples of all ranks in an epoch are more than data.max_bad.

        lines: `step` and `bad_samples`, summed over ranks, of each optimizer step; the same on every rank.
        """
        for line in lines:
            self.bad.add(self._epoch(line["step"]), line["bad_samples"])

    def _epoch(self, step: int) -> int:
        """The epoch in which a step begins."""
        return self.position(step) // len(self.index)

    def plans(self, start_step: int, steps: int) -> Iterator[Plan]:
        """What each micro-step reads."""
        source, announced, end = self.index.files.source, start_step, start_step + steps
        for step in range(start_step, end):
            if source and step >= announced:
                source.prefetch(self.shards_ahead(step, min(2 * LOOK, end - step)))
                announced = step + LOOK
            for micro in range(self.train.accumulate):
                positions = self.positions(step, micro)
                samples = self.order.samples(positions)
                keys = sample_keys("augment", self.seed, positions // len(self.index), samples)
                yield Plan(samples, keys, self._epoch(step))


def evaluation_rounds(index: ShardIndex, batch_size: int, world: int, limit: int | None = None) -> int:
    """The number of `evaluation_batches` of each rank."""
    check_value("evaluate.batch_size", batch_size)
    return -(-(len(index) if limit is None else min(limit, len(index))) // (batch_size * world))


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

    All ranks have equally many batches of one size, at most batch_size. Zero images of label 0 and weight 0 fill them
    up and replace bad samples: up to data.max_bad on a rank, then UserError. limit: only so many samples, evenly spread
    over the split.
    """
    rounds = evaluation_rounds(index, batch_size, world, limit)
    count = len(index) if limit is None else min(limit, len(index))
    samples = np.arange(count, dtype=np.int64) * len(index) // max(count, 1)
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
    """Batches of these samples without augmentation; zeros where there is no sample."""
    pixels, bad = Pixels(data, device), BadSamples(data.max_bad)
    for loaded in Loader(index, data, device).load(plans):
        bad.note(index, 0, loaded.bad)
        there = loaded.samples >= 0
        weight = torch.from_numpy(there.astype(np.float32)).to(device)
        labels = torch.from_numpy(np.where(there, index.label[loaded.samples], 0).astype(np.int64)).to(device)
        images = pixels.normalise(loaded.images) * weight.view(-1, 1, 1, 1)
        yield Batch(images, labels, weight, {"bad_samples": len(loaded.bad)})


def check_batch(train: TrainConfig, world: int, n: int, prefix: str = "") -> None:
    """UserError unless a global batch divides into equal parts and an epoch of n images can fill it.

    prefix: of the keys that the sentence names, such as `finetune.train.`.
    """
    size, accumulate = train.batch_size, train.accumulate
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
            f"{prefix}batch_size {size} cannot be divided into equal parts for world size {world} and accumulate"
            f" {accumulate}{pairs}: {fits}."
        )
