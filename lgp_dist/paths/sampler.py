"""Which path each rank trains in each micro-step: a pure function, so a resumed run trains the same paths."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property, lru_cache
from itertools import accumulate as running_sums
from math import gcd, lcm
from typing import Literal

from lgp_dist.config.run_config import Policy, RunConfig
from lgp_dist.errors import UserError
from lgp_dist.paths.cost import path_costs
from lgp_dist.paths.path import Path, Space
from lgp_dist.paths.stratified import (
    PathGroups,
    balanced_pairs,
    draw_index,
    draw_order,
    flops_bins,
    single_paths,
    systematic_sample,
)

Plan = tuple[tuple[Path, ...], ...]
"""The paths of a step, indexed by micro-step, then rank."""

KEPT = 4
"""Plans that a sampler caches: every rank's path in every micro-step is asked for."""


@dataclass(frozen=True)
class PathSampler:
    """Draws paths. A step has world * accumulate slots, and every slot holds each path with that path's share.

    `independent`: each rank draws on its own, as in SN-Net and the paper. `shared`: all ranks draw the same path.
    `spread`: in a step each path comes slots * share times, rounded up or down, in random slots; with equal shares no
    path repeats until all have come. `balanced`: as `spread`, within what keeps the ranks' summed costs nearly equal:
    two micro-steps hold a light and a heavy path in random order, and a micro-step without a partner holds paths of
    like cost on all ranks (`stratified.cost_buckets`). A single rank waits for nobody: there `balanced` is `spread`.
    `in_turn`: all paths one after the other, the last first, on every rank.

    The only state is the seed. Recent plans are cached.
    """

    paths: tuple[Path, ...]
    policy: Policy
    seed: int
    accumulate: int = 1
    """Micro-steps of a step."""
    costs: tuple[float, ...] = ()
    """Of each path, in any unit; only `balanced` needs them."""
    weights: tuple[int | Fraction, ...] = ()
    """Of each path: how often it comes, relative to the others; empty for equal shares."""
    meet: Literal["step", "micro_step"] = "step"
    """Where ranks wait for each other; with micro_step, `balanced` equalises the costs of every micro-step."""
    sandwich: bool = False
    """Whether every step trains each row alone at least once; see `shares`."""
    lead_every: int = 0
    """Micro-steps of a group, of which the first trains the lead path, the widest row alone, on every rank; the policy
    holds for the others, which draw the other paths. 0 for no lead path."""

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
        weights = [row_weight if path.is_row else Fraction(1) for path in paths]
        bins = flops_bins([space.cost(path).flops for path in paths], finetune.bin_flops) if finetune.bin_flops else []
        for held in bins:
            for index in held:
                weights[index] /= len(held)
        return cls(
            paths,
            finetune.policy,
            config.seed,
            finetune.train.accumulate,
            tuple(costs[path.key] for path in paths),
            () if set(weights) == {1} else tuple(weights),
            finetune.meet,
            finetune.sandwich,
            finetune.paths_per_batch if finetune.lead_weight and finetune.policy != "in_turn" else 0,
        )

    def draw(self, step: int, micro_step: int, rank: int, world: int) -> Path:
        """The path of one rank in one micro-step.

        step: optimizer step, from 0. micro_step: 0 .. accumulate - 1. rank: 0 .. world - 1.
        """
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} is outside a world of {world}")
        if self.policy in ("independent", "shared") and not self.sandwich and not self.lead_every:
            return self.paths[self._alone(step, micro_step, rank, self._ends)]
        if not 0 <= micro_step < self.accumulate:
            raise ValueError(f"micro-step {micro_step} is outside a step of {self.accumulate}")
        return self.plan(step, world)[micro_step][rank]

    def plan(self, step: int, world: int) -> Plan:
        """The paths of all ranks in a step, indexed by micro-step, then rank."""
        found = self._recent.get((step, world))
        if found is None:
            found = tuple(tuple(self.paths[index] for index in row) for row in self.schedule(step, world))
            if len(self._recent) >= KEPT:
                self._recent.clear()
            self._recent[step, world] = found
        return found

    def schedule(self, step: int, world: int) -> list[list[int]]:
        """As `plan`, with indices of `paths`."""
        if self.lead_every:
            others = iter(self._followers.schedule(step, world))
            micro_steps = (None if micro % self.lead_every == 0 else next(others) for micro in range(self.accumulate))
            return [
                [self._lead] * world if drawn is None else [index + (index >= self._lead) for index in drawn]
                for drawn in micro_steps
            ]
        if self.policy == "in_turn":
            count = len(self.paths)
            return [[count - 1 - micro % count] * world for micro in range(self.accumulate)]
        if self.policy in ("independent", "shared"):
            return self._alone_schedule(step, world)
        if self.policy == "balanced" and world > 1:
            ranks = self._balanced(step, world)
        else:
            slots = world * self.accumulate
            sample = systematic_sample(self._step_weights(world), slots, "spread", self.seed, step)
            ranks = [sample[rank::world] for rank in range(world)]
        return [[paths[micro] for paths in ranks] for micro in range(self.accumulate)]

    def shares(self, world: int) -> dict[Path, float]:
        """The long-run share of each path, on every rank and in total; shares sum to 1.

        Shares are weights over their sum. With `sandwich` a row alone that would come less than once in a step (under
        `shared`: in the micro-steps of a step) comes once, on every rank equally often, and the other paths divide the
        remaining slots by their weights. Shares then depend on the number of ranks. A lead path has one share of
        `lead_every`, and the others divide the rest.
        """
        if self.lead_every:
            others = self._followers.shares(world)
            lead = 1 / self.lead_every
            return {path: (1 - lead) * others[path] if path in others else lead for path in self.paths}
        weights = self._step_weights(world)
        return {path: weight / sum(weights) for path, weight in zip(self.paths, weights, strict=True)}

    def tied_slots(self, world: int) -> int:
        """The most slots of a step that one random choice fills with the same path."""
        if self.lead_every:
            return self._followers.tied_slots(world)
        if self.policy in ("shared", "in_turn"):
            return world
        if self.policy != "balanced" or world == 1:
            return 1
        in_pairs = 2 if self.accumulate > 1 and self.meet == "step" else 1
        one_bucket = all(len(groups.cost_buckets) == 1 for groups, rounds in self._groups(world) if rounds)
        return in_pairs if one_bucket else in_pairs * world

    def check(self, world: int) -> None:
        """UserError if `sandwich` cannot hold with this number of ranks."""
        if self.lead_every:
            return self._followers.check(world)
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
            groups, rounds = self._groups(world)[0]
            if len(groups.cost_buckets) > 1 or not self._holds_rows(groups, rounds * world):
                raise UserError(
                    f"finetune.sandwich cannot hold with finetune.policy balanced, {world} ranks and "
                    f"finetune.train.accumulate {self.accumulate}, as the ranks' work would differ: make accumulate "
                    "even, or larger, or choose policy spread."
                )

    @cached_property
    def _recent(self) -> dict[tuple[int, int], Plan]:
        return {}

    @cached_property
    def _lead(self) -> int:
        """Index of the widest row alone."""
        return max(self._rows)

    @cached_property
    def _followers(self) -> "PathSampler":
        """Draws the other paths in the micro-steps that the lead path leaves."""
        lead, rows = self._lead, len(self._rows)
        return replace(
            self,
            paths=self.paths[:lead] + self.paths[lead + 1 :],
            costs=self.costs[:lead] + self.costs[lead + 1 :],
            weights=self.weights[:lead] + self.weights[lead + 1 :],
            accumulate=self.accumulate - self.accumulate // self.lead_every,
            sandwich=self.sandwich and rows > 1,
            lead_every=0,
        )

    @cached_property
    def _rows(self) -> tuple[int, ...]:
        """Indices of the rows alone."""
        return tuple(index for index, path in enumerate(self.paths) if path.is_row)

    @cached_property
    def _whole_weights(self) -> tuple[int, ...]:
        return _whole(self.weights or (1,) * len(self.paths))

    @cached_property
    def _ends(self) -> tuple[int, ...]:
        return tuple(running_sums(self._whole_weights))

    def _slots(self, world: int) -> int:
        """Slots of a step that are filled one by one."""
        return self.accumulate * (1 if self.policy == "shared" else world)

    def _step_weights(self, world: int) -> tuple[int, ...]:
        """Whole weights, raised for the rows that `sandwich` guarantees."""
        if not self.sandwich:
            return self._whole_weights
        return _guaranteed(self._whole_weights, self._rows, self._slots(world))

    def _alone(self, step: int, micro_step: int, rank: int, ends: tuple[int, ...]) -> int:
        """One rank's own draw, by running sums of weights."""
        who = "all" if self.policy == "shared" else rank
        return bisect_right(ends, draw_index(ends[-1], "path", self.seed, step, micro_step, who))

    def _alone_schedule(self, step: int, world: int) -> list[list[int]]:
        """Of `independent` and `shared`: guaranteed rows take random slots, the other slots are drawn."""
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

    def _groups(self, world: int) -> tuple[tuple[PathGroups, int], tuple[PathGroups, int]]:
        """What `balanced` samples from: two kinds of groups, each with its rounds in a step; the first has rounds."""
        single, pairs = _both_groups(self._step_weights(world), self.costs)
        if self.accumulate == 1 or self.meet == "micro_step" or pairs.groups_per_round < single.groups_per_round:
            return (single, self.accumulate), (pairs, 0)
        return (pairs, self.accumulate // 2), (single, self.accumulate % 2)

    def _balanced(self, step: int, world: int) -> list[list[int]]:
        """The paths of each rank in a step of `balanced`, in random order."""
        ranks: list[list[int]] = [[] for _ in range(world)]
        for number, (groups, rounds) in enumerate(self._groups(world)):
            if rounds:
                guaranteed = self.sandwich and number == 0 and len(groups.cost_buckets) == 1
                first = self._row_groups(groups) if guaranteed else ()
                assigned = groups.assignments(rounds, world, "balanced", self.seed, step, number, first=first)
                for paths, more in zip(ranks, assigned, strict=True):
                    paths.extend(more)
        if self.meet == "micro_step":  # one order for all ranks, whose paths at equal places are of one bucket
            order = draw_order(self.accumulate, "order", self.seed, step)
            return [[paths[place] for place in order] for paths in ranks]
        slots = draw_order(world * self.accumulate, "order", self.seed, step)
        ordered = []
        for rank, paths in enumerate(ranks):
            mine = slots[rank * self.accumulate : (rank + 1) * self.accumulate]
            ordered.append([path for _, path in sorted(zip(mine, paths, strict=True))])
        return ordered

    def _row_groups(self, groups: PathGroups) -> list[int]:
        """Groups with a row alone, those with the same row next to each other as far as possible."""
        by_cost = sorted(self._rows, key=lambda index: (self.costs[index], index))
        chain = [by_cost[0], *reversed(by_cost[1:])]  # the lightest row is paired with the heaviest
        found = []
        for group, held in enumerate(groups.groups):
            places = [chain.index(index) for index in held if index in chain]
            if places:
                found.append((min(places), max(places), group))
        return [group for _, _, group in sorted(found)]

    def _holds_rows(self, groups: PathGroups, count: int) -> bool:
        """Whether every sample of `count` groups of one bucket holds every row."""
        with_rows = self._row_groups(groups)
        for row in self._rows:
            places = [place for place, group in enumerate(with_rows) if row in groups.groups[group]]
            if not places or places[-1] - places[0] + 1 != len(places):
                return False
            if count * sum(groups.weights[with_rows[place]] for place in places) < sum(groups.weights):
                return False
        return True


def _whole(weights: Sequence[int | Fraction]) -> tuple[int, ...]:
    """The smallest whole numbers in the same proportions."""
    # Times the least common multiple of the denominators every weight is whole; the common divisor is then removed.
    common = lcm(*(Fraction(weight).denominator for weight in weights))
    scaled = [int(weight * common) for weight in weights]
    return tuple(weight // gcd(*scaled) for weight in scaled)


@lru_cache(maxsize=16)
def _guaranteed(weights: tuple[int, ...], rows: tuple[int, ...], slots: int) -> tuple[int, ...]:
    """Weights with which each of `rows` is expected at least once in this many slots; others keep their proportions."""
    # A row expected less than once is raised to exactly one slot. That leaves fewer slots to the others, which may
    # push another row below one, so it repeats until no row is raised.
    if slots < len(rows):
        raise ValueError(f"{slots} slots cannot hold {len(rows)} rows")
    raised: set[int] = set()
    while True:
        rest = sum(weight for index, weight in enumerate(weights) if index not in raised)
        per_weight = Fraction(slots - len(raised), rest or 1)
        more = {row for row in rows if row not in raised and weights[row] * per_weight < 1}
        if not more:
            return _whole([1 if index in raised else weight * per_weight for index, weight in enumerate(weights)])
        raised |= more


@lru_cache(maxsize=16)
def _without(weights: tuple[int, ...], rows: tuple[int, ...], slots: int) -> tuple[int, ...]:
    """What remains of these weights after each of `rows` has one of the slots."""
    total = sum(weights)
    left = [weight * slots - (total if index in rows else 0) for index, weight in enumerate(weights)]
    return _whole(left) if any(left) else weights


@lru_cache(maxsize=16)
def _both_groups(weights: tuple[int, ...], costs: tuple[float, ...]) -> tuple[PathGroups, PathGroups]:
    return single_paths(weights, costs), balanced_pairs(weights, costs)
