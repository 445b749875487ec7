"""The order of samples, whose whole state is the position: brute force on small sets, and at full size."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from lgp_dist.config.run_config import AugmentConfig, DataConfig, TrainConfig
from lgp_dist.data.order import LANES, SampleOrder, position_to_sample
from lgp_dist.data.shards.decode import ShardFiles
from lgp_dist.data.shards.index import ShardIndex
from lgp_dist.data.stream import StreamState, TrainStream, open_split
from lgp_dist.errors import UserError

SAMPLE = Path(__file__).parents[2] / "shards" / "sample"
DATA = DataConfig(
    root=str(SAMPLE),
    image_size=16,
    channels=1,
    num_classes=10,
    mean=(0.25,),
    std=(0.5,),
    crop_pct=1.0,
    window=2,
    threads=0,
    augment=AugmentConfig(crop_scale=(0.5, 1.0), auto_augment="rand-m9-mstd0.5-inc1", random_erase=0.5),
)
UNEVEN = (5, 1, 0, 9, 3, 7)
IMAGENET = (1252,) * 143 + (1251,) * 881
"""timm's 1,024 shards of 1,281,167 images, give or take a few."""


def uneven() -> ShardIndex:
    """25 images of the sample as six shards, one of them empty; every read goes to the true shard."""
    index = open_split(DATA, "train")
    numbers = np.arange(0, 10_000, 400)
    arrays = {name: getattr(index, name)[numbers] for name in ("offset", "size", "label", "keys", "crc")}
    true = index.shard[numbers]
    paths = [index.root / name for name in index.shards]

    class Files(ShardFiles):
        def read(self, shard: int, offset: int, size: int) -> bytes:
            sample = int(np.flatnonzero((arrays["offset"] == offset) & (fake == shard))[0])
            return super().read(int(true[sample]), offset, size)

    fake = np.repeat(np.arange(len(UNEVEN), dtype=np.int32), UNEVEN)
    names = tuple(f"part-train-{number}.tar" for number in range(len(UNEVEN)))
    return dataclasses.replace(index, shards=names, shard=fake, files=Files(paths), **arrays)


def in_turn(parts: list, turn: int) -> list:
    """The global batch from those of the ranks, which take turns with `turn` samples each."""
    return [item for start in range(0, len(parts[0]), turn) for part in parts for item in part[start : start + turn]]


@pytest.mark.parametrize("window", [1, 2, 3, 5, 6, 100])
@pytest.mark.parametrize("sizes", [UNEVEN, (1,), (4, 4, 4, 4), (0, 0, 3), tuple(range(40))])
def test_every_epoch_is_a_permutation(sizes: tuple[int, ...], window: int) -> None:
    order, n = SampleOrder(sizes, 3, window), sum(sizes)
    epochs = [order.samples(np.arange(epoch * n, (epoch + 1) * n)).tolist() for epoch in range(4)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    if n > 20:
        assert len({tuple(epoch) for epoch in epochs}) == 4
        other = SampleOrder(sizes, 4, window)
        assert other.samples(np.arange(n)).tolist() != epochs[0]


def test_positions_in_any_order_and_number_give_the_same() -> None:
    """Also far after and before the last request: only the position matters."""
    order = SampleOrder(tuple(range(1, 40)), 0, 4)
    whole = order.samples(np.arange(5 * order.n))
    asked = np.random.default_rng(0).integers(0, 5 * order.n, 400)
    assert np.array_equal(order.samples(asked), whole[asked])
    for position in asked[:50].tolist():
        assert SampleOrder(order.sizes, 0, 4).samples(np.array([position]))[0] == whole[position]


def test_windowed_order_never_changes() -> None:
    """Pinned, like the order of one window: another order would invalidate resumed runs and published seeds."""
    found = SampleOrder((3, 4, 2, 3), 0, 2).samples(np.arange(24)).tolist()
    assert found == [9, 4, 10, 3, 11, 5, 2, 6, 1, 8, 0, 7, 10, 5, 11, 4, 9, 6, 3, 0, 8, 1, 7, 2]


def test_few_shards_are_one_permutation() -> None:
    order = SampleOrder((5, 3, 8), 7, 3)
    assert order.whole and np.array_equal(order.samples(np.arange(32, 48)), position_to_sample(7, 2, 16))


def test_windows_bound_what_is_read() -> None:
    """Any 4,096 consecutive positions touch at most about twice the window's shards, and all lanes."""
    order = SampleOrder(IMAGENET, 0, 256)
    shard = np.repeat(np.arange(len(IMAGENET)), IMAGENET)
    for start in (0, 100_000, 320_000, order.n - 2000, 2 * order.n + 5):
        used = set(shard[order.samples(np.arange(start, start + 4096))].tolist())
        assert 200 < len(used) <= 2 * 256 + 2 * LANES


def test_a_rank_stays_on_few_shards() -> None:
    """With 8 ranks, each reads an eighth of the lanes, and so about an eighth of the shards in an epoch."""
    order = SampleOrder((50,) * 512, 0, 128)
    shard = np.repeat(np.arange(512), 50)
    read = [set(shard[order.samples(np.arange(rank, order.n, 8))].tolist()) for rank in range(8)]
    assert all(len(mine) < 512 / 8 + 2 * LANES / 8 + 1 for mine in read)
    assert set().union(*read) == set(range(512))


@pytest.mark.parametrize(("window", "least", "most"), [(256, 250, 280), (64, 60, 110), (1024, 630, 660)])
def test_shuffle_quality(window: int, least: float, most: float) -> None:
    """Distinct shards in a batch of 1,024 over 1,024 shards, mean of 32 batches (docs/data.md); a full permutation has
    647."""
    assert DataConfig().window == 256
    order, shard = SampleOrder(IMAGENET, 0, window), np.repeat(np.arange(len(IMAGENET)), IMAGENET)
    firsts = np.arange(32) * (order.n // 1024 // 32) * 1024
    found = [len(set(shard[order.samples(np.arange(first, first + 1024))].tolist())) for first in firsts.tolist()]
    assert least <= np.mean(found) <= most


def test_neighbours_are_not_of_one_shard() -> None:
    """Consecutive samples share a shard at most twice as often as two random samples of a window."""
    order = SampleOrder(IMAGENET, 0, 256)
    shard = np.repeat(np.arange(len(IMAGENET)), IMAGENET)[order.samples(np.arange(200_000))]
    assert (shard[1:] == shard[:-1]).mean() < 2 / 256


@pytest.mark.parametrize("world", range(1, 17))
@pytest.mark.parametrize("mixup", [0.0, 0.8])
def test_positions_over_ranks(world: int, mixup: float) -> None:
    """For 1 to 16 ranks: the same global sequence without a gap, and equally many samples on every rank."""
    index, turn = uneven(), 2 if mixup else 1
    for accumulate in (1, 2):
        size = world * accumulate * turn
        if size > len(index):
            continue
        train = TrainConfig(batch_size=size, accumulate=accumulate, mixup=mixup)
        streams = [TrainStream(index, DATA, train, 0, rank, world) for rank in range(world)]
        for step in (0, 1, 7):
            found = [
                position
                for micro in range(accumulate)
                for position in in_turn([stream.positions(step, micro).tolist() for stream in streams], turn)
            ]
            assert found == list(range(step * size, (step + 1) * size))


def sequence(world: int, threads: int, mixup: float, batch: int = 12, steps: int = 7) -> list[tuple[torch.Tensor, ...]]:
    """Image and target at each position of the global sequence."""
    data, train = dataclasses.replace(DATA, threads=threads), TrainConfig(batch_size=batch, mixup=mixup, cutmix=mixup)
    streams = [TrainStream(uneven(), data, train, 5, rank, world) for rank in range(world)]
    ranks = [list(stream.batches(0, steps)) for stream in streams]
    assert {len(batches) for batches in ranks} == {steps}
    turn, found = 2 if mixup else 1, []
    for step in range(steps):
        parts = [list(zip(batches[step].images, batches[step].targets, strict=True)) for batches in ranks]
        found += in_turn(parts, turn)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("mixup", [0.0, 0.8])
def test_pixels_and_targets_do_not_depend_on_ranks_and_threads(mixup: float) -> None:
    """Bit for bit, over more than three epochs of uneven shards."""
    whole = sequence(1, 0, mixup)
    for world, threads in [(1, 1), (1, 3), (1, 8), (2, 0), (3, 2), (6, 4), *([] if mixup else [(4, 1), (12, 2)])]:
        found = sequence(world, threads, mixup)
        assert all(
            torch.equal(a, b)
            for left, right in zip(whole, found, strict=True)
            for a, b in zip(left, right, strict=True)
        )


@pytest.mark.parametrize("world", [2, 8, 16])
def test_pixels_of_sixteen_ranks(world: int) -> None:
    whole, found = sequence(1, 0, 0.0, 16, 5), sequence(world, 1, 0.0, 16, 5)
    assert all(
        torch.equal(a, b) for left, right in zip(whole, found, strict=True) for a, b in zip(left, right, strict=True)
    )


def test_pixels_do_not_depend_on_the_batch_size() -> None:
    one, other = sequence(1, 0, 0.8, 12, 4), sequence(2, 2, 0.8, 24, 2)
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(one, other, strict=True))


def resumed(stream: TrainStream, state: StreamState) -> TrainStream:
    """The stream, with step 0 at the state."""
    stream.restore(state, 0)
    return stream


def test_resume_at_every_position_and_world() -> None:
    """From the state after any number of steps, any world and batch size continues the same sequence."""
    index, steps = uneven(), 9
    samples = SampleOrder(UNEVEN, 5, DATA.window).samples(np.arange(200))
    for batch in (1, 4, 6):
        stream = TrainStream(index, DATA, TrainConfig(batch_size=batch), 5, 0, 1)
        for step in range(steps):
            state = stream.state(step)
            assert state == {"position": step * batch, "fingerprint": stream.fingerprint, "bad": {}}
            for world, size in ((1, batch), (1, 5), (2, 6), (3, 12), (16, 16)):
                train = TrainConfig(batch_size=size)
                ranks = [resumed(TrainStream(index, DATA, train, 5, r, world), state) for r in range(world)]
                found = [
                    p
                    for s in range(3)
                    for p in in_turn([r.order.samples(r.positions(s, 0)).tolist() for r in ranks], 1)
                ]
                assert found == samples[state["position"] : state["position"] + 3 * size].tolist()
                assert ranks[0].state(2)["position"] == state["position"] + 2 * size


def test_resumed_pixels() -> None:
    train = TrainConfig(batch_size=6, mixup=0.5)
    whole = list(TrainStream(uneven(), DATA, train, 3, 0, 1).batches(0, 6))
    stream = TrainStream(uneven(), DATA, train, 3, 0, 1)
    for rest in (
        stream.batches(4, 2),
        resumed(TrainStream(uneven(), DATA, train, 3, 0, 1), stream.state(4)).batches(0, 2),
    ):
        for left, right in zip(whole[4:], rest, strict=True):
            assert torch.equal(left.images, right.images) and torch.equal(left.targets, right.targets)


def test_state_of_other_shards_is_refused() -> None:
    index, train = uneven(), TrainConfig(batch_size=5)
    stream = TrainStream(index, DATA, train, 0, 0, 1)
    state = stream.state(3)
    label = index.label.copy()
    label[3] += 1
    others = [
        TrainStream(dataclasses.replace(index, label=label), DATA, train, 0, 0, 1),
        TrainStream(dataclasses.replace(index, keys=index.keys[::-1]), DATA, train, 0, 0, 1),
        TrainStream(index, dataclasses.replace(DATA, window=3), train, 0, 0, 1),
    ]
    for other in others:
        with pytest.raises(
            UserError, match="position 15 belongs to other shards or another data.window .*: set data.root"
        ):
            other.restore(state, 0)
    with pytest.raises(UserError, match="position -1 is below 0"):
        stream.restore({**state, "position": -1}, 0)
    with pytest.raises(UserError, match="data.window is 0"):
        TrainStream(index, dataclasses.replace(DATA, window=0), train, 0, 0, 1)


def test_shards_ahead_are_those_that_are_read() -> None:
    stream = TrainStream(uneven(), DATA, TrainConfig(batch_size=4), 0, 1, 2)
    samples = [stream.order.samples(stream.positions(step, 0)) for step in range(5)]
    names = [stream.index.shards[shard] for shard in stream.index.shard[np.concatenate(samples)]]
    assert stream.shards_ahead(0, 5) == list(dict.fromkeys(names))
