"""Random draws as pure functions of a key: an index, an order, a stratified sample, and groups of paths of like cost.

Weights are whole numbers, so every share is exact. Nothing keeps state, and no library's generator is used. The words
in the keys enter the hash: another word gives other draws, and a resumed run would train other paths.
"""

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate as running_sums

BALANCED = 0.97
"""Least mean cost over largest cost of what ranks run at the same time, under `balanced`."""


def _key(parts: tuple[int | str, ...]) -> bytes:
    return "/".join(map(str, parts)).encode()


def key_digest(*key: int | str) -> bytes:
    """16 bytes that depend on the key alone: BLAKE2b of its parts, joined by slashes."""
    return hashlib.blake2b(_key(key), digest_size=16).digest()


def draw_index(count: int, *key: int | str) -> int:
    """A uniform index below count that depends on the key alone.

    The digest of the key modulo count; the bias is below count / 2^128.
    """
    return int.from_bytes(key_digest(*key), "big") % count


def draw_order(count: int, *key: int | str) -> list[int]:
    """A uniform order of 0 .. count - 1 that depends on the key alone: sorted by the 64-bit words of its SHAKE-128."""
    words = struct.unpack(f">{count}Q", hashlib.shake_128(_key(key)).digest(8 * count))
    return sorted(range(count), key=words.__getitem__)


def systematic_sample(weights: Sequence[int], count: int, *key: int | str, together: int = 0) -> list[int]:
    """`count` items in random order; item i comes count * weights[i] / sum(weights) times, rounded up or down.

    On average every position holds item i with its share of the weights.
    together: the first `together` items stay neighbours, so at least one of them comes if in total they are expected
    once or more.
    """
    # Systematic sampling: items lie end to end on a line in random order, each as long as its expected count, and
    # points at distance 1 from a random offset pick them. Lengths are multiplied by `total` to stay whole numbers.
    total = sum(weights)
    others = draw_order(len(weights) - together, "cards", *key)
    start = draw_index(total, "start", *key)
    picked: list[int] = []
    edge = 0
    for item in (*range(together), *(together + other for other in others)):
        before, edge = edge, edge + count * weights[item]
        picked += [item] * (-((start - edge) // total) + (start - before) // total)
    return [picked[place] for place in draw_order(count, "places", *key)]


def flops_bins(flops: Sequence[int], width: float) -> list[list[int]]:
    """Indices of paths in bins, light to heavy: a bin begins with a path of more than `width` above the last one's
    first (resource-constrained sampling of SN-Net v2, arXiv 2307.00154)."""
    bins: list[list[int]] = []
    for index in sorted(range(len(flops)), key=lambda index: (flops[index], index)):
        if not bins or flops[index] > flops[bins[-1][0]] + width:
            bins.append([])
        bins[-1].append(index)
    return bins


@dataclass(frozen=True)
class PathGroups:
    """Groups of paths that are assigned to ranks: a group is one path, or two paths that a rank runs in turn."""

    groups: tuple[tuple[int, ...], ...]
    """Indices of paths."""
    weights: tuple[int, ...]
    """Of each group."""
    cost_buckets: tuple[tuple[int, ...], ...]
    """Indices of groups of like cost, which ranks may run at the same time. Every group is in one bucket."""

    def assignments(self, rounds: int, world: int, *key: int | str, first: Sequence[int] = ()) -> list[list[int]]:
        """The paths of each rank after `rounds` rounds; in a round each rank gets one group, all from one bucket.

        Buckets come as often as their weights say, and so do the groups within a bucket.
        first: groups that stay neighbours in the sample, if there is one bucket.
        """
        weights = [sum(self.weights[group] for group in bucket) for bucket in self.cost_buckets]
        drawn = systematic_sample(weights, rounds, "bands", *key)
        ranks: list[list[int]] = [[] for _ in range(world)]
        for number, bucket in enumerate(self.cost_buckets):
            count = drawn.count(number) * world
            groups = (*first, *(group for group in bucket if group not in first))
            chances = [self.weights[group] for group in groups]
            sample = systematic_sample(chances, count, "band", number, *key, together=len(first))
            for place, item in enumerate(sample):
                ranks[place % world].extend(self.groups[groups[item]])
        return ranks

    @property
    def groups_per_round(self) -> float:
        """Different groups that a round of very many ranks trains, on average."""
        weights = [sum(self.weights[group] for group in bucket) for bucket in self.cost_buckets]
        return sum(weight * len(bucket) for weight, bucket in zip(weights, self.cost_buckets, strict=True)) / sum(
            weights
        )


def single_paths(weights: Sequence[int], costs: Sequence[float]) -> PathGroups:
    """A group for each path whose weight is above 0."""
    used = tuple(index for index, weight in enumerate(weights) if weight)
    return _bucketed(tuple((index,) for index in used), tuple(weights[index] for index in used), costs)


def balanced_pairs(weights: Sequence[int], costs: Sequence[float]) -> PathGroups:
    """Groups of a light and a heavy path with nearly equal sums of costs; every path keeps its share."""
    # Paths lie end to end on a line by cost, each as long as its weight. The path at distance u from the light end is
    # paired with the one at distance u from the heavy end, so weights need not be equal. Lengths are doubled, which
    # keeps the middle of the line a whole number.
    by_cost = sorted((index for index, weight in enumerate(weights) if weight), key=lambda index: (costs[index], index))
    total = sum(weights)
    ends = [2 * end for end in running_sums(weights[index] for index in by_cost)]
    cuts = sorted({0, total, *(end for end in ends if end < total), *(2 * total - end for end in ends if end > total)})
    groups, masses, light, heavy = [], [], 0, len(by_cost) - 1
    for low, high in zip(cuts, cuts[1:], strict=False):
        while ends[light] <= low:
            light += 1
        while heavy and ends[heavy - 1] >= 2 * total - low:
            heavy -= 1
        groups.append((by_cost[light], by_cost[heavy]))
        masses.append(high - low)
    return _bucketed(tuple(groups), tuple(masses), costs)


def _bucketed(groups: tuple[tuple[int, ...], ...], weights: tuple[int, ...], costs: Sequence[float]) -> PathGroups:
    sums = [sum(costs[index] for index in group) for group in groups]
    return PathGroups(groups, weights, cost_buckets(weights, sums))


def cost_buckets(weights: Sequence[int], costs: Sequence[float]) -> tuple[tuple[int, ...], ...]:
    """Indices of groups in buckets of like cost, light to heavy: mean over largest cost of each is BALANCED or more.

    weights, costs: of each group.
    """
    # Dynamic programming over the groups in order of cost: best[stop] is the best cut of the first `stop` groups. Of
    # all valid cuts, it keeps the one with which a round trains most different groups on average.
    order = sorted(range(len(costs)), key=lambda group: (costs[group], group))
    weight = [0, *running_sums(weights[group] for group in order)]
    work = [0.0, *running_sums(weights[group] * costs[group] for group in order)]
    best: list[tuple[float, int]] = [(0.0, 0)]
    for stop in range(1, len(order) + 1):
        largest = costs[order[stop - 1]]
        fits = [
            (best[start][0] + (weight[stop] - weight[start]) * (stop - start), start)
            for start in range(stop)
            if start == stop - 1 or work[stop] - work[start] >= BALANCED * largest * (weight[stop] - weight[start])
        ]
        best.append(max(fits))
    buckets, stop = [], len(order)
    while stop:
        start = best[stop][1]
        buckets.append(tuple(order[start:stop]))
        stop = start
    return tuple(reversed(buckets))
