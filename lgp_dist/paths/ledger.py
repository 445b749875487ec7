"""Which path ran where and how often, counted from the lines of metrics.jsonl. Pure."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

SIGMAS = 4.0
"""Standard deviations by which a path may stay below its expected draws."""
NEVER = 10.0
"""Draws expected by chance of its own at which a path that never came has fallen behind."""

Shares = Callable[[int], Mapping[str, float]]
"""Number of ranks to the expected share of each path by its key."""
Clump = Callable[[int], int]
"""Number of ranks to the most slots of a step that one chance fills."""


def build_ledger(lines: Sequence[Mapping[str, Any]], shares: Shares, clump: Clump, accumulate: int) -> dict[str, Any]:
    """The ledger of a stage: steps, draws, and for each path its draws against what was expected.

    lines: of one stage, each with `step` and `path`, the keys of all ranks and micro-steps: rank 0's micro-steps, then
    rank 1's. Of several lines for a step the last one counts: a restart made the step again. accumulate: micro-steps a
    step in lines that do not say so themselves (`accumulate`); the ranks of a line follow from it, so that a file may
    hold lines of runs with different numbers of ranks.

    Each path has key, draws, share and expected_share (of all draws), ranks (draws of each rank), last_step (None where
    it never came) and behind: whether it came less often than chance explains, by SIGMAS of independent draws of
    `clump` slots each, or never where NEVER such draws were expected. A path that `shares` does not know has an
    expected share of 0.
    """
    latest = {line["step"]: line for line in lines}
    counts: dict[str, Counter[int]] = {}
    last: dict[str, int] = {}
    sizes: Counter[tuple[int, int]] = Counter()
    for step, line in sorted(latest.items()):
        micro_steps = line.get("accumulate", accumulate)
        sizes[len(line["path"]) // micro_steps, len(line["path"])] += 1
        for slot, key in enumerate(line["path"]):
            counts.setdefault(key, Counter())[slot // micro_steps] += 1
            last[key] = step
    expected, variance, chances = Counter(), Counter(), Counter()
    for (world, slots), steps in sizes.items():
        for key, share in shares(world).items():
            expected[key] += steps * slots * share
            variance[key] += steps * slots * clump(world) * share * (1 - share)
            chances[key] += steps * slots * share / clump(world)
    keys = list(shares(max((world for world, _ in sizes), default=1)))
    keys += sorted(counts.keys() - set(keys))
    draws = sum(slots * steps for (_, slots), steps in sizes.items())
    ranks = max((world for world, _ in sizes), default=0)
    paths = []
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
                "behind": late or (not found and chances[key] >= NEVER),
            }
        )
    return {"steps": len(latest), "draws": draws, "ranks": ranks, "paths": paths}


def behind(ledger: Mapping[str, Any]) -> list[str]:
    """Keys of the paths that fell behind."""
    return [path["key"] for path in ledger["paths"] if path["behind"]]
