"""Which path a rank trains: pure, uniform, and as independent as the policy says."""

from collections import Counter

import pytest

from lgp_dist.paths.sampler import PathSampler, draw_index
from lgp_dist.paths.stitched import PathSpace

PATHS = PathSpace((32, 96), 6).paths
DRAWS = 20_000
PINNED = [4, 0, 9, 4, 6, 15, 2, 10]
"""128-bit BLAKE2b digests of `path/0/STEP/0/0` modulo 18, computed with hashlib alone."""


def draws(policy: str, seed: int = 1, *, steps: int = 200, micro_step: int = 0, rank: int = 0, world: int = 4) -> list:
    """The paths of one rank in consecutive steps."""
    sampler = PathSampler(PATHS, policy, seed)
    return [sampler.draw(step, micro_step, rank, world) for step in range(steps)]


def chi_square(counts: Counter, kinds: int) -> float:
    """Pearson's statistic against equal shares; its mean is kinds - 1 and its variance twice that."""
    expected = counts.total() / kinds
    missing = kinds - len(counts)
    return sum((count - expected) ** 2 / expected for count in counts.values()) + missing * expected


def limit(kinds: int) -> float:
    """Five standard deviations above the mean of chi-square."""
    return (kinds - 1) + 5 * (2 * (kinds - 1)) ** 0.5


@pytest.mark.parametrize("policy", ["independent", "shared"])
def test_draw_is_pure(policy: str) -> None:
    """The same arguments give the same path, in any order, from any sampler: what a restart relies on."""
    places = [(step, micro, rank) for step in range(30) for micro in range(2) for rank in range(4)]
    one, two = PathSampler(PATHS, policy, 7), PathSampler(PATHS, policy, 7)
    forward = {place: one.draw(*place, 4) for place in places}
    backward = {place: two.draw(*place, 4) for place in reversed(places)}
    assert forward == backward == {place: one.draw(*place, 4) for place in places}


def test_draw_is_the_same_in_every_version_and_process() -> None:
    """Pinned draws: no hash seed, platform or order of calls enters. A change here breaks every restart."""
    assert [draw_index(18, "path", 0, step, 0, 0) for step in range(8)] == PINNED
    sampler = PathSampler(PATHS, "independent", 0)
    assert [PATHS.index(sampler.draw(step, 0, 0, 1)) for step in range(8)] == PINNED


@pytest.mark.parametrize("world", [1, 2, 64])
def test_shared_is_one_path_for_all_ranks(world: int) -> None:
    """Under `shared` all ranks of a micro-step have the same path, whatever the world's size."""
    sampler = PathSampler(PATHS, "shared", 3)
    for step in range(20):
        assert len({sampler.draw(step, 1, rank, world) for rank in range(world)}) == 1
        assert sampler.draw(step, 1, 0, world) == sampler.draw(step, 1, 0, 1)


def test_independent_ranks_agree_by_chance_only() -> None:
    """Under `independent` two ranks have the same path in about one step of eighteen."""
    one, two = (draws("independent", steps=4000, rank=rank) for rank in (0, 1))
    share = sum(a == b for a, b in zip(one, two, strict=True)) / 4000
    assert abs(share - 1 / 18) < 5 * (1 / 18 * 17 / 18 / 4000) ** 0.5


@pytest.mark.parametrize("policy", ["independent", "shared"])
@pytest.mark.parametrize("rank", range(4))
def test_long_run_shares_are_equal_on_each_rank(policy: str, rank: int) -> None:
    """20,000 draws of one rank: every path equally often, within chance."""
    counts = Counter(draws(policy, steps=DRAWS, rank=rank))
    assert set(counts) == set(PATHS)
    assert chi_square(counts, len(PATHS)) < limit(len(PATHS))


def test_long_run_shares_are_equal_over_ranks_and_micro_steps() -> None:
    """All ranks and micro-steps together: every path equally often, and pairs of successive paths too."""
    sampler = PathSampler(PATHS, "independent", 11)
    places = [(step, micro, rank) for step in range(DRAWS // 8) for micro in range(2) for rank in range(4)]
    assert chi_square(Counter(sampler.draw(*place, 4) for place in places), len(PATHS)) < limit(len(PATHS))
    line = draws("independent", seed=11, steps=DRAWS)
    successive = Counter(zip(line, line[1:], strict=False))
    assert chi_square(successive, len(PATHS) ** 2) < limit(len(PATHS) ** 2)


@pytest.mark.parametrize("policy", ["independent", "shared"])
@pytest.mark.parametrize("change", [{"seed": 2}, {"micro_step": 1}])
def test_seed_and_micro_step_change_the_draws(policy: str, change: dict[str, int]) -> None:
    """Another seed or micro-step gives a sequence that agrees by chance only."""
    one, two = draws(policy), draws(policy, **change)
    assert sum(a == b for a, b in zip(one, two, strict=True)) < 30
    assert len(set(one)) == len(set(two)) == len(PATHS)


@pytest.mark.parametrize(("policy", "equal"), [("independent", False), ("shared", True)])
def test_rank_changes_the_draws_of_independent_only(policy: str, equal: bool) -> None:
    """Another rank has other paths under `independent`, the same under `shared`."""
    assert (draws(policy, rank=0) == draws(policy, rank=3)) == equal


def test_places_are_not_confused() -> None:
    """Numbers are kept apart in the key: step 1, micro-step 11 is not step 11, micro-step 1."""
    keys = [(1, 11, 0), (11, 1, 0), (1, 1, 1), (11, 10, 1), (1, 110, 1)]
    big = 2**100
    assert len({draw_index(big, "path", 0, *key) for key in keys}) == len(keys)


@pytest.mark.parametrize("count", [1, 2, 18, 71])
def test_index_is_below_count(count: int) -> None:
    """Every index from 0 to count - 1 is drawn, no other."""
    assert {draw_index(count, "x", i) for i in range(2000)} == set(range(count))


@pytest.mark.parametrize("policy", ["independent", "shared"])
@pytest.mark.parametrize(("rank", "world"), [(4, 4), (-1, 4), (1, 1), (0, 0)])
def test_rank_outside_its_world(policy: str, rank: int, world: int) -> None:
    """A rank that does not exist is a bug of the caller, not a draw."""
    with pytest.raises(ValueError, match=f"rank {rank} is outside a world of {world}"):
        PathSampler(PATHS, policy, 0).draw(0, 0, rank, world)
