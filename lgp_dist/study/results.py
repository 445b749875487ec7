"""What the trials of a study measured: read from their artifacts, and summarised by variant."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from lgp_dist.report.compare import evaluated_stages
from lgp_dist.report.rows import pareto_front, row_alone
from lgp_dist.run.artifacts import specialised_folder
from lgp_dist.run.metrics import read_lines, read_metrics
from lgp_dist.run.path_rows import PathRow, read_rows
from lgp_dist.study.runner import STARTS
from lgp_dist.study.settings import arguments
from lgp_dist.study.statistics import Estimate, difference, estimate
from lgp_dist.study.trials import Trial

Record = Mapping[str, Any]
"""What `trial_record` makes: an entry of `cells` in study.json, whose `arm` is the variant."""

CURVE = (100, 500, 2000)
"""Optimizer steps of fine-tuning after which the table shows the mean over all paths."""

MEASURES = {
    "narrow_before": "narrow before",
    "narrow": "narrow",
    "wide_before": "wide before",
    "wide": "wide",
    "mean_before": "all before",
    **{f"mean_{step}": f"all, step {step}" for step in CURVE},
    "mean": "all paths",
    "stitched": "stitched paths",
    "best": "best",
    "front": "front",
    "r2": "R²",
    "step_ms": "step (ms)",
    "cost": "cost (T)",
    "cpu_s": "CPU (s)",
}
"""What is compared, in the order of the table.

Accuracies are top-1 in percent; the front's is its mean over FLOPs from the narrow row's to the wide row's. Those at a
step are on `finetune.watch_images` images, all others on the whole validation split. Cost is training's, in 1e12
multiply-adds. CPU seconds are those of the trial's own processes that ended while the study ran: linked stages and
killed processes are not included.
"""
PAIRED = [name for name in MEASURES if name not in ("narrow_before", "wide_before", "step_ms", "cost", "cpu_s")]
"""The measures in the table of differences; study.json has all."""


def trial_record(trial: Trial, out: Path) -> dict[str, Any]:
    """All that a complete trial measured, for study.json."""
    artifacts = {artifact.record["stage"]: artifact for artifact in trial.run.consistent()}
    evaluated = artifacts["evaluate"].folder
    training = {stage: made.facts["training"] for stage, made in artifacts.items() if made.facts.get("training")}
    costs = [facts.get("flops") for facts in training.values()]
    step_s, curve = [], {}
    for line in read_metrics(trial.folder / "metrics.jsonl", "finetune"):
        step_s.append(line["step_time_s"])
        if watched := _watched(line):
            curve[line["step"] + 1] = watched
    return {
        "arm": trial.variant.name,
        "seed": trial.seed,
        "command": " ".join(["lgp", "run", *arguments(trial.config)]),
        "commits": sorted({artifact.record["commit"] for artifact in artifacts.values()}),
        "ids": {stage: artifact.id for stage, artifact in artifacts.items()},
        "training": training,
        "flops": None if None in costs else sum(costs),
        "seconds": {stage: artifact.record["seconds"] for stage, artifact in artifacts.items()},
        "starts": starts_of(trial, out),
        "step_ms": 1000 * median(step_s) if step_s else None,
        "r2": artifacts["pool"].facts.get("r2", {}) if "pool" in artifacts else {},
        "curve": curve,
        "before": read_rows(evaluated / "before.json") if trial.config.evaluate.before else [],
        "rows": read_rows(evaluated / "paths.json"),
        "specialised": [specialised_record(trial.folder, key) for key in trial.config.specialise.paths],
    }


def specialised_record(folder: Path, key: str) -> dict[str, Any]:
    """What the training of one path alone gave, after the pool's."""
    made = evaluated_stages(specialised_folder(folder, key))
    (row,) = read_rows(made["evaluate"].folder / "paths.json")
    (before,) = read_rows(made["evaluate"].folder / "before.json")
    return {**row, "top1_before": before["top1"], "training": made["finetune"].facts["training"]}


def _watched(line: Mapping[str, Any]) -> dict[str, float]:
    """Top-1 of the paths measured in a line of metrics, by key."""
    return {name.removeprefix("top1/"): value for name, value in line.items() if name.startswith("top1/")}


def starts_of(trial: Trial, out: Path) -> dict[str, float]:
    """How often this study started the trial, and the seconds of these processes in total."""
    total: Counter[str] = Counter({"count": 0, "wall_s": 0.0, "cpu_s": 0.0})
    for line in read_lines(out / STARTS):
        if (line["arm"], line["seed"]) == (trial.variant.name, trial.seed):
            total.update({"count": 1, "wall_s": line["wall_s"], "cpu_s": line["cpu_s"]})
    return {name: round(value, 1) for name, value in total.items()}


def measures(record: Record) -> dict[str, float]:
    """The numbers of a trial by their names in MEASURES, without those it did not measure."""
    rows, before = record["rows"], record["before"]
    found: dict[str, float | None] = {
        "narrow_before": _top1(row_alone(before, wide=False)),
        "narrow": _top1(row_alone(rows, wide=False)),
        "wide_before": _top1(row_alone(before, wide=True)),
        "wide": _top1(row_alone(rows, wide=True)),
        "mean_before": fmean(row["top1"] for row in before) if before else None,
        "mean": fmean(row["top1"] for row in rows),
        "stitched": fmean(stitched) if (stitched := [r["top1"] for r in rows if r["stitch"] is not None]) else None,
        "best": max(row["top1"] for row in rows),
        "front": front_mean(rows),
        "r2": fmean(record["r2"].values()) if record["r2"] else None,
        "step_ms": record["step_ms"],
        "cost": None if record["flops"] is None else record["flops"] / 1e12,
        "cpu_s": record["starts"]["cpu_s"] if record["starts"]["count"] else None,
    }
    for step in CURVE:
        found[f"mean_{step}"] = fmean(record["curve"][step].values()) if step in record["curve"] else None
    return {name: value for name in MEASURES if (value := found[name]) is not None}


def front_mean(rows: Sequence[PathRow]) -> float | None:
    """Top-1 of the best path within a budget, averaged over budgets from the narrow row's FLOPs to the wide row's.

    None without two rows alone that differ.
    """
    ends = [row_alone(rows, wide=wide) for wide in (False, True)]
    low, high = (None if row is None else row["flops"] for row in ends)
    if low is None or high is None or low == high:
        return None
    front = pareto_front(row for row in rows if row["flops"] <= high)
    costs = [max(low, row["flops"]) for row in front] + [high]
    return sum(row["top1"] * (end - start) for row, start, end in zip(front, costs, costs[1:], strict=False)) / (
        high - low
    )


def _top1(row: PathRow | None) -> float | None:
    return None if row is None else row["top1"]


def of_variant(records: Sequence[Record], variant: str) -> list[Record]:
    """The records of one variant."""
    return [record for record in records if record["arm"] == variant]


def by_seed(records: Sequence[Record]) -> dict[str, dict[str, dict[int, float]]]:
    """Measures by variant, name and seed."""
    values: dict[str, dict[str, dict[int, float]]] = {}
    for record in records:
        for name, value in measures(record).items():
            values.setdefault(record["arm"], {}).setdefault(name, {})[record["seed"]] = value
    return values


@dataclass(frozen=True)
class Summary:
    """Measures of a variant."""

    means: dict[str, Estimate]
    """Over seeds."""
    differences: dict[str, Estimate]
    """From the reference on the same seeds; empty for the reference itself."""


def summary(records: Sequence[Record], reference: str) -> dict[str, Summary]:
    """Means and differences by variant."""
    values, found = by_seed(records), {}
    for variant, named in values.items():
        means = {name: estimate(list(seeds.values())) for name, seeds in named.items()}
        differences = {}
        for name in named if variant != reference else ():
            if (pair := difference(named[name], values[reference].get(name, {}))) is not None:
                differences[name] = pair
        found[variant] = Summary(means, differences)
    return found


@dataclass(frozen=True)
class RowCheck:
    """Whether fine-tuning keeps the rows of a variant: differences of top-1 on the same seeds."""

    wide: Estimate
    """Wide row, after fine-tuning against before."""
    narrow: Estimate
    """Narrow row, after fine-tuning against before."""
    mean: Estimate
    """Mean over all paths, against the reference."""

    @property
    def passes(self) -> bool:
        """By means: wide row no worse, narrow row better, all paths at least as good as the reference's."""
        return self.wide.mean >= 0 and self.narrow.mean > 0 and self.mean.mean >= 0


def row_checks(records: Sequence[Record], reference: str) -> dict[str, RowCheck]:
    """The check of every variant; all records need their rows before fine-tuning."""
    values = by_seed(records)

    def change(variant: str, name: str, other: str, other_name: str) -> Estimate:
        found = difference(values[variant][name], values[other][other_name])
        assert found is not None, "a study runs all variants on the same seeds"
        return found

    return {
        variant: RowCheck(
            change(variant, "wide", variant, "wide_before"),
            change(variant, "narrow", variant, "narrow_before"),
            change(variant, "mean", reference, "mean"),
        )
        for variant in values
    }


def layer_fits(records: Sequence[Record]) -> dict[str, dict[int, Estimate]]:
    """By variant and stitch layer, R² before fine-tuning, averaged over the evaluated paths that share the layer."""
    values: dict[str, dict[int, list[float]]] = {}
    for record in records:
        stitch = {row["key"]: row["stitch"] for row in record["rows"]}
        layers: dict[int, list[float]] = {}
        for key, fit in record["r2"].items():
            if key in stitch:
                layers.setdefault(stitch[key], []).append(fit)
        for layer, fits in sorted(layers.items()):
            values.setdefault(record["arm"], {}).setdefault(layer, []).append(fmean(fits))
    return {variant: {layer: estimate(fits) for layer, fits in each.items()} for variant, each in values.items()}


def mean_rows(records: Sequence[Record], variant: str, which: str = "rows") -> list[PathRow]:
    """A variant's evaluated paths, or those of `specialised`, with top-1 averaged over its seeds."""
    top1: dict[str, list[float]] = {}
    for record in of_variant(records, variant):
        for row in record[which]:
            top1.setdefault(row["key"], []).append(row["top1"])
    first: list[PathRow] = of_variant(records, variant)[0][which]
    return [{**row, "top1": fmean(top1[row["key"]])} for row in first]


def specialised_paths(records: Sequence[Record]) -> dict[str, dict[str, Estimate]]:
    """Top-1 of every path that was trained alone, by variant and key: `pool` before it, `alone` after it."""
    values: dict[str, dict[str, list[float]]] = {}
    for record in records:
        for row in record["specialised"]:
            found = values.setdefault(f"{record['arm']}, {row['key']}", {"pool": [], "alone": []})
            found["pool"].append(row["top1_before"])
            found["alone"].append(row["top1"])
    return {name: {which: estimate(top1) for which, top1 in each.items()} for name, each in values.items()}


def mean_curve(records: Sequence[Record], variant: str) -> dict[int, float]:
    """A variant's top-1 averaged over paths and seeds, by the optimizer steps that all its seeds measured."""
    curves = [
        {int(step): fmean(found.values()) for step, found in record["curve"].items()}
        for record in of_variant(records, variant)
    ]
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    return {step: fmean(curve[step] for curve in curves) for step in steps}
