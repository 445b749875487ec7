"""Which path each rank trains in each micro-step: a pure function, the same before and after a restart."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from itertools import accumulate as running_sums
from math import gcd, lcm
from typing import Literal

from lgp_dist.config.run_config import Policy, RunConfig
from lgp_dist.errors import UserError
from lgp_dist.paths.cost import path_costs
from lgp_dist.paths.space import AnyPath, Space
from lgp_dist.paths.stratified import PathGroups, deal, draw_index, draw_order, pairs, singles

Plan = tuple[tuple[AnyPath, ...], ...]
"""The paths of a step, indexed by micro-step, then rank."""

KEPT = 4
"""Plans that a sampler remembers."""


@dataclass(frozen=True)
class PathSampler:
    """Draws paths. A step has world * accumulate slots, and every slot holds each path with that path's share.

    policy `independent`: each rank draws alone (SN-Net's and the paper's choice). `shared`: all ranks draw the same.
    `spread`: in a step each path comes slots * share times, rounded up or down, in random places; with equal shares
    none repeats until all have come. `balanced`: spread, as far as the ranks' summed cost in a step stays equal: two
    micro-steps hold a light and a heavy path in random order, so that their sum is nearly the same for all, and a
    micro-step without a partner holds paths of like cost on all ranks (`dealing.bands`). One rank waits for none: there
    `balanced` is `spread`.

    The only state is the seed; a plan that is remembered is the one that would be made again.
    """

    paths: tuple[AnyPath, ...]
    policy: Policy
    seed: int
    accumulate: int = 1
    """Micro-steps of a step."""
    costs: tuple[float, ...] = ()
    """Of each path, in any unit; only `balanced` needs them."""
    weights: tuple[int | Fraction, ...] = ()
    """Of each path, how often it comes compared to others; empty for equal shares."""
    meet: Literal["step", "micro_step"] = "step"
    """Where ranks wait for each other: under `balanced` each micro-step of micro_step is dealt as if it were alone."""
    sandwich: bool = False
    """Whether every step holds each row alone at least once; see `shares`."""

    def __post_init__(self) -> None:
        if self.policy == "balanced" and len(self.costs) != len(self.paths):
            raise ValueError(f"balanced needs a cost for each of {len(self.paths)} paths, but has {len(self.costs)}")
        if self.weights and (len(self.weights) != len(self.paths) or min(self.weights) <= 0):
            raise ValueError(f"{len(self.paths)} paths need as many weights above 0, not {self.weights}")

    @classmethod
    def from_config(cls, config: RunConfig, space: Space) -> "PathSampler":
        """The sampler of stage finetune. UserError where `finetune.only` or `finetune.costs` cannot be used."""
        finetune = config.finetune
        paths = space.chosen(finetune.only)
        costs = path_costs(space, finetune.costs)
        row_weight = Fraction(str(finetune.row_weight))
        weights = tuple(row_weight if path.stitch is None else Fraction(1) for path in paths)
        return cls(
            paths,
            finetune.policy,
            config.seed,
            finetune.train.accumulate,
            tuple(costs[path.key] for path in paths),
            () if row_weight == 1 else weights,
            finetune.meet,
            finetune.sandwich,
        )

    def draw(self, step: int, micro_step: int, rank: int, world: int) -> AnyPath:
        """The path of one rank in one micro-step.

        step: optimizer step, from 0. micro_step: 0 .. accumulate - 1. rank: 0 .. world - 1.
        """
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} is outside a world of {world}")
        if self.policy in ("independent", "shared") and not self.sandwich:
            return self.paths[self._alone(step, micro_step, rank, self._ends)]
        if not 0 <= micro_step < self.accumulate:
            raise ValueError(f"micro-step {micro_step} is outside a step of {self.accumulate}")
        return self.plan(step, world)[micro_step][rank]

    def plan(self, step: int, world: int) -> Plan:
        """The paths of all ranks in a step, indexed by micro-step, then rank."""
        found = self._recent.get((step, world))
        if found is None:
            found = tuple(tuple(self.paths[index] for index in row) for row in self.schedule(step, world))
            for old in list(self._recent)[: max(0, len(self._recent) - KEPT + 1)]:
                self._recent.pop(old, None)
            self._recent[step, world] = found
        return found

    def schedule(self, step: int, world: int) -> list[list[int]]:
        """As `plan`, with indices of `paths`."""
        if self.policy in ("independent", "shared"):
            return self._alone_schedule(step, world)
        if self.policy == "balanced" and world > 1:
            hands = self._hands(step, world)
        else:
            slots = world * self.accumulate
            dealt = deal(self._step_weights(world), slots, "spread", self.seed, step)
            hands = [dealt[rank::world] for rank in range(world)]
        return [[hand[micro] for hand in hands] for micro in range(self.accumulate)]

    def shares(self, world: int) -> dict[AnyPath, float]:
        """The long-run share of each path, on every rank and over all; they sum to 1.

        Weights over their sum. With `sandwich` a row alone that would come less than once in a step (under `shared`:
        in the micro-steps of a step) comes once, at a place that every rank has equally often, and the other paths
        share the rest by their weights: then shares depend on the number of ranks.
        """
        weights = self._step_weights(world)
        return {path: weight / sum(weights) for path, weight in zip(self.paths, weights, strict=True)}

    def clump(self, world: int) -> int:
        """The most slots of a step that hold a path by one and the same chance: how much rougher than single draws."""
        if self.policy == "shared":
            return world
        if self.policy != "balanced" or world == 1:
            return 1
        decks = self._decks(world)
        both = 2 if self.accumulate > 1 and self.meet == "step" else 1
        return both if all(len(deck.bands) == 1 for deck, rounds in decks if rounds) else both * world

    def check(self, world: int) -> None:
        """UserError where `sandwich` cannot hold with so many ranks."""
        if not self.sandwich:
            return
        rows, slots = len(self._rows), self._slots(world)
        if not rows:
            raise UserError("finetune.sandwich is on, but finetune.only names no row alone: add one, or turn it off.")
        if slots < rows + (rows < len(self.paths)):
            kind = "micro-steps" if self.policy == "shared" else "ranks times micro-steps"
            raise UserError(
                f"finetune.sandwich puts {rows} rows alone into every step and leaves stitched paths the rest, but a "
                f"step has {slots} slots ({kind}): raise finetune.train.accumulate, or turn it off."
            )
        if self.policy == "balanced" and world > 1:
            deck, rounds = self._decks(world)[0]
            if len(deck.bands) > 1 or not self._holds_rows(deck, rounds * world):
                raise UserError(
                    f"finetune.sandwich cannot hold with finetune.policy balanced, {world} ranks and "
                    f"finetune.train.accumulate {self.accumulate}, as the ranks' work would differ: make accumulate "
                    "even, or larger, or choose policy spread."
                )

    @cached_property
    def _recent(self) -> dict[tuple[int, int], Plan]:
        return {}

    @cached_property
    def _rows(self) -> tuple[int, ...]:
        """Indices of the rows alone."""
        return tuple(index for index, path in enumerate(self.paths) if path.stitch is None)

    @cached_property
    def _whole_weights(self) -> tuple[int, ...]:
        return _whole(self.weights or (1,) * len(self.paths))

    @cached_property
    def _ends(self) -> tuple[int, ...]:
        return tuple(running_sums(self._whole_weights))

    def _slots(self, world: int) -> int:
        """Places of a step that are filled one by one."""
        return self.accumulate * (1 if self.policy == "shared" else world)

    def _step_weights(self, world: int) -> tuple[int, ...]:
        """Whole weights with the rows' guarantee in them."""
        if not self.sandwich:
            return self._whole_weights
        return _guaranteed(self._whole_weights, self._rows, self._slots(world))

    def _alone(self, step: int, micro_step: int, rank: int, ends: tuple[int, ...]) -> int:
        """One rank's own draw, by running sums of weights."""
        who = "all" if self.policy == "shared" else rank
        return bisect_right(ends, draw_index(ends[-1], "path", self.seed, step, micro_step, who))

    def _alone_schedule(self, step: int, world: int) -> list[list[int]]:
        """Of `independent` and `shared`: rows that must come take random slots, the other slots are drawn."""
        ends, fixed = self._ends, {}
        if self.sandwich:
            slots = self._slots(world)
            ends = tuple(running_sums(_without(self._step_weights(world), self._rows, slots)))
            fixed = dict(zip(draw_order(slots, "sandwich", self.seed, step), self._rows, strict=False))
        width = 1 if self.policy == "shared" else world
        filled = [
            [
                fixed[slot] if (slot := micro * width + rank) in fixed else self._alone(step, micro, rank, ends)
                for rank in range(width)
            ]
            for micro in range(self.accumulate)
        ]
        return [row * world for row in filled] if self.policy == "shared" else filled

    def _decks(self, world: int) -> tuple[tuple[PathGroups, int], tuple[PathGroups, int]]:
        """What `balanced` deals: (pairs, rounds of them), (single paths, rounds of them); the first has rounds."""
        weights = self._step_weights(world)
        single, pair = _both_decks(weights, self.costs)
        if self.accumulate == 1 or self.meet == "micro_step" or pair.reach < single.reach:
            return (single, self.accumulate), (pair, 0)
        return (pair, self.accumulate // 2), (single, self.accumulate % 2)

    def _hands(self, step: int, world: int) -> list[list[int]]:
        """The paths of each rank in a step of `balanced`, in random order."""
        hands: list[list[int]] = [[] for _ in range(world)]
        for number, (deck, rounds) in enumerate(self._decks(world)):
            if rounds:
                first = self._row_cards(deck) if self.sandwich and number == 0 and len(deck.bands) == 1 else ()
                dealt = deck.hands(rounds, world, "balanced", self.seed, step, number, first=first)
                for hand, more in zip(hands, dealt, strict=True):
                    hand.extend(more)
        if self.meet == "micro_step":  # hands hold the same bands at the same places, and keep them so
            order = draw_order(self.accumulate, "order", self.seed, step)
            return [[hand[place] for place in order] for hand in hands]
        slots = draw_order(world * self.accumulate, "order", self.seed, step)
        ordered = []
        for rank, hand in enumerate(hands):
            mine = slots[rank * self.accumulate : (rank + 1) * self.accumulate]
            ordered.append([path for _, path in sorted(zip(mine, hand, strict=True))])
        return ordered

    def _row_cards(self, deck: PathGroups) -> list[int]:
        """Cards with a row alone, those with the same row beside each other as far as they can be."""
        ends = sorted(self._rows, key=lambda index: (self.costs[index], index))
        chain = [ends[0], *reversed(ends[1:])]  # the lightest row meets the heaviest
        found = []
        for card, held in enumerate(deck.cards):
            places = [chain.index(index) for index in held if index in chain]
            if places:
                found.append((min(places), max(places), card))
        return [card for _, _, card in sorted(found)]

    def _holds_rows(self, deck: PathGroups, count: int) -> bool:
        """Whether a deal of `count` cards of one band holds every row, however it falls."""
        cards = self._row_cards(deck)
        for row in self._rows:
            places = [place for place, card in enumerate(cards) if row in deck.cards[card]]
            if not places or places[-1] - places[0] + 1 != len(places):
                return False
            if count * sum(deck.weights[cards[place]] for place in places) < sum(deck.weights):
                return False
        return True


def _whole(weights: Sequence[int | Fraction]) -> tuple[int, ...]:
    """The smallest whole numbers in the same proportions."""
    common = lcm(*(Fraction(weight).denominator for weight in weights))
    scaled = [int(weight * common) for weight in weights]
    return tuple(weight // gcd(*scaled) for weight in scaled)


@lru_cache(maxsize=16)
def _guaranteed(weights: tuple[int, ...], rows: tuple[int, ...], slots: int) -> tuple[int, ...]:
    """Weights with which each of `rows` is due at least once in so many slots; the others keep their proportions."""
    if slots < len(rows):
        raise ValueError(f"{slots} slots cannot hold {len(rows)} rows")
    lifted: set[int] = set()
    while True:
        rest = sum(weight for index, weight in enumerate(weights) if index not in lifted)
        due = Fraction(slots - len(lifted), rest or 1)
        more = {row for row in rows if row not in lifted and weights[row] * due < 1}
        if not more:
            return _whole([1 if index in lifted else weight * due for index, weight in enumerate(weights)])
        lifted |= more


@lru_cache(maxsize=16)
def _without(weights: tuple[int, ...], rows: tuple[int, ...], slots: int) -> tuple[int, ...]:
    """What is left of these weights when each of `rows` has one of the slots already."""
    total = sum(weights)
    left = [weight * slots - (total if index in rows else 0) for index, weight in enumerate(weights)]
    return _whole(left) if any(left) else weights


@lru_cache(maxsize=16)
def _both_decks(weights: tuple[int, ...], costs: tuple[float, ...]) -> tuple[PathGroups, PathGroups]:
    return singles(weights, costs), pairs(weights, costs)
