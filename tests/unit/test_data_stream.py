"""Order, ranks, workers, evaluation."""

import copy
import dataclasses
import multiprocessing
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lgp_dist.config import AugmentConfig, DataConfig, TrainConfig
from lgp_dist.data.decode import OPEN_FILES, ShardFiles
from lgp_dist.data.index import ShardIndex, read_image
from lgp_dist.data.manifest import ShardManifest
from lgp_dist.data.stream import TrainStream, clean_batches, evaluation_batches, open_split, position_to_sample

SAMPLE = Path(__file__).parents[2] / "shards" / "sample"
DATA = DataConfig(
    root=str(SAMPLE),
    val_split="test",
    image_size=28,
    channels=1,
    num_classes=10,
    mean=(0.25,),
    std=(0.5,),
    crop_pct=1.0,
    workers=0,
    augment=AugmentConfig(crop_scale=(0.5, 1.0), auto_augment="rand-m9-mstd0.5", random_erase=0.5),
)


def part(count: int, split: str = "test") -> ShardIndex:
    """The first samples of a split."""
    index = open_split(DATA, split)
    arrays = {name: getattr(index, name)[:count] for name in ("shard", "offset", "size", "label", "keys")}
    return dataclasses.replace(index, **arrays)


def global_positions(index: ShardIndex, train: TrainConfig, world: int, steps: int) -> np.ndarray:
    """Positions [steps, batch] in the order micro-step, rank."""
    streams = [TrainStream(index, DATA, train, 0, rank, world) for rank in range(world)]
    rows = [
        [streams[rank].positions(step, micro) for micro in range(train.accumulate) for rank in range(world)]
        for step in range(steps)
    ]
    return np.array([np.concatenate(row) for row in rows])


@pytest.mark.parametrize("n", [1, 2, 37, 1000])
def test_order_is_a_permutation_that_seed_and_epoch_change(n: int) -> None:
    orders = [position_to_sample(seed, epoch, n) for seed in (0, 1) for epoch in (0, 1, 2)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(n))
    if n >= 37:
        assert len({tuple(order.tolist()) for order in orders}) == 6
    assert np.array_equal(position_to_sample(0, 1, n), orders[1])


def test_order_never_changes() -> None:
    """Pinned: another order would make resumed runs and published seeds wrong."""
    assert position_to_sample(0, 0, 12).tolist() == [0, 8, 11, 1, 6, 10, 7, 3, 4, 2, 5, 9]
    assert position_to_sample(7, 3, 12).tolist() == [7, 3, 1, 8, 5, 9, 2, 6, 0, 11, 4, 10]


def test_order_is_uniform() -> None:
    """Each sample comes to each place about equally often: chi square of 36 cells, 25 free; 60 is p < 1e-4."""
    counts = np.zeros((6, 6))
    for epoch in range(3000):
        counts[np.arange(6), position_to_sample(5, epoch, 6)] += 1
    assert ((counts - 500) ** 2 / 500).sum() < 60


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_global_sequence_is_the_same_for_ranks_and_micro_steps(world: int, accumulate: int) -> None:
    train = TrainConfig(batch_size=24, accumulate=accumulate)
    found = global_positions(part(100), train, world, 9)
    assert np.array_equal(found, np.arange(9 * 24).reshape(9, 24))


def test_each_sample_once_per_epoch_and_batches_straddle() -> None:
    index = part(50)
    stream = TrainStream(index, DATA, TrainConfig(batch_size=20), 3, 0, 1)
    assert stream.steps_per_epoch == 2.5
    labels = torch.cat([batch.targets for batch in stream.batches(0, 5)]).numpy()
    orders = [position_to_sample(3, epoch, 50) for epoch in (0, 1)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(50))
    assert np.array_equal(labels, index.label[np.concatenate(orders)])
    assert not np.array_equal(orders[0], orders[1])


def test_resume_is_arithmetic() -> None:
    stream = TrainStream(part(50), DATA, TrainConfig(batch_size=12, accumulate=2, mixup=0.5), 3, 0, 1)
    whole, rest = list(stream.batches(0, 6)), list(stream(4, 2))
    assert len(whole) == 12 and len(rest) == 4
    for left, right in zip(whole[8:], rest, strict=True):
        assert torch.equal(left.images, right.images) and torch.equal(left.targets, right.targets)


def test_pixels_do_not_depend_on_ranks_or_workers() -> None:
    index, train = part(50), TrainConfig(batch_size=20)
    one = list(TrainStream(index, DATA, train, 3, 0, 1).batches(0, 4))
    forked = dataclasses.replace(DATA, workers=2)
    two = [list(TrainStream(index, forked, train, 3, rank, 2).batches(0, 4)) for rank in (0, 1)]
    for step, whole in enumerate(one):
        assert torch.equal(whole.images, torch.cat([two[0][step].images, two[1][step].images]))
        assert torch.equal(whole.targets, torch.cat([two[0][step].targets, two[1][step].targets]))
        assert whole.images.shape == (20, 1, 28, 28) and whole.images.dtype == torch.float32
        assert whole.weight.tolist() == [1.0] * 20
    other = next(TrainStream(index, DATA, train, 4, 0, 1).batches(0, 1))
    assert not torch.equal(other.images, one[0].images)


def test_augmentation_differs_between_epochs_and_leaves_the_generators_alone() -> None:
    index = part(1)
    stream = TrainStream(index, DATA, TrainConfig(batch_size=1), 0, 0, 1)
    torch.manual_seed(5)
    np.random.seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    images = [batch.images for batch in stream.batches(0, 8)]
    assert torch.equal(torch.get_rng_state(), before[0]) and np.array_equal(np.random.get_state()[1], before[1])
    assert len({tuple(image.flatten().tolist()) for image in images}) >= 7


def test_copies_and_forks_read_the_same() -> None:
    index = part(8)
    here = [read_image(index, i, 1).tobytes() for i in range(8)]
    copied = copy.deepcopy(index)  # by way of __getstate__, as for a spawned process
    assert index.files._handles and not copied.files._handles
    assert [read_image(copied, i, 1).tobytes() for i in range(8)] == here
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.starmap(read_bytes, [(index, i) for i in range(8)]) == here
    assert [read_image(index, i, 1).tobytes() for i in range(8)] == here


def read_bytes(index: ShardIndex, i: int) -> bytes:
    return read_image(index, i, 1).tobytes()


def test_open_files_are_bounded(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}" for number in range(OPEN_FILES + 10)]
    for number, path in enumerate(paths):
        path.write_bytes(b"%05d" % number)
    files = ShardFiles(paths)
    for number in [*range(len(paths)), 0, 3]:
        assert files.read(number, 1, 4) == b"%04d" % number
        assert len(files._handles) <= OPEN_FILES


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize(("count", "batch_size", "limit"), [(50, 8, None), (50, 64, None), (3, 8, None), (50, 8, 19)])
def test_evaluation_counts_every_sample_once(world: int, count: int, batch_size: int, limit: int | None) -> None:
    index = part(count)
    ranks = [list(evaluation_batches(index, DATA, batch_size, rank, world, limit)) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    shapes = {tuple(batch.images.shape) for batches in ranks for batch in batches}
    assert len(shapes) == 1 and shapes.pop()[0] <= batch_size
    seen: Counter[bytes] = Counter()
    for batch in (batch for batches in ranks for batch in batches):
        assert set(batch.weight.tolist()) <= {0.0, 1.0}
        for image, label, weight in zip(batch.images, batch.targets, batch.weight, strict=True):
            if weight:
                seen[bytes([int(label)]) + ((image * 0.5 + 0.25) * 255).round().byte().numpy().tobytes()] += 1
    truth = Counter(bytes([int(index.label[i])]) + read_image(index, i, 1).tobytes() for i in range(count))
    if limit is None:
        assert seen == truth
    else:
        assert seen <= truth and seen.total() == limit


def test_evaluation_with_workers_is_the_same() -> None:
    index = part(30)
    alone = list(evaluation_batches(index, DATA, 8, 0, 1))
    forked = list(evaluation_batches(index, dataclasses.replace(DATA, workers=2), 8, 0, 1))
    assert len(alone) == len(forked) == 4
    assert all(torch.equal(a.images, b.images) for a, b in zip(alone, forked, strict=True))


def test_clean_batches_are_the_first_of_the_order_without_augmentation() -> None:
    index = part(40)
    batches = list(clean_batches(index, DATA, 25, 10, seed=3))
    assert [len(batch.images) for batch in batches] == [10, 10, 5]
    order = position_to_sample(3, 0, 40)[:25]
    pixels = np.stack([np.asarray(read_image(index, int(i), 1)) for i in order])[:, None]
    assert np.allclose(torch.cat([b.images for b in batches]).numpy(), (pixels / 255 - 0.25) / 0.5, atol=1e-6)
    assert np.array_equal(torch.cat([b.targets for b in batches]).numpy(), index.label[order])
    assert sum(len(batch.images) for batch in clean_batches(index, DATA, 1000, 16, seed=3)) == 40


def test_three_channels_read_grey_shards() -> None:
    data = dataclasses.replace(DATA, channels=3, mean=(0.1, 0.2, 0.3), std=(0.5, 0.5, 0.5), image_size=32)
    batch = next(TrainStream(part(4), data, TrainConfig(batch_size=4), 0, 0, 1).batches(0, 1))
    assert batch.images.shape == (4, 3, 32, 32)
    assert read_image(part(4), 0, 3).mode == "RGB" and isinstance(read_image(part(4), 0, 3), Image.Image)


def test_open_split_takes_manifest_and_index() -> None:
    manifest = ShardManifest.load(SAMPLE)
    assert open_split(DATA, "train").keys.tolist() == ShardIndex.load(manifest, "train", 10).keys.tolist()
