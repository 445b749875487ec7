"""Steps on more ranks than there are: a model of compute, skew and exchange, fitted to `lgp bench engine`.

Seconds of a step = a work + b micro-steps + c weights + d meeting + e rounds + f bytes, with every factor 0 or more:

* work: multiply-adds of the rank that the others wait for; where ranks share cores, at least the cores' mean work
* weights: bytes whose optimizer state a rank steps
* meeting: 1 if there are several ranks, for hooks, copies into buckets and threads
* rounds and bytes: the 2 (ranks - 1) hand-overs of a ring, and what a rank sends in them

Skew comes from the schedule and has no factor. Measurements on one and two ranks alone cannot tell meeting from rounds;
the factor of rounds is then 0.
"""

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lgp_dist.bench.baseline_ratios import read_rows
from lgp_dist.bench.common import check_least, facts
from lgp_dist.bench.sampler import listed, measure, parse_numbers, parse_policies, with_policy
from lgp_dist.config.run_config import RunConfig
from lgp_dist.errors import UserError
from lgp_dist.paths.cost import TRAINING, ancestry_forward
from lgp_dist.paths.sampler import PathSampler
from lgp_dist.paths.space import space_of
from lgp_dist.run.checks import check_config

FACTORS = ("work", "micro_steps", "weights", "meeting", "rounds", "bytes")
"""What a step's seconds are made of."""
SCHEDULED = 200
"""Steps of the schedule from which skew is computed."""
TRUSTED = 0.25
"""Median relative error of held-out steps above which predictions are useless."""
COLUMNS = {
    "fit": (
        "fitted_rows",
        "fitted_error",
        "fitted_error_most",
        "held_out_rows",
        "held_out_error",
        "held_out_error_most",
    ),
    "measured": ("engine", "policy", "ranks", "widths", "images", "ms", "spread", "predicted_ms", "error", "held_out"),
    "predicted": ("policy", "ranks", "predicted_ms", "compute_ms", "skew_ms", "exchange_ms", "efficiency"),
}
NEEDED = ("ranks", "ms", "gmacs", "gmacs_slowest", "bytes_weights", "micro_steps", "engine", "machine")


def amounts_of(row: dict[str, Any]) -> tuple[float, ...]:
    """FACTORS of an object of `lgp bench engine`."""
    ranks, machine = row["ranks"], row["machine"]
    crowd = max(1.0, ranks * machine["threads"] / machine["cores"])
    work = max(row["gmacs_slowest"], crowd * row["gmacs"])
    shared = ranks if row["engine"] in ("zero1", "zero2", "zero3") else 1
    sent = row["bytes_weights"] * (ranks - 1) / ranks
    own = (work, crowd * row["micro_steps"], crowd * row["bytes_weights"] / shared)
    return (*own, crowd * (ranks > 1), 2.0 * (ranks - 1), crowd * sent)


def fit(rows: Sequence[dict[str, Any]]) -> NDArray[np.float64]:
    """Seconds for each unit of FACTORS, none below 0, with the least squared relative errors of these objects.

    Non-negative least squares by trying all subsets: the best fit has some factors at 0, and is the plain least-squares
    fit of the others. Columns are scaled first, since work and bytes differ by many orders of magnitude.
    """
    table = np.array([amounts_of(row) for row in rows])
    seconds = np.array([row["ms"] / 1e3 for row in rows])
    relative = table / seconds[:, None]
    best, least = np.zeros(len(FACTORS)), np.inf
    for size in range(1, len(FACTORS) + 1):
        for chosen in map(list, combinations(range(len(FACTORS)), size)):
            scale = np.abs(relative[:, chosen]).max(0)
            if not scale.all():
                continue
            found = np.linalg.lstsq(relative[:, chosen] / scale, np.ones(len(rows)), rcond=None)[0] / scale
            error = float(((relative[:, chosen] @ found - 1) ** 2).sum())
            if found.min() >= 0 and error < least - 1e-12:
                best, least = np.zeros(len(FACTORS)), error
                best[chosen] = found
    return best


def bench_scaling(
    config: RunConfig, measured: str, ranks: str, policies: str = "", images: int = 0
) -> list[dict[str, Any]]:
    """Objects of `kind` fit, measured and predicted.

    The model is fitted to the measured steps of all numbers of ranks but the largest, or of one and two if there are no
    others; the steps of more ranks are held out. fit: seconds of each factor, and the median and largest relative error
    of fitted_rows and of held_out_rows; advice, how far to rely on it. measured: of each measured step ms,
    predicted_ms, error and held_out. predicted: for each policy and number of ranks predicted_ms, compute_ms, skew_ms
    (waiting for the slowest rank, by the schedule), exchange_ms, and efficiency, the share of one rank's images a
    second that each rank keeps.

    Predictions assume ranks with cores of their own and a network, both like those measured. measured, ranks, policies:
    files of `lgp bench engine`, numbers and names, separated by commas; no policy for all. images: of a rank's
    micro-step; 0 for the recipe's on one rank. UserError where files cannot be used or hold too few objects.
    """
    check_config(config)
    check_least("--images", images, 0)
    worlds, chosen = parse_numbers("--ranks", ranks), parse_policies(policies)
    advice = "make it with `lgp bench engine`"
    rows = [row for file in listed(measured) for row in read_rows("--measured", Path(file), NEEDED, advice)]
    counts = sorted({row["ranks"] for row in rows})
    most = counts[-2] if len(counts) > 2 else 2
    known, held = ([row for row in rows if (row["ranks"] <= most) == low] for low in (True, False))
    if len(known) < len(FACTORS) or not {1, 2} <= {row["ranks"] for row in known}:
        raise UserError(
            f"--measured has {len(known)} objects to fit to, but {len(FACTORS)} or more are needed, of one and two "
            "ranks among them: make them with scripts/bench_scaling."
        )
    factors = fit(known)
    judged = [_judged(factors, row, row["ranks"] > most) for row in known + held]
    errors = {late: [abs(row["error"]) for row in judged if row["held_out"] == late] for late in (False, True)}
    about = {"kind": "fit", "recipe": config.recipe, "engine": sorted({row["engine"] for row in rows})}
    about |= {f"s_per_{name}": seconds for name, seconds in zip(FACTORS, factors.tolist(), strict=True)}
    for late, name in ((False, "fitted"), (True, "held_out")):
        found = errors[late]
        about |= {f"{name}_rows": len(found), f"{name}_error": round(median(found), 4) if found else None}
        about |= {f"{name}_error_most": round(max(found), 4) if found else None}
    found = [about | {"advice": _trust(about)}, *judged]
    several = next(row for row in known if row["ranks"] > 1)
    for policy in chosen:
        one = _predicted(factors, config, policy, 1, images, several)
        for world in worlds:
            row = _predicted(factors, config, policy, world, images, several)
            found.append(row | {"efficiency": round(one["predicted_ms"] / row["predicted_ms"], 4)})
    return [row | facts() if row["kind"] == "fit" else row for row in found]


def _judged(factors: NDArray[np.float64], row: dict[str, Any], held_out: bool) -> dict[str, Any]:
    predicted = 1e3 * float(factors @ amounts_of(row))
    names = ("recipe", "engine", "policy", "ranks", "micro_steps", "widths", "images", "ms", "spread")
    return (
        {"kind": "measured"}
        | {name: row.get(name) for name in names}
        | {"predicted_ms": round(predicted, 2), "error": round(predicted / row["ms"] - 1, 4), "held_out": held_out}
    )


def _predicted(
    factors: NDArray[np.float64], config: RunConfig, policy: str, world: int, images: int, like: dict[str, Any]
) -> dict[str, Any]:
    """A step on ranks with cores of their own. like: a measured object of the predicted engine."""
    train, space = config.finetune.train, space_of(config)
    images = images or max(1, train.batch_size // train.accumulate)
    teacher = ancestry_forward(config) or 0.0
    shares = PathSampler.from_config(config, space).shares(world)
    mean = sum(share * space.cost(path).flops for path, share in shares.items()) * train.accumulate
    found = measure(with_policy(config, policy, train.accumulate, config.finetune.meet), world, SCHEDULED)
    meets = like["engine"] in ("zero2", "zero3") and like.get("reduction") != "union"
    efficiency = found["efficiency_micro_step" if meets else "efficiency"]
    weights = 4 * space.stored_params
    row = like | {"ranks": world, "micro_steps": train.accumulate, "bytes_weights": weights}
    row |= {"gmacs": images * (TRAINING * mean + train.accumulate * teacher) / 1e9}
    row |= {"gmacs_slowest": images * (TRAINING * mean / efficiency + train.accumulate * teacher) / 1e9}
    row |= {"machine": like["machine"] | {"cores": world * like["machine"]["threads"]}}
    parts = 1e3 * factors * amounts_of(row)
    skew = parts[0] * (1 - row["gmacs"] / row["gmacs_slowest"])
    return {
        "kind": "predicted",
        "recipe": config.recipe,
        "engine": like["engine"],
        "policy": policy,
        "ranks": world,
        "micro_steps": train.accumulate,
        "images_per_rank": images,
        "predicted_ms": round(float(parts.sum()), 3),
        "compute_ms": round(float(parts[:3].sum() - skew), 3),
        "skew_ms": round(float(skew), 3),
        "exchange_ms": round(float(parts[3:].sum()), 3),
    }


def _trust(about: dict[str, Any]) -> str:
    """How far predictions can be relied on."""
    error = about["held_out_error"]
    if error is None:
        return "No step of more ranks was held out: nothing says how good the predictions are."
    verdict = "do not rely on the predictions" if error > TRUSTED else "expect no better of the predictions"
    return f"{about['held_out_rows']} held-out steps are predicted with a median error of {error:.0%}: {verdict}."
