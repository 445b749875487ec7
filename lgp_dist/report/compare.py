"""Several systems in one table and one figure: finished runs, and SN-Net's own file of results."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lgp_dist.errors import UserError
from lgp_dist.files import write_atomic
from lgp_dist.report.plots import LINE_STYLES, STYLE, cost_axis, fit_costs, new_panels, save_figure
from lgp_dist.report.rows import amount, pareto_front, row_alone
from lgp_dist.run.artifacts import Artifact, RunDirectory, is_complete, specialised_folder
from lgp_dist.run.path_rows import ModelRow, PathRow, number_of, read_rows
from lgp_dist.run.text_table import markdown_table

COLOURS = (*dict.fromkeys(colour for colour, _ in LINE_STYLES), "#56B4E9", "#000000")
"""The palette of Okabe and Ito. Figures of more systems repeat colours with other markers."""
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "<", ">", "*")
SNNET_FIELDS = ("cfg_id", "flops", "params", "acc1")
"""The numbers in a line of SN-Net's file."""


@dataclass(frozen=True)
class System:
    """Evaluated models of one origin."""

    name: str
    rows: Sequence[ModelRow]
    cost: float | None
    """Multiply-adds of all training that made them; None if unknown."""
    narrow: PathRow | None = None
    """The narrow row alone, if it is known which that is."""
    wide: PathRow | None = None
    """The wide row alone."""

    @classmethod
    def of_paths(cls, name: str, rows: Sequence[PathRow], cost: float | None) -> "System":
        """The paths of a pool."""
        return cls(name, rows, cost, row_alone(rows, wide=False), row_alone(rows, wide=True))


def evaluated_stages(folder: Path) -> dict[str, Artifact]:
    """An evaluated run's artifacts by stage; UserError if it is not a run, incomplete or damaged."""
    artifacts = {made.record["stage"]: made for made in RunDirectory(folder).consistent()} if folder.is_dir() else {}
    if "evaluate" not in artifacts:
        raise UserError(
            f"{folder} is not a complete run (it has no stage evaluate made from its other stages): name a run "
            "directory that `lgp run` has completed."
        )
    artifacts["evaluate"].check_files()
    return artifacts


def read_run(folder: Path, name: str = "") -> System:
    """A run with its evaluated paths; UserError as `evaluated_stages`."""
    artifacts = evaluated_stages(folder)
    costs = [made.facts["training"].get("flops") for made in artifacts.values() if made.facts.get("training")]
    rows = read_rows(artifacts["evaluate"].folder / "paths.json")
    return System.of_paths(name or folder.name, rows, None if None in costs else float(sum(costs)))


def read_specialised(folder: Path, pool: System) -> list[System]:
    """The paths of a run that were trained alone afterwards, as one system, whose cost includes the pool's."""
    folders = sorted(specialised_folder(folder, "").glob("*"))
    runs = [evaluated_stages(alone) for alone in folders if is_complete(alone, "evaluate")]
    if not runs:
        return []
    rows = [row for run in runs for row in read_rows(run["evaluate"].folder / "paths.json")]
    costs = [pool.cost, *(run["finetune"].facts["training"].get("flops") for run in runs)]
    return [System(f"{pool.name}, specialised", rows, None if None in costs else float(sum(costs)))]


def read_runs(folders: Sequence[Path]) -> list[System]:
    """Several runs under different names, the shortest ends of their paths that differ; each with what was trained from
    it alone."""
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            pools = [read_run(folder, name) for folder, name in zip(folders, names, strict=True)]
            pairs = zip(folders, pools, strict=True)
            return [system for folder, pool in pairs for system in (pool, *read_specialised(folder, pool))]
    twice = next(str(folder) for folder, part in zip(folders, parts, strict=True) if parts.count(part) > 1)
    raise UserError(f"{twice} is named twice: name each run once.")


def read_snnet(file: Path) -> System:
    """SN-Net's results: lines of JSON objects with SNNET_FIELDS; if a cfg_id is repeated, its last line counts.

    UserError with file and line if one is anything else.
    """
    try:
        lines = file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read ({error}): name SN-Net's file of results.") from None
    found = [_snnet_row(file, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise UserError(f"{file} holds no results: name a file with one JSON object per line.")
    return System(file.stem, list({row["key"]: row for row in found}.values()), None)


def _snnet_row(file: Path, number: int, line: str) -> ModelRow:
    try:
        found = json.loads(line)
    except ValueError:
        found = None
    values: list[Any] = [found.get(name) for name in SNNET_FIELDS] if isinstance(found, dict) else [None]
    good = all(isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) and v >= 0 for v in values)
    if not good or values[-1] > 100:
        raise UserError(
            f"{file}, line {number}, is not a JSON object with the numbers cfg_id, flops, params and acc1 (percent): "
            "remove it, or name another file."
        )
    cfg_id, flops, params, top1 = values
    return {"key": f"cfg {cfg_id}", "flops": flops, "params": params, "top1": top1}


def write_comparison(runs: Sequence[Path], snnet: str, out: Path) -> str:
    """Writes compare.md, compare.png and compare.svg of runs and, if named, SN-Net's file; the table."""
    systems = read_runs(runs) + ([read_snnet(Path(snnet))] if snnet else [])
    if not systems:
        raise UserError("`lgp report` was given no run: name one run directory or more, or --snnet FILE.")
    text = compare_table(systems)
    write_atomic(out / "compare.md", (text + "\n").encode())
    save_figure(compare_figure(systems, title=f"{len(systems)} systems"), out / "compare")
    return text


def compare_table(systems: Sequence[System]) -> str:
    """A Markdown table: how many models each system has, their sizes and accuracies, and what training cost."""
    lines = []
    for system in systems:
        top1 = [row["top1"] for row in system.rows]
        params, flops = [row["params"] for row in system.rows], [row["flops"] for row in system.rows]
        lines.append(
            [
                system.name,
                str(len(system.rows)),
                f"{amount(min(params))} to {amount(max(params))}",
                f"{amount(min(flops))} to {amount(max(flops))}",
                *("-" if row is None else f"{row['top1']:.2f}" for row in (system.narrow, system.wide)),
                f"{fmean(top1):.2f}",
                f"{max(top1):.2f}",
                str(len(pareto_front(system.rows))),
                "-" if system.cost is None else f"{system.cost:.3g}",
            ]
        )
    head = ["system", "models", "params", "FLOPs", "narrow", "wide", "mean", "best", "on its front", "training cost"]
    return markdown_table(head, lines)


def _looks(names: Sequence[str]) -> list[dict[str, Any]]:
    """Colour, marker and label of each line."""
    return [
        {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)], "label": name, "ms": 5, "lw": 1.2}
        for i, name in enumerate(names)
    ]


def compare_figure(systems: Sequence[System], *, title: str) -> Figure:
    """Top-1 (percent) of every model against parameters, FLOPs and, if known and not equal within 1 %, the cost of all
    training of its system.

    Lines are Pareto fronts; against training cost they go from the worst of a system's models to the best.
    """
    known = [system.cost / 1e12 for system in systems if system.cost]
    known = known if known and (len(known) == 1 or max(known) > 1.01 * min(known)) else []
    every = [row for system in systems for row in system.rows]
    looks = _looks([system.name for system in systems])
    with matplotlib.rc_context(STYLE):
        handles = [Line2D([], [], **look) for look in looks]
        figure, axes = new_panels(title, 3 if known else 2, 4.0, handles, gap=0.09, sharey=True)
        axes[0].set_ylabel("Top-1 accuracy (%)")
        for panel, cost in zip(axes, ("params", "flops"), strict=False):
            unit = cost_axis(panel, every, cost)
            for system, look in zip(systems, looks, strict=True):
                for rows, more in (
                    (system.rows, {"ls": "", "ms": 4, "alpha": 0.4}),
                    (pareto_front(system.rows, cost), {}),
                ):
                    x = [number_of(row, cost) / unit for row in rows]
                    panel.plot(x, [row["top1"] for row in rows], **look | more)
        for system, look in zip(systems, looks, strict=True):
            if known and system.cost:
                top1, at = [row["top1"] for row in system.rows], system.cost / 1e12
                axes[2].plot([at, at], [min(top1), max(top1)], color=look["color"], lw=1.2, alpha=0.6)
                axes[2].plot(at, fmean(top1), **look | {"ms": 6.5, "ls": ""})
        if known:
            fit_costs(axes[2], known)
            if axes[2].get_xscale() == "linear":
                axes[2].locator_params(axis="x", nbins=4)
            axes[2].set_xlabel("All training (T multiply-adds)")
    return figure


def variants_figure(
    means: Mapping[str, Mapping[str, tuple[float, float]]], curves: Mapping[str, Mapping[int, float]], *, title: str
) -> Figure:
    """Variants of a study: narrow row, wide row and mean over paths with their intervals; the mean during training.

    means: by variant and measure, the mean and half of its interval's width. curves: by variant, top-1 (percent) by
    optimizer step; the second panel is left out if
    all are empty.
    """
    shown = {"narrow": "Narrow row", "wide": "Wide row", "mean": "Mean over paths"}
    looks = _looks(list(means))
    with matplotlib.rc_context(STYLE):
        handles = [Line2D([], [], **look) for look in looks]
        figure, (bars, *more) = new_panels(title, 1 + any(curves.values()), 4.0, handles, gap=0.16)
        for index, (found, look) in enumerate(zip(means.values(), looks, strict=True)):
            for place, name in enumerate(shown):
                if name in found:
                    x = place + 0.7 * (index - (len(means) - 1) / 2) / len(means)
                    bars.errorbar(x, *found[name], capsize=2, **look)
        bars.set_xticks(range(len(shown)), shown.values())
        bars.set_ylabel("Top-1 accuracy (%)")
        for panel in more:
            for name, look in zip(means, looks, strict=True):
                curve = curves.get(name, {})
                panel.plot(list(curve), list(curve.values()), **look | {"ms": 3})
            panel.set_xlabel("Optimizer step of fine-tuning")
            panel.set_ylabel("Mean over paths during training (%)")
    return figure
