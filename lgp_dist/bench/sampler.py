"""What each policy costs and covers, by arithmetic over its schedule, so equal on every machine."""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace
from itertools import product
from operator import itemgetter
from typing import Any, get_args

from lgp_dist.config.own_recipe import is_own
from lgp_dist.config.run_config import Policy, RunConfig
from lgp_dist.errors import UserError, nearest
from lgp_dist.paths.cost import ancestry_forward, path_costs
from lgp_dist.paths.sampler import PathSampler
from lgp_dist.paths.space import space_of
from lgp_dist.recipes import RECIPES, recipe_of

POLICIES: tuple[str, ...] = tuple(policy for policy in get_args(Policy) if policy != "in_turn")
"""Those of pools of rows; nested widths train all models in turn."""
DRAWS, FEWEST_STEPS, MOST_STEPS = 60_000, 200, 4_000
"""The default number of steps gives this many draws, within these limits."""
COLUMNS = (
    (
        *("recipe", "policy", "ranks", ("micro", itemgetter("micro_steps")), "steps", "efficiency"),
        ("+ ancestry", itemgetter("efficiency_with_ancestry")),
        ("each micro", itemgetter("efficiency_micro_step")),
        *("coverage", "blocks", "share_min", "share_max"),
    ),
)


def parse_numbers(option: str, text: str) -> tuple[int, ...]:
    """Whole numbers from 1 to 65536, separated by commas, each once; UserError where an option holds others."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() and 1 <= int(part) <= 65536 for part in parts):
        raise UserError(f"{option} is {text!r}, but must be whole numbers from 1 to 65536: write them like 1,2,8.")
    return tuple(dict.fromkeys(int(part) for part in parts))


def parse_policies(text: str) -> tuple[str, ...]:
    """Policies separated by commas, empty for all; UserError for others."""
    return parse_names("--policies", text, POLICIES) or POLICIES


def parse_names(option: str, text: str, known: Collection[str]) -> tuple[str, ...]:
    """Names separated by commas, each once; UserError where an option has others. Empty parts are left out."""
    chosen = listed(text)
    for name in chosen:
        if name not in known:
            advice = nearest(name, known, f"choose from {', '.join(known)}")
            raise UserError(f"{option} names {name!r}, which is unknown: {advice}.")
    return chosen


def listed(text: str) -> tuple[str, ...]:
    """The parts of an option that are separated by commas, each once; empty parts are left out."""
    return tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def bench_sampler(
    recipe: str, ranks: str, micro_steps: str, policies: str = "", steps: int = 0, seed: int = 0, meet: Any = "step"
) -> list[dict[str, Any]]:
    """One object of `measure` for each recipe, policy, number of micro-steps and number of ranks.

    recipe, ranks, micro_steps, policies: names or numbers, separated by commas; no policy for all. steps: looked at for
    each object; 0 for the default. meet: as `finetune.meet`. UserError where a name is unknown or a number out of
    range.
    """
    for option, value in (("--steps", steps), ("--seed", seed)):
        if value < 0:
            raise UserError(f"{option} is {value}, but must be 0 or more: choose another value.")
    cases = product(
        parse_names("--recipe", recipe, [*RECIPES, *filter(is_own, listed(recipe))]),
        parse_policies(policies),
        parse_numbers("--micro-steps", micro_steps),
        parse_numbers("--ranks", ranks),
    )
    return [
        {"recipe": name} | measure(with_policy(replace(recipe_of(name), seed=seed), policy, micros, meet), world, steps)
        for name, policy, micros, world in cases
    ]


def with_policy(config: RunConfig, policy: Any, accumulate: int, meet: Any = "step") -> RunConfig:
    """The same run with another policy, number of micro-steps and place where ranks meet."""
    finetune = config.finetune
    train = replace(finetune.train, accumulate=accumulate)
    return replace(config, finetune=replace(finetune, policy=policy, meet=meet, train=train))


def measure(config: RunConfig, world: int, steps: int = 0) -> dict[str, Any]:
    """What the schedule of a run's first steps does on `world` ranks.

    efficiency: cost of a mean rank over that of each step's busiest rank, both summed over steps: the share of machine
    time that is work where ranks wait for each other once in a step. A path's cost is 3 x its FLOPs.
    efficiency_micro_step: the same where ranks wait for each other in every micro-step (ZeRO-2 and ZeRO-3).
    efficiency_with_ancestry: with the ancestry's forward in each micro-step; null where its size is not known.
    coverage and blocks: share of the pool's paths and of its blocks that a step trains, means over steps.

    share_min and share_max: shares of all draws of the paths that were drawn least and most often, relative to their
    expected shares, share_min_expected and share_max_expected.
    """
    space = space_of(config)
    sampler = PathSampler.from_config(config, space)
    sampler.check(world)
    slots = world * sampler.accumulate
    steps = steps or min(MOST_STEPS, max(FEWEST_STEPS, DRAWS // slots))
    table = path_costs(space, config.finetune.costs)
    costs = [table[path.key] for path in sampler.paths]
    blocks = [_blocks(path, max(space.depths)) for path in sampler.paths]
    all_blocks = len(frozenset().union(*blocks))
    counts = Counter[int]()
    mean = slowest = slowest_micro = covered = trained = 0.0
    for step in range(steps):
        schedule = sampler.schedule(step, world)
        work = [sum(costs[index] for index in hand) for hand in zip(*schedule, strict=True)]
        mean, slowest = mean + sum(work) / world, slowest + max(work)
        slowest_micro += sum(max(costs[index] for index in row) for row in schedule)
        drawn = Counter(index for row in schedule for index in row)
        counts, seen = counts + drawn, set(drawn)
        covered += len(seen) / len(costs)
        trained += len(frozenset().union(*(blocks[index] for index in seen))) / all_blocks
    ancestry = ancestry_forward(config)
    extra = None if ancestry is None else steps * sampler.accumulate * ancestry
    return {
        "policy": sampler.policy,
        "meet": sampler.meet,
        "ranks": world,
        "micro_steps": sampler.accumulate,
        "steps": steps,
        "seed": sampler.seed,
        "efficiency": round(mean / slowest, 4),
        "efficiency_micro_step": round(mean / slowest_micro, 4),
        "efficiency_with_ancestry": None if extra is None else round((mean + extra) / (slowest + extra), 4),
        "coverage": round(covered / steps, 4),
        "blocks": round(trained / steps, 4),
        **_shares(counts, list(sampler.shares(world).values()), slots * steps),
    }


def _blocks(path: Any, depth: int) -> frozenset[tuple[int, int]]:
    return frozenset(
        (part.row, block) for part in path.segments for block in range(depth) if path.has_block(part.row, block)
    )


def _shares(counts: Counter[int], expected: Sequence[float], draws: int) -> dict[str, float]:
    """The shares that are farthest below and above what is expected."""
    order = sorted(range(len(expected)), key=lambda index: counts[index] / expected[index])
    ends = {"share_min": order[0], "share_max": order[-1]}
    return {
        key: round(value, 6)
        for name, index in ends.items()
        for key, value in ((name, counts[index] / draws), (f"{name}_expected", expected[index]))
    }
