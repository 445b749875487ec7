"""Chance as pure functions of a key: one draw, an order, a fair deal, and groups of cards of like cost.

Weights are whole numbers, so that every share is exact; there is no state and no library's generator in here.
"""

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate as running_sums

BALANCED = 0.97
"""Least mean cost over largest cost of what the ranks do at the same time, under `balanced`."""


def _key(parts: tuple[int | str, ...]) -> bytes:
    return "/".join(map(str, parts)).encode()


def draw_index(count: int, *key: int | str) -> int:
    """A uniform index below count that depends on the key alone.

    A 128-bit BLAKE2b digest of the key modulo count; the bias is below count / 2^128.
    """
    return int.from_bytes(hashlib.blake2b(_key(key), digest_size=16).digest(), "big") % count


def draw_order(count: int, *key: int | str) -> list[int]:
    """A uniform order of 0 .. count - 1 that depends on the key alone: by the 64-bit words of the key's SHAKE-128."""
    words = struct.unpack(f">{count}Q", hashlib.shake_128(_key(key)).digest(8 * count))
    return sorted(range(count), key=words.__getitem__)


def deal(weights: Sequence[int], count: int, *key: int | str, together: int = 0) -> list[int]:
    """`count` cards in random order; card i comes count * weights[i] / sum(weights) times, rounded up or down.

    Exact on average, at every place alone too: cards lie one after the other on a line in a random order, as long as
    they are due, and points at distance 1 from a random start pick them (systematic sampling).
    together: the first so many cards stay neighbours on the line, so that a run of them that is due once or more in
    all comes at least once.
    """
    total = sum(weights)
    others = draw_order(len(weights) - together, "cards", *key)
    start = draw_index(total, "start", *key)
    dealt: list[int] = []
    edge = 0
    for card in (*range(together), *(together + other for other in others)):
        before, edge = edge, edge + count * weights[card]
        dealt += [card] * (-((start - edge) // total) + (start - before) // total)
    return [dealt[place] for place in draw_order(count, "places", *key)]


@dataclass(frozen=True)
class PathGroups:
    """Cards that are dealt to ranks: one path, or two paths that a rank runs one after the other."""

    cards: tuple[tuple[int, ...], ...]
    """Indices of paths."""
    weights: tuple[int, ...]
    """Of each card."""
    bands: tuple[tuple[int, ...], ...]
    """Indices of cards of like cost: what ranks may hold at the same time. Every card is in one band."""

    def hands(self, rounds: int, world: int, *key: int | str, first: Sequence[int] = ()) -> list[list[int]]:
        """The paths of each rank after `rounds` rounds of one card a rank, all of one band in a round.

        A band comes as often as its weight says, and so do the cards within it.
        first: cards that lie together on the line, where there is one band.
        """
        weights = [sum(self.weights[card] for card in band) for band in self.bands]
        drawn = deal(weights, rounds, "bands", *key)
        hands: list[list[int]] = [[] for _ in range(world)]
        for number, band in enumerate(self.bands):
            count = drawn.count(number) * world
            cards = [*first, *(card for card in band if card not in first)] if first else band
            dealt = deal([self.weights[card] for card in cards], count, "band", number, *key, together=len(first))
            for place, card in enumerate(dealt):
                hands[place % world].extend(self.cards[cards[card]])
        return hands

    @property
    def reach(self) -> float:
        """Cards that one round shows on average where ranks are many."""
        weights = [sum(self.weights[card] for card in band) for band in self.bands]
        return sum(weight * len(band) for weight, band in zip(weights, self.bands, strict=True)) / sum(weights)


def singles(weights: Sequence[int], costs: Sequence[float]) -> PathGroups:
    """A card for each path."""
    used = tuple(index for index, weight in enumerate(weights) if weight)
    return _deck(tuple((index,) for index in used), tuple(weights[index] for index in used), costs)


def pairs(weights: Sequence[int], costs: Sequence[float]) -> PathGroups:
    """A card for each two paths at opposite places, the light and the heavy one, when paths stand by cost.

    A path as wide as its weight stands on a line; the one at distance u from the light end goes with the one at
    distance u from the heavy end. So every path keeps its share, whatever the weights, and sums are close to equal.
    """
    by_cost = sorted((index for index, weight in enumerate(weights) if weight), key=lambda index: (costs[index], index))
    total = sum(weights)
    ends = [2 * end for end in running_sums(weights[index] for index in by_cost)]
    cuts = sorted({0, total, *(end for end in ends if end < total), *(2 * total - end for end in ends if end > total)})
    cards, masses, light, heavy = [], [], 0, len(by_cost) - 1
    for low, high in zip(cuts, cuts[1:], strict=False):
        while ends[light] <= low:
            light += 1
        while heavy and ends[heavy - 1] >= 2 * total - low:
            heavy -= 1
        cards.append((by_cost[light], by_cost[heavy]))
        masses.append(high - low)
    return _deck(tuple(cards), tuple(masses), costs)


def _deck(cards: tuple[tuple[int, ...], ...], weights: tuple[int, ...], costs: Sequence[float]) -> PathGroups:
    sums = [sum(costs[index] for index in card) for card in cards]
    return PathGroups(cards, weights, bands(weights, sums))


def bands(weights: Sequence[int], costs: Sequence[float]) -> tuple[tuple[int, ...], ...]:
    """Cards in runs of like cost, each with mean over largest cost at least BALANCED; light to heavy.

    Of all ways to cut the cards in order of cost, the one in which a round shows most cards on average.
    """
    order = sorted(range(len(costs)), key=lambda card: (costs[card], card))
    weight = [0, *running_sums(weights[card] for card in order)]
    work = [0.0, *running_sums(weights[card] * costs[card] for card in order)]
    best: list[tuple[float, int]] = [(0.0, 0)]
    for stop in range(1, len(order) + 1):
        largest = costs[order[stop - 1]]
        fits = [
            (best[start][0] + (weight[stop] - weight[start]) * (stop - start), start)
            for start in range(stop)
            if start == stop - 1 or work[stop] - work[start] >= BALANCED * largest * (weight[stop] - weight[start])
        ]
        best.append(max(fits))
    cut, stop = [], len(order)
    while stop:
        start = best[stop][1]
        cut.append(tuple(order[start:stop]))
        stop = start
    return tuple(reversed(cut))
