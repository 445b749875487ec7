"""Orders, systematic samples and groups: exact where arithmetic can say, within chance elsewhere."""

import hashlib
from collections import Counter
from fractions import Fraction
from itertools import permutations

import pytest

from lgp_dist.paths.stitched import PathSpace
from lgp_dist.paths.stratified import (
    BALANCED,
    balanced_pairs,
    cost_buckets,
    draw_order,
    single_paths,
    systematic_sample,
)

SPACES = {"pool12": PathSpace((192, 768), 6), "pool18": PathSpace((192, 768), 9)}
SPACES["three"] = PathSpace((192, 384, 768), 12)
COSTS = {name: [space.cost(path).flops for path in space.paths] for name, space in SPACES.items()}


def test_order_is_that_of_the_keys_words() -> None:
    """The same order as sorting 8-byte pieces of SHAKE-128, written with hashlib and bytes alone."""
    raw = hashlib.shake_128(b"cards/7/x").digest(8 * 30)
    pieces = {raw[8 * i : 8 * i + 8]: i for i in range(30)}
    assert draw_order(30, "cards", 7, "x") == [pieces[piece] for piece in sorted(pieces)]
    assert draw_order(0, "a") == []


def test_every_order_is_equally_likely() -> None:
    counts = Counter(tuple(draw_order(4, "o", i)) for i in range(24_000))
    assert set(counts) == set(permutations(range(4)))
    assert sum((found - 1000) ** 2 / 1000 for found in counts.values()) < 23 + 5 * 46**0.5


@pytest.mark.parametrize("weights", [[1] * 18, [3, 1, 1, 2], [0, 5, 2], [7]])
@pytest.mark.parametrize("count", [0, 1, 2, 7, 18, 64, 1000])
def test_items_come_as_often_as_expected(weights: list[int], count: int) -> None:
    """An item comes its expected number of times, rounded down or up, and on average exactly that often."""
    expected = [Fraction(count * weight, sum(weights)) for weight in weights]
    totals, samples = Counter(), 400
    for number in range(samples):
        sample = systematic_sample(weights, count, "d", number)
        assert len(sample) == count
        for item, often in enumerate(expected):
            assert sample.count(item) in {often.__floor__(), often.__ceil__()}
        totals.update(sample)
    for item, often in enumerate(expected):
        rest = float(often % 1)
        assert abs(totals[item] - samples * float(often)) <= 5 * (samples * rest * (1 - rest)) ** 0.5 + 1e-9


def test_every_place_of_a_sample_has_the_shares() -> None:
    """The first place alone holds each item by its weight."""
    counts = Counter(systematic_sample([1, 2, 3], 5, "p", number)[0] for number in range(12_000))
    assert sum((counts[i] - expected) ** 2 / expected for i, expected in enumerate((2000, 4000, 6000))) < 2 + 5 * 2


def test_neighbours_expected_once_come_at_least_once() -> None:
    """Three items expected once in total: as neighbours one of them always comes, separately not always."""

    def missed(together: int) -> int:
        return sum(
            not {0, 1, 2} & set(systematic_sample([1] * 9, 3, "t", number, together=together)) for number in range(500)
        )

    assert missed(3) == 0 < missed(0)


@pytest.mark.parametrize("name", SPACES)
@pytest.mark.parametrize("weights", ["equal", "rows", "uneven"])
def test_pairs_keep_every_share(name: str, weights: str) -> None:
    """Each path's weight in the pairs is twice its own (over both halves), in whole numbers: for any weights."""
    space, costs = SPACES[name], COSTS[name]
    chosen = {
        "equal": [1] * len(costs),
        "rows": [5 if path.is_row else 2 for path in space.paths],
        "uneven": [1 + (7 * index) % 11 for index in range(len(costs))],
    }[weights]
    made, held = balanced_pairs(chosen, costs), Counter()
    for group, weight in zip(made.groups, made.weights, strict=True):
        for index in group:
            held[index] += weight
    assert [held[index] for index in range(len(costs))] == [2 * weight for weight in chosen]
    assert sum(made.weights) == sum(chosen)


@pytest.mark.parametrize(("name", "efficiency"), [("pool12", 0.985), ("pool18", 0.993), ("three", 0.777)])
def test_pairs_are_light_with_heavy(name: str, efficiency: float) -> None:
    """Mean over largest sum, against sorting and reversing, written down anew; one bucket where that is enough."""
    costs = sorted(COSTS[name])
    sums = [light + heavy for light, heavy in zip(costs, reversed(costs), strict=True)]
    made = balanced_pairs([1] * len(costs), COSTS[name])
    found = sum(w * sum(COSTS[name][i] for i in group) for group, w in zip(made.groups, made.weights, strict=True))
    assert found / sum(made.weights) == pytest.approx(sum(sums) / len(sums))
    assert sum(sums) / len(sums) / max(sums) == pytest.approx(efficiency, abs=6e-4)
    assert (len(made.cost_buckets) == 1) == (efficiency >= BALANCED)


@pytest.mark.parametrize("name", SPACES)
@pytest.mark.parametrize("make", [single_paths, balanced_pairs])
def test_buckets_hold_like_costs(name: str, make: type) -> None:
    """Every group is in one bucket, buckets do not overlap in cost, and mean over largest cost is at least 0.97."""
    made = make([1] * len(COSTS[name]), COSTS[name])
    sums = [sum(COSTS[name][index] for index in group) for group in made.groups]
    assert sorted(group for bucket in made.cost_buckets for group in bucket) == list(range(len(made.groups)))
    for bucket in made.cost_buckets:
        weight = sum(made.weights[group] for group in bucket)
        mean = sum(made.weights[group] * sums[group] for group in bucket) / weight
        assert mean >= 0.97 * max(sums[group] for group in bucket)
    ranges = [
        (min(sums[group] for group in bucket), max(sums[group] for group in bucket)) for bucket in made.cost_buckets
    ]
    assert all(one[1] <= two[0] for one, two in zip(ranges, ranges[1:], strict=False))


def test_buckets_are_the_best_of_all_cuts() -> None:
    """Against every way to cut seven groups: none trains more different groups in a round on average."""
    weights, costs = [1, 2, 1, 3, 1, 1, 2], [100.0, 101.0, 103.0, 104.0, 107.0, 108.0, 109.0]

    def shown(runs: list[tuple[int, ...]]) -> float:
        return sum(sum(weights[group] for group in run) * len(run) for run in runs)

    best = 0.0
    for mask in range(64):
        cuts = [0, *(i + 1 for i in range(6) if mask >> i & 1), 7]
        runs = [tuple(range(low, high)) for low, high in zip(cuts, cuts[1:], strict=False)]
        if all(
            sum(weights[c] * costs[c] for c in run)
            >= BALANCED * max(costs[c] for c in run) * sum(weights[c] for c in run)
            for run in runs
        ):
            best = max(best, shown(runs))
    assert shown(list(cost_buckets(weights, costs))) == best
    assert 1 < len(cost_buckets(weights, costs)) < 7
