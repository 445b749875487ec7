"""How often each path was trained, and on which rank, counted from the lines of metrics.jsonl."""

import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypedDict

SIGMAS = 4.0
"""Standard deviations that a path may stay below its expected draws."""
NEVER = 10.0
"""Expected independent draws from which on a path that was never drawn counts as under-drawn."""

Shares = Callable[[int], Mapping[str, float]]
"""Number of ranks to the expected share of each path by its key."""
TiedSlots = Callable[[int], int]
"""Number of ranks to the most slots of a step that one random choice fills: `PathSampler.tied_slots`."""


class PathDraws(TypedDict):
    """One path of the ledger."""

    key: str
    draws: int
    share: float
    """Of all draws."""
    expected_share: float
    """0 for a path that the sampler does not know."""
    ranks: list[int]
    """Draws of each rank."""
    last_step: int | None
    """None if it was never drawn."""
    behind: bool
    """Whether it was drawn less often than chance explains."""


class Ledger(TypedDict):
    """ledger.json."""

    steps: int
    draws: int
    ranks: int
    """The most ranks of any step."""
    paths: list[PathDraws]


def build_ledger(lines: Iterable[Mapping[str, Any]], shares: Shares, tied_slots: TiedSlots, accumulate: int) -> Ledger:
    """The ledger of a stage.

    lines: of one stage, each with `step` and `path`, the keys of all ranks and micro-steps: rank 0's micro-steps, then
    rank 1's. If a step has several lines, the last counts: a restart repeated it. accumulate: micro-steps of a step in
    lines without `accumulate` of their own. A line's number of ranks follows from it, so one file may hold lines of
    restarts with other numbers of ranks.
    """
    latest = {line["step"]: (line.get("accumulate", accumulate), [*map(sys.intern, line["path"])]) for line in lines}
    counts: dict[str, Counter[int]] = {}
    last: dict[str, int] = {}
    sizes: Counter[tuple[int, int]] = Counter()
    for step, (micro_steps, drawn) in sorted(latest.items()):
        sizes[len(drawn) // micro_steps, len(drawn)] += 1
        for slot, key in enumerate(drawn):
            counts.setdefault(key, Counter())[slot // micro_steps] += 1
            last[key] = step
    # Expected draws are summed over steps, each with the shares of its number of ranks. A path is under-drawn if it is
    # SIGMAS below them. Slots tied to one random choice count as one draw: they widen the deviation as much.
    expected, variance, choices = (defaultdict[str, float](float) for _ in range(3))
    for (world, slots), steps in sizes.items():
        for key, share in shares(world).items():
            expected[key] += steps * slots * share
            variance[key] += steps * slots * tied_slots(world) * share * (1 - share)
            choices[key] += steps * slots * share / tied_slots(world)
    keys = list(shares(max((world for world, _ in sizes), default=1)))
    keys += sorted(counts.keys() - set(keys))
    draws = sum(slots * steps for (_, slots), steps in sizes.items())
    ranks = max((world for world, _ in sizes), default=0)
    paths: list[PathDraws] = []
    for key in keys:
        found = counts.get(key, Counter())
        late = found.total() < expected[key] - SIGMAS * variance[key] ** 0.5
        paths.append(
            {
                "key": key,
                "draws": found.total(),
                "share": round(found.total() / draws, 6) if draws else 0.0,
                "expected_share": round(expected[key] / draws, 6) if draws else 0.0,
                "ranks": [found[rank] for rank in range(ranks)],
                "last_step": last.get(key),
                "behind": late or (not found and choices[key] >= NEVER),
            }
        )
    return {"steps": len(latest), "draws": draws, "ranks": ranks, "paths": paths}


def under_drawn(ledger: Ledger) -> list[str]:
    """Keys of the paths that were drawn less often than chance explains."""
    return [path["key"] for path in ledger["paths"] if path["behind"]]
