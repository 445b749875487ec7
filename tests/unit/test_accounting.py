"""A million samples and every path over many restarts at changing numbers of ranks: nothing lost, doubled or moved."""

import functools
import hashlib
import os
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from lgp_dist.config.run_config import DataConfig, Policy, TrainConfig
from lgp_dist.data import stream
from lgp_dist.data.shards.decode import ShardFiles
from lgp_dist.data.shards.index import ShardIndex
from lgp_dist.data.stream import StreamState, TrainStream
from lgp_dist.paths.sampler import PathSampler
from lgp_dist.paths.stitched import PathSpace
from lgp_dist.recipes import tiny

SAMPLES, SHARDS, BATCH = 1_000_000, 1000, 1920
WORLDS = (1, 2, 3, 4, 5, 8, 16, 24, 64)
"""All divide the batch, in pairs too."""
LONG = bool(os.environ.get("LGP_LONG_TESTS"))


@pytest.fixture(autouse=True)
def hash_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fingerprint of a million samples takes a second; each rank of each start asks for it."""
    monkeypatch.setattr(stream, "fingerprint_of", functools.cache(stream.fingerprint_of))


def million() -> ShardIndex:
    """An index of a million samples in a thousand shards of uneven size, without files."""
    cuts = np.sort(np.random.default_rng(0).choice(SAMPLES, SHARDS - 1, replace=False))
    sizes = np.diff(cuts, prepend=0, append=SAMPLES)
    zeros = np.zeros(SAMPLES, dtype=np.int64)
    return ShardIndex(
        root=Path("nowhere"),
        shards=tuple(f"x-train-{number:04d}.tar" for number in range(SHARDS)),
        shard=np.repeat(np.arange(SHARDS, dtype=np.int32), sizes),
        offset=np.arange(SAMPLES, dtype=np.int64) * 512,
        size=zeros + 100,
        label=zeros,
        keys=np.arange(SAMPLES).astype(str),
        width=zeros.astype(np.int32),
        height=zeros.astype(np.int32),
        crc=zeros - 1,
        files=ShardFiles([]),
    )


@dataclass
class Start:
    """One start of a run: streams of all ranks that go on from a saved state."""

    streams: list[TrainStream]

    @classmethod
    def of(cls, index: ShardIndex, world: int, mixup: float, state: StreamState | None, step: int) -> "Start":
        """state: as a checkpoint holds it; None for the beginning."""
        data, train = DataConfig(root="nowhere", window=64), TrainConfig(batch_size=BATCH, mixup=mixup)
        streams = [TrainStream(index, data, train, 7, rank, world) for rank in range(world)]
        for one in streams if state else ():
            one.restore(state, step)
        return cls(streams)

    def step(self, number: int, pairs: bool) -> NDArray[np.int64]:
        """Samples [BATCH] of an optimizer step in the global order: ranks take turns, in pairs where samples mix."""
        positions = np.stack([one.positions(number, 0) for one in self.streams])
        turn = 2 if pairs else 1
        ordered = positions.reshape(len(self.streams), -1, turn).transpose(1, 0, 2).ravel()
        return self.streams[0].order.samples(ordered)


@pytest.mark.slow
@pytest.mark.parametrize("mixup", [0.0, 0.8], ids=["single", "pairs"])
def test_fifty_restarts_lose_and_double_nothing(mixup: float) -> None:
    """A run of two epochs dies 50 times, some steps after its last checkpoint, and goes on with other ranks.

    What counts is what a rank that never died has seen: each step's last run. Each is the one before it bit for bit.
    """
    index, draw = million(), random.Random(3)
    steps = -(-2 * SAMPLES // BATCH)
    deaths = sorted(draw.sample(range(1, steps), 50))
    seen: dict[int, NDArray[np.int64]] = {}
    start, state, saved, world, again = Start.of(index, 4, mixup, None, 0), None, 0, 4, 0
    for death in [*deaths, steps]:
        for step in range(saved, death):
            found = start.step(step, mixup > 0)
            again += step in seen
            assert step not in seen or np.array_equal(seen[step], found), f"step {step} at {world} ranks"
            seen[step] = found
        checkpoint = max(saved, death - draw.randrange(20))
        if death < steps:
            state, saved = start.streams[draw.randrange(world)].state(checkpoint), checkpoint
            world = draw.choice(WORLDS)
            start = Start.of(index, world, mixup, state, saved)
    assert sorted(seen) == list(range(steps)) and again > 100
    sequence = np.concatenate([seen[step] for step in range(steps)])[: 2 * SAMPLES]
    for epoch in range(2):
        counts = np.bincount(sequence[epoch * SAMPLES : (epoch + 1) * SAMPLES], minlength=SAMPLES)
        assert (counts == 1).all(), f"{(counts == 0).sum()} lost, {(counts > 1).sum()} doubled in epoch {epoch}"
    assert not np.array_equal(sequence[:SAMPLES], sequence[SAMPLES : 2 * SAMPLES]), "epochs have different orders"


@pytest.mark.slow
def test_a_hundred_resumes_give_the_same_order() -> None:
    """From any step, at any number of ranks: the ordered list is that of one process that never stopped."""
    index, draw, ahead = million(), random.Random(4), 3
    whole, differing = Start.of(index, 1, 0.0, None, 0), 0
    for _ in range(100):
        step = draw.randrange(3 * SAMPLES // BATCH)
        state = whole.streams[0].state(step)
        part = Start.of(index, draw.choice(WORLDS), 0.0, state, step)
        for later in range(step, step + ahead):
            differing += int((whole.step(later, pairs=False) != part.step(later, pairs=False)).sum())
    assert differing == 0


def sampler(policy: Policy) -> PathSampler:
    """Of the recipe tiny."""
    space = PathSpace.from_config(tiny())
    costs = tuple(float(space.describe(path)["flops"]) for path in space.paths)
    return PathSampler(space.paths, policy, seed=11, costs=costs if policy == "balanced" else ())


POLICIES: tuple[Policy, ...] = ("independent", "shared", "spread", "balanced")

CHILD = """
import random, sys
import numpy, torch
sys.path.insert(0, sys.argv[1])
from test_accounting import digests
random.seed(5); numpy.random.seed(5); torch.manual_seed(5)
print(digests())
"""


def digests() -> str:
    """sha256 of every policy's schedule at some numbers of ranks, from a new sampler for each."""
    found = hashlib.sha256()
    for policy in POLICIES:
        for world in range(1, 65) if LONG else (1, 2, 3, 16):
            made = sampler(policy)
            for step in range(10_000 if LONG and policy == "independent" else 1000):
                found.update(repr([path.key for row in made.plan(step, world) for path in row]).encode())
    return found.hexdigest()


@pytest.mark.slow
def test_paths_depend_on_seed_step_and_rank_alone() -> None:
    """The schedule is the same in another process with other hashes and generators.

    1,000 steps at four numbers of ranks; with LGP_LONG_TESTS at 1 to 64 ranks, and 10,000 steps of `independent`.
    """
    environment = {**os.environ, "PYTHONHASHSEED": "123"}
    command = [sys.executable, "-c", CHILD, str(Path(__file__).parent)]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    torch.manual_seed(99)
    assert child.stdout.strip() == digests()


@pytest.mark.parametrize("policy", POLICIES)
def test_paths_go_on_after_any_number_of_restarts(policy: Policy) -> None:
    """A sampler that is made again in the middle, asked in any order, says what the first one said."""
    draw, first = random.Random(2), sampler(policy)
    for _ in range(300):
        world, step = draw.choice(WORLDS), draw.randrange(10_000)
        row = first.plan(step, world)[0]
        again = sampler(policy)
        again.plan(draw.randrange(10_000), draw.choice(WORLDS))
        rank = draw.randrange(world)
        assert again.draw(step, 0, rank, world) == row[rank]
