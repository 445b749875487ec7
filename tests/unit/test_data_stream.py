"""Order, ranks, threads, evaluation."""

import copy
import dataclasses
import multiprocessing
import os
import random
import threading
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lgp_dist.config.run_config import AugmentConfig, DataConfig, TrainConfig
from lgp_dist.data.order import position_to_sample
from lgp_dist.data.shards.decode import OPEN_FILES, ShardFiles
from lgp_dist.data.shards.index import ShardIndex, read_image
from lgp_dist.data.shards.manifest import ShardManifest
from lgp_dist.data.stream import TrainStream, clean_batches, evaluation_batches, evaluation_rounds, open_split
from lgp_dist.errors import UserError

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
    threads=0,
    augment=AugmentConfig(crop_scale=(0.5, 1.0), auto_augment="rand-m9-mstd0.5", random_erase=0.5),
)


def part(count: int, split: str = "test") -> ShardIndex:
    """The first samples of a split."""
    index = open_split(DATA, split)
    arrays = {name: getattr(index, name)[:count] for name in ("shard", "offset", "size", "label", "keys")}
    return dataclasses.replace(index, **arrays)


def turns(parts: list, turn: int) -> list:
    """The global batch from those of the ranks, which take turns with `turn` samples each."""
    return [item for start in range(0, len(parts[0]), turn) for part in parts for item in part[start : start + turn]]


def global_positions(index: ShardIndex, train: TrainConfig, world: int, steps: int) -> np.ndarray:
    """Positions [steps, batch] in the order micro-step, rank."""
    streams = [TrainStream(index, DATA, train, 0, rank, world) for rank in range(world)]
    found = []
    for step in range(steps):
        for micro in range(train.accumulate):
            found += turns([stream.positions(step, micro) for stream in streams], 1)
    return np.array(found).reshape(steps, -1)


@pytest.mark.parametrize("n", [1, 2, 37, 1000])
def test_order_is_a_permutation_that_seed_and_epoch_change(n: int) -> None:
    orders = [position_to_sample(seed, epoch, n) for seed in (0, 1) for epoch in (0, 1, 2)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(n))
    if n >= 37:
        assert len({tuple(order.tolist()) for order in orders}) == 6
    assert np.array_equal(position_to_sample(0, 1, n), orders[1])


def test_order_never_changes() -> None:
    """Pinned: another order would invalidate resumed runs and published seeds."""
    assert position_to_sample(0, 0, 12).tolist() == [0, 8, 11, 1, 6, 10, 7, 3, 4, 2, 5, 9]
    assert position_to_sample(7, 3, 12).tolist() == [7, 3, 1, 8, 5, 9, 2, 6, 0, 11, 4, 10]


def test_order_is_uniform() -> None:
    """Each sample reaches each place about equally often: chi-squared with 25 degrees of freedom; 60 is p < 1e-4."""
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


def test_samples_are_named_on_any_rank() -> None:
    """The first samples of a rank's batch, and the number of others; from a later origin too."""
    train = TrainConfig(batch_size=32, accumulate=2, mixup=0.8)
    streams = [TrainStream(part(100), DATA, train, 3, rank, 2, origin=64) for rank in (0, 1)]
    for rank, stream in enumerate(streams):
        plans = list(stream.plans(0, 4))
        for number, plan in enumerate(plans):
            first = [streams[0].index.keys[sample] for sample in plan.samples[:3]]
            said = streams[0].describe(*divmod(number, 2), rank)
            assert [word for key in first for word in ("sample", key)] == [
                word for text in said.split("; ")[:3] for word in text.split()[-2:]
            ]
            assert said.endswith("; 5 more")


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
    whole, rest = list(stream.batches(0, 6)), list(stream.batches(4, 2))
    assert len(whole) == 12 and len(rest) == 4
    for left, right in zip(whole[8:], rest, strict=True):
        assert torch.equal(left.images, right.images) and torch.equal(left.targets, right.targets)


def test_pixels_do_not_depend_on_ranks_or_threads() -> None:
    index, train = part(50), TrainConfig(batch_size=20)
    one = list(TrainStream(index, DATA, train, 3, 0, 1).batches(0, 4))
    threaded = dataclasses.replace(DATA, threads=2)
    two = [list(TrainStream(index, threaded, train, 3, rank, 2).batches(0, 4)) for rank in (0, 1)]
    for step, whole in enumerate(one):
        for name in ("images", "targets"):
            assert torch.equal(getattr(whole, name), torch.stack(turns([getattr(r[step], name) for r in two], 1)))
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
    opened = open_files(index.root)
    copied = copy.deepcopy(index)  # by way of __getstate__, as for a spawned process
    assert opened == open_files(index.root) > 0
    assert [read_image(copied, i, 1).tobytes() for i in range(8)] == here
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.starmap(read_bytes, [(index, i) for i in range(8)]) == here
    assert [read_image(index, i, 1).tobytes() for i in range(8)] == here


def open_files(folder: Path) -> int:
    """How many files of a folder this process has open."""
    links = [os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")]
    return sum(link.startswith(f"{folder.resolve()}/") for link in links)


def read_bytes(index: ShardIndex, i: int) -> bytes:
    return read_image(index, i, 1).tobytes()


def test_open_files_are_bounded(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}" for number in range(OPEN_FILES + 10)]
    for number, path in enumerate(paths):
        path.write_bytes(b"%05d" % number)
    files = ShardFiles(paths)
    for number in [*range(len(paths)), 0, 3]:
        assert files.read(number, 1, 4) == b"%04d" % number
        assert open_files(tmp_path) <= OPEN_FILES


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize(("count", "batch_size", "limit"), [(50, 8, None), (50, 64, None), (3, 8, None), (50, 8, 19)])
def test_evaluation_counts_every_sample_once(world: int, count: int, batch_size: int, limit: int | None) -> None:
    index = part(count)
    ranks = [list(evaluation_batches(index, DATA, batch_size, rank, world, limit)) for rank in range(world)]
    assert {len(batches) for batches in ranks} == {evaluation_rounds(index, batch_size, world, limit)}
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


def test_evaluation_with_threads_is_the_same() -> None:
    index = part(30)
    alone = list(evaluation_batches(index, DATA, 8, 0, 1))
    threaded = list(evaluation_batches(index, dataclasses.replace(DATA, threads=2), 8, 0, 1))
    assert len(alone) == len(threaded) == 4
    assert all(torch.equal(a.images, b.images) for a, b in zip(alone, threaded, strict=True))


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


# Bad samples


def broken(folder: Path, samples: list[int], count: int = 24) -> ShardIndex:
    """The first `count` training images as two shards, some of them damaged."""
    index = open_split(DATA, "train")
    content = [index.files.read(int(index.shard[i]), int(index.offset[i]), int(index.size[i])) for i in range(count)]
    content = [b"x" * len(image) if i in samples else image for i, image in enumerate(content)]
    shard = (np.arange(count) >= count // 2).astype(np.int32)
    paths = [folder / f"x-train-{number}.tar" for number in (0, 1)]
    offset = np.zeros(count, dtype=np.int64)
    for number, path in enumerate(paths):
        mine = np.flatnonzero(shard == number)
        offset[mine] = np.cumsum([0, *(len(content[i]) for i in mine[:-1])])
        path.write_bytes(b"".join(content[i] for i in mine))
    arrays = {name: getattr(index, name)[:count] for name in ("label", "keys")}
    arrays["crc"] = np.array([zlib.crc32(image) for image in content])
    size = np.array([len(image) for image in content], dtype=np.int64)
    names = tuple(path.name for path in paths)
    return dataclasses.replace(
        index, root=folder, shards=names, shard=shard, offset=offset, size=size, files=ShardFiles(paths), **arrays
    )


def train_on(index: ShardIndex, max_bad: int, threads: int = 0, rank: int = 0, world: int = 1) -> TrainStream:
    data = dataclasses.replace(DATA, max_bad=max_bad, threads=threads)
    return TrainStream(index, data, TrainConfig(batch_size=6), 0, rank, world)


@pytest.mark.parametrize("threads", [0, 3])
def test_bad_samples_are_replaced_in_place(tmp_path: Path, threads: int, caplog: pytest.LogCaptureFixture) -> None:
    """All other positions keep their pixels; a bad one gets image and label of the next good sample of its shard."""
    (tmp_path / "good").mkdir()
    good, bad = broken(tmp_path / "good", []), broken(tmp_path, [3, 4, 11, 20])
    stands_in = {3: 5, 4: 5, 11: 0, 20: 21}
    whole = list(train_on(good, 0).batches(0, 8))
    stream = train_on(bad, 4, threads)
    found = list(stream.batches(0, 8))
    order = np.concatenate([position_to_sample(0, epoch, 24) for epoch in (0, 1)])
    places = [(step, place) for step in range(8) for place in range(6)]
    for sample, (step, place) in zip(order.tolist(), places, strict=True):
        same = torch.equal(found[step].images[place], whole[step].images[place])
        assert same == (sample not in stands_in)
        assert found[step].targets[place] == bad.label[stands_in.get(sample, sample)]
    counts = [batch.facts["bad_samples"] for batch in found]
    assert sum(counts[:4]) == sum(counts[4:]) == 4 and sum(batch.facts["bad_samples"] for batch in whole) == 0
    assert stream.bad.reasons.keys() == {3, 4, 11, 20}
    named = [record.getMessage() for record in caplog.records]
    assert len(named) == 4, "each is named once"
    assert all(any(f"{bad.describe(i)}: its bytes are no image" in line for line in named) for i in stands_in)
    other = [list(train_on(bad, 4, 2, rank, 2).batches(0, 8)) for rank in (0, 1)]
    for step in range(8):
        assert torch.equal(found[step].images, torch.stack(turns([batches[step].images for batches in other], 1)))


@pytest.mark.slow
def test_a_thousand_bad_samples_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """No images, other bytes than were indexed, and half of an image: the logs of three ranks have these names, each
    once, and no other."""
    count = 9996
    bad = random.Random(0).sample(range(count), 1000)
    index = broken(tmp_path, bad[:400], count)
    changed, cut = np.array(bad[400:700]), np.array(bad[700:])
    index.crc[changed] ^= 1
    index.size[cut] //= 2
    for i in cut:
        index.crc[i] = zlib.crc32(index.files.read(int(index.shard[i]), int(index.offset[i]), int(index.size[i])))
    data = dataclasses.replace(DATA, max_bad=1000, augment=AugmentConfig(hflip=0.0))
    ranks = [
        TrainStream(index, data, TrainConfig(batch_size=84), 0, rank, 3).batches(0, count // 84) for rank in range(3)
    ]
    assert sum(batch.facts["bad_samples"] for batches in ranks for batch in batches) == 1000
    reasons = dict.fromkeys(bad[:400], "its bytes are no image")
    reasons |= dict.fromkeys(bad[400:700], "its bytes are not those that were indexed")
    reasons |= dict.fromkeys(bad[700:], "image file is truncated")
    expected = sorted(f"bad sample: {index.describe(i)}: {reason}" for i, reason in reasons.items())
    assert sorted(record.getMessage() for record in caplog.records) == expected


@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize("limit", [0, 1, 3])
def test_more_bad_samples_than_allowed_stop_the_run(tmp_path: Path, threads: int, limit: int) -> None:
    """At the same step with any number of threads; the sentence names the sample that was one too many."""
    index = broken(tmp_path, [3, 4, 11, 20])
    order = position_to_sample(0, 0, 24).tolist()
    places = sorted(order.index(sample) for sample in (3, 4, 11, 20))
    batches = train_on(index, limit, threads).batches(0, 4)
    for _ in range(places[limit] // 6):
        next(batches)
    with pytest.raises(UserError) as caught:
        next(batches)
    text = str(caught.value)
    assert f"The image of {index.describe(order[places[limit]])} cannot be decoded (its bytes are no image): " in text
    assert text.endswith(".") and text.startswith(
        "The image" if not limit else f"{limit + 1} images of epoch 0 are bad"
    )


def test_limit_holds_for_all_ranks_together(tmp_path: Path) -> None:
    """Counts summed over ranks stop every rank; each epoch counts from 0."""
    stream = train_on(broken(tmp_path, [3]), 3, rank=1, world=2)
    lines = [{"step": step, "bad_samples": count} for step, count in enumerate([1, 0, 2, 0, 3, 0, 0, 0, 1, 2])]
    stream.check_bad(lines)
    with pytest.raises(UserError, match="4 images of epoch 2 are bad, and data.max_bad allows 3: the log names them."):
        stream.check_bad([{"step": 11, "bad_samples": 1}])


@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize("how", ["cut", "vanished", "empty"])
def test_shard_lost_while_a_run_reads_it(
    tmp_path: Path, how: str, threads: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Samples of the next shard replace its samples, which are counted and named; with max_bad 0 the run stops."""
    index = broken(tmp_path, [])
    lost = tmp_path / index.shards[0]
    if how == "vanished":
        lost.unlink()
    else:
        lost.write_bytes(lost.read_bytes()[: 0 if how == "empty" else int(index.offset[7]) + 3])
    gone = list(range(7 if how == "cut" else 0, 12))
    stream = train_on(index, 24, threads)
    facts = sum(batch.facts["bad_samples"] for batch in stream.batches(0, 4))
    assert facts == len(gone) and sorted(stream.bad.reasons) == gone, "each once in an epoch of 24"
    named = [record.getMessage() for record in caplog.records]
    assert all(any(f"{index.describe(i)}: its shard " in line for line in named) for i in gone)
    with pytest.raises(UserError, match="copy the file again"):
        list(train_on(dataclasses.replace(index, files=ShardFiles(index.files.paths)), 0, threads).batches(0, 4))


def test_no_good_sample_near(tmp_path: Path) -> None:
    index = broken(tmp_path, list(range(24)))
    with pytest.raises(UserError, match="cannot be decoded .* again; neither can any of the samples after it."):
        list(train_on(index, 24).batches(0, 4))


@pytest.mark.parametrize("threads", [0, 2])
def test_bad_samples_of_evaluation_do_not_count(tmp_path: Path, threads: int) -> None:
    """A replacement would count an image twice: its place has weight 0 instead."""
    index = broken(tmp_path, [3, 20])
    data = dataclasses.replace(DATA, max_bad=2, threads=threads)
    batches = list(evaluation_batches(index, data, 5, 0, 1))
    weight, images = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("weight", "images"))
    assert np.flatnonzero(weight[:24].numpy() == 0).tolist() == [3, 20]
    assert not images[3].any() and not images[20].any() and images[4].any()
    with pytest.raises(UserError, match="2 images of epoch 0 are bad, and data.max_bad allows 1"):
        list(evaluation_batches(index, dataclasses.replace(data, max_bad=1), 5, 0, 1))


def test_bad_samples_of_clean_batches_are_replaced(tmp_path: Path) -> None:
    index, data = broken(tmp_path, [3, 20]), dataclasses.replace(DATA, max_bad=2)
    batches = list(clean_batches(index, data, 24, 24, seed=3))
    place = position_to_sample(3, 0, 24).tolist().index
    assert all(batches[0].weight == 1) and batches[0].facts["bad_samples"] == 2
    for bad, good in ((3, 4), (20, 21)):
        assert torch.equal(batches[0].images[place(bad)], batches[0].images[place(good)])


# Threads


def test_threads_may_share_open_files(tmp_path: Path) -> None:
    """8 threads read more shards than stay open: every byte is right."""
    paths = [tmp_path / f"{number}" for number in range(3 * OPEN_FILES)]
    for number, path in enumerate(paths):
        path.write_bytes(b"%05d" % number * 2000)
    files, opened = ShardFiles(paths), len(os.listdir("/proc/self/fd"))
    numbers = np.random.default_rng(0).integers(0, len(paths), 4000).tolist()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(partial(files.read, offset=5, size=5), numbers))
    assert found == [b"%05d" % number for number in numbers]
    assert len(os.listdir("/proc/self/fd")) <= opened + OPEN_FILES
    del files
    assert len(os.listdir("/proc/self/fd")) <= opened


def test_threads_end_with_the_batches() -> None:
    """Also where the reader stops in the middle."""
    before = threading.active_count()
    data = dataclasses.replace(DATA, threads=4)
    batches = TrainStream(part(50), data, TrainConfig(batch_size=10), 0, 0, 1).batches(0, 100)
    next(batches)
    assert threading.active_count() > before
    batches.close()
    assert threading.active_count() == before


def test_batches_are_not_overwritten() -> None:
    """A batch keeps its values when later ones are read."""
    for data in (DATA, dataclasses.replace(DATA, threads=2, augment=AugmentConfig(hflip=0.0))):
        given = [(batch.images, batch.images.clone()) for batch in evaluation_batches(part(50), data, 6, 0, 1)]
        stream = TrainStream(part(50), data, TrainConfig(batch_size=6), 0, 0, 1)
        given += [(batch.images, batch.images.clone()) for batch in stream.batches(0, 10)]
        assert all(torch.equal(images, copied) for images, copied in given)
