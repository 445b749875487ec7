"""What the runs of a study measured: read from their artifacts, and put together by arm."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from lgp_dist.report.rows import Row, row_alone
from lgp_dist.run.artifacts import RunDirectory
from lgp_dist.run.metrics import read_lines, read_metrics
from lgp_dist.study.cells import Cell
from lgp_dist.study.runner import STARTS
from lgp_dist.study.settings import arguments
from lgp_dist.study.statistics import Estimate, difference, estimate

CURVE = (100, 500, 2000)
"""Optimizer steps of fine-tuning after which the mean over all paths is shown."""

MEASURES = {
    "narrow_before": "narrow before",
    "narrow": "narrow",
    "wide_before": "wide before",
    "wide": "wide",
    "mean_before": "all before",
    **{f"mean_{step}": f"all, step {step}" for step in CURVE},
    "mean": "all paths",
    "best": "best",
    "r2": "R²",
    "step_ms": "step (ms)",
    "cost": "cost (T)",
    "cpu_s": "CPU (s)",
}
"""What is compared, in the order of the table: accuracies are top-1 in percent (those at a step on
`finetune.watch_images` images, all others on the whole validation split), cost is training's in 1e12 multiply-adds,
CPU seconds are those of the cell's own processes, as far as the study saw them end: stages that it took over from
another are not in them, nor starts that were killed."""
PAIRED = [name for name in MEASURES if name not in ("narrow_before", "wide_before", "step_ms", "cost", "cpu_s")]
"""Of these, what the table of differences shows; study.json has all."""


def cell_record(cell: Cell, out: Path) -> dict[str, Any]:
    """Everything that a complete cell measured, for study.json."""
    artifacts = {artifact.record["stage"]: artifact for artifact in RunDirectory(cell.folder).consistent()}
    evaluated = artifacts["evaluate"].folder
    training = {stage: made.facts["training"] for stage, made in artifacts.items() if made.facts.get("training")}
    costs = [facts.get("flops") for facts in training.values()]
    step_s, curve = [], {}
    for line in read_metrics(cell.folder / "metrics.jsonl", "finetune"):
        step_s.append(line["step_time_s"])
        if watched := _watched(line):
            curve[line["step"] + 1] = watched
    return {
        "arm": cell.arm.name,
        "seed": cell.seed,
        "command": " ".join(["lgp", "run", *arguments(cell.config)]),
        "commits": sorted({artifact.record["commit"] for artifact in artifacts.values()}),
        "ids": {stage: artifact.id for stage, artifact in artifacts.items()},
        "training": training,
        "flops": None if None in costs else sum(costs),
        "seconds": {stage: artifact.record["seconds"] for stage, artifact in artifacts.items()},
        "starts": starts_of(cell, out),
        "step_ms": 1000 * median(step_s) if step_s else None,
        "r2": artifacts["pool"].facts.get("r2", {}) if "pool" in artifacts else {},
        "curve": curve,
        "before": json.loads((evaluated / "before.json").read_text()) if cell.config.evaluate.before else [],
        "rows": json.loads((evaluated / "paths.json").read_text()),
    }


def _watched(line: Mapping[str, Any]) -> dict[str, float]:
    """Top-1 of every path that a line of metrics holds, by key."""
    return {name.removeprefix("top1/"): value for name, value in line.items() if name.startswith("top1/")}


def starts_of(cell: Cell, out: Path) -> dict[str, float]:
    """How often the cell was started by this study, and the seconds of all these starts together."""
    total: Counter[str] = Counter({"count": 0, "wall_s": 0.0, "cpu_s": 0.0})
    for line in read_lines(out / STARTS):
        if (line["arm"], line["seed"]) == (cell.arm.name, cell.seed):
            total.update({"count": 1, "wall_s": line["wall_s"], "cpu_s": line["cpu_s"]})
    return {name: round(value, 1) for name, value in total.items()}


def measures(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a cell that are compared, as named in MEASURES; what it has not measured is left out."""
    rows, before = record["rows"], record["before"]
    found: dict[str, float | None] = {
        "narrow_before": _top1(row_alone(before, wide=False)),
        "narrow": _top1(row_alone(rows, wide=False)),
        "wide_before": _top1(row_alone(before, wide=True)),
        "wide": _top1(row_alone(rows, wide=True)),
        "mean_before": fmean(row["top1"] for row in before) if before else None,
        "mean": fmean(row["top1"] for row in rows),
        "best": max(row["top1"] for row in rows),
        "r2": fmean(record["r2"].values()) if record["r2"] else None,
        "step_ms": record["step_ms"],
        "cost": None if record["flops"] is None else record["flops"] / 1e12,
        "cpu_s": record["starts"]["cpu_s"] if record["starts"]["count"] else None,
    }
    for step in CURVE:
        found[f"mean_{step}"] = fmean(record["curve"][step].values()) if step in record["curve"] else None
    return {name: found[name] for name in MEASURES if found[name] is not None}


def _top1(row: Row | None) -> float | None:
    return None if row is None else row["top1"]


def summary(records: Sequence[Mapping[str, Any]], reference: str) -> dict[str, dict[str, Any]]:
    """By arm: `means` and `differences` from the reference on the same seeds, an `Estimate` for each measure."""
    values: dict[str, dict[str, dict[int, float]]] = {}
    for record in records:
        for name, value in measures(record).items():
            values.setdefault(record["arm"], {}).setdefault(name, {})[record["seed"]] = value
    found = {}
    for arm, named in values.items():
        means = {name: estimate(list(by_seed.values())) for name, by_seed in named.items()}
        pairs = {name: difference(by_seed, values[reference].get(name, {})) for name, by_seed in named.items()}
        found[arm] = {"means": means, "differences": {} if arm == reference else _known(pairs)}
    return found


def _known(pairs: Mapping[str, Estimate | None]) -> dict[str, Estimate]:
    return {name: value for name, value in pairs.items() if value is not None}


def verdicts(records: Sequence[Mapping[str, Any]], reference: str) -> dict[str, dict[str, Any]]:
    """Whether arms keep the rows: the wide row no worse than before fine-tuning, the narrow better, and the mean over
    paths at least the reference's. By arm: the three differences on the same seeds, and `passes`, judged by means."""
    by_arm: dict[str, dict[int, dict[str, float]]] = {}
    for record in records:
        by_arm.setdefault(record["arm"], {})[record["seed"]] = measures(record)

    def column(arm: str, name: str) -> dict[int, float]:
        return {seed: found[name] for seed, found in by_arm[arm].items()}

    found = {}
    for arm in by_arm:
        wide = difference(column(arm, "wide"), column(arm, "wide_before"))
        narrow = difference(column(arm, "narrow"), column(arm, "narrow_before"))
        mean = difference(column(arm, "mean"), column(reference, "mean"))
        passes = wide.mean >= 0 and narrow.mean > 0 and mean.mean >= 0
        found[arm] = {"wide": wide, "narrow": narrow, "mean": mean, "passes": passes}
    return found


def layer_fits(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[int, Estimate]]:
    """By arm and stitch layer, R² before fine-tuning, averaged over the evaluated paths that share the layer."""
    values: dict[str, dict[int, list[float]]] = {}
    for record in records:
        stitch = {row["key"]: row["stitch"] for row in record["rows"]}
        layers: dict[int, list[float]] = {}
        for key, fit in record["r2"].items():
            if key in stitch:
                layers.setdefault(stitch[key], []).append(fit)
        for layer, fits in sorted(layers.items()):
            values.setdefault(record["arm"], {}).setdefault(layer, []).append(fmean(fits))
    return {arm: {layer: estimate(fits) for layer, fits in each.items()} for arm, each in values.items()}


def mean_rows(records: Sequence[Mapping[str, Any]], arm: str) -> list[Row]:
    """An arm's evaluated paths with top-1 averaged over its seeds."""
    mine = [record["rows"] for record in records if record["arm"] == arm]
    top1 = {row["key"]: fmean(other["top1"] for rows in mine for other in rows if other["key"] == row["key"])
            for row in mine[0]}  # fmt: skip
    return [{**row, "top1": top1[row["key"]]} for row in mine[0]]


def mean_curve(records: Sequence[Mapping[str, Any]], arm: str) -> dict[int, float]:
    """By optimizer step, an arm's top-1 averaged over all paths and seeds, at the steps that all its seeds measured."""
    curves = [{int(step): fmean(found.values()) for step, found in record["curve"].items()}
              for record in records if record["arm"] == arm]  # fmt: skip
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    return {step: fmean(curve[step] for curve in curves) for step in steps}
