"""Several systems in one table and one figure: finished runs, and SN-Net's own file of results."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lgp_dist.errors import UserError
from lgp_dist.files import write_atomic
from lgp_dist.report.plots import LINE_STYLES, STYLE, cost_axis, new_panels, save_figure
from lgp_dist.report.rows import Row, amount, flops_unit, pareto_front, row_alone
from lgp_dist.run.artifacts import RunDirectory
from lgp_dist.run.text_table import markdown_table

COLOURS = (*dict.fromkeys(colour for colour, _ in LINE_STYLES), "#56B4E9", "#000000")
"""The palette of Okabe and Ito; beyond it markers tell apart."""
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "<", ">", "*")
SNNET_FIELDS = {"cfg_id": "key", "flops": "flops", "params": "params", "acc1": "top1"}
"""What a line of SN-Net's file must hold, and the field of a row that it becomes."""


@dataclass(frozen=True)
class System:
    """Evaluated models of one origin."""

    name: str
    rows: list[Row]
    """Each with key, params, flops (multiply-adds) and top1 (percent) at least."""
    cost: float | None
    """Multiply-adds of all training that made them; None where it is not known."""


def read_run(folder: Path, name: str = "") -> System:
    """A run with its evaluated paths. UserError where it is none, is not complete or is damaged."""
    artifacts = {made.record["stage"]: made for made in RunDirectory(folder).consistent()} if folder.is_dir() else {}
    if "evaluate" not in artifacts:
        raise UserError(
            f"{folder} is no complete run (it holds no stage evaluate that was made from what lies there): name a run "
            "directory that `lgp run` has completed."
        )
    evaluated = artifacts["evaluate"]
    evaluated.check_files()
    costs = [made.facts["training"].get("flops") for made in artifacts.values() if made.facts.get("training")]
    rows = json.loads((evaluated.folder / "paths.json").read_text())
    return System(name or folder.name, rows, None if None in costs else float(sum(costs)))


def read_runs(folders: Sequence[Path]) -> list[System]:
    """Several runs under names that tell them apart: the ends of their paths, as long as they must be."""
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return [read_run(folder, name) for folder, name in zip(folders, names, strict=True)]
    twice = next(str(folder) for folder, part in zip(folders, parts, strict=True) if parts.count(part) > 1)
    raise UserError(f"{twice} is named twice: name each run once.")


def read_snnet(file: Path) -> System:
    """SN-Net's results: a JSON object a line with cfg_id, flops, params and acc1; of equal cfg_id the last counts.

    UserError naming file and line where one holds anything else.
    """
    try:
        lines = file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read ({error}): name SN-Net's file of results.") from None
    rows = {
        row["key"]: row for number, line in enumerate(lines, 1) if line.strip() for row in [_snnet(file, number, line)]
    }
    if not rows:
        raise UserError(f"{file} holds no results: name a file with a JSON object a line.")
    return System(file.stem, list(rows.values()), None)


def _snnet(file: Path, number: int, line: str) -> Row:
    needs = "a JSON object with the numbers cfg_id, flops, params and acc1"
    try:
        found = json.loads(line)
    except ValueError:
        found = None
    values = [found.get(name) for name in SNNET_FIELDS] if isinstance(found, dict) else [None]
    good = all(isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) and v >= 0 for v in values)
    if not good or found["acc1"] > 100:
        raise UserError(f"{file}, line {number}, is not {needs} (percent): take it out, or name another file.")
    return {**{ours: found[theirs] for theirs, ours in SNNET_FIELDS.items()}, "key": f"cfg {found['cfg_id']}"}


def write_comparison(runs: Sequence[Path], snnet: str, out: Path) -> str:
    """Writes compare.md, compare.png and compare.svg of runs and, if given, SN-Net's file; the table."""
    systems = read_runs(runs) + ([read_snnet(Path(snnet))] if snnet else [])
    if not systems:
        raise UserError("`lgp report` was given no run: name one run directory or more, or --snnet FILE.")
    text = compare_table(systems)
    write_atomic(out / "compare.md", (text + "\n").encode())
    save_figure(compare_figure(systems, title=f"{len(systems)} systems"), out / "compare")
    return text


def compare_table(systems: Sequence[System]) -> str:
    """A Markdown table of the systems: how many models, their sizes, accuracies and the training that made them."""
    lines = []
    for system in systems:
        top1 = [row["top1"] for row in system.rows]
        ends = (
            [row_alone(system.rows, wide=wide) for wide in (False, True)] if "stitch" in system.rows[0] else [None] * 2
        )
        params, flops = ([row[name] for row in system.rows] for name in ("params", "flops"))
        lines.append(
            [
                system.name,
                str(len(system.rows)),
                f"{amount(min(params))} to {amount(max(params))}",
                f"{amount(min(flops))} to {amount(max(flops))}",
                *("-" if row is None else f"{row['top1']:.2f}" for row in ends),
                f"{fmean(top1):.2f}",
                f"{max(top1):.2f}",
                str(len(pareto_front(system.rows))),
                "-" if system.cost is None else f"{system.cost:.3g}",
            ]
        )
    head = ["system", "models", "params", "FLOPs", "narrow", "wide", "mean", "best", "on its front", "training cost"]
    return markdown_table(head, lines)


def compare_figure(systems: Sequence[System], *, title: str) -> Figure:
    """Top-1 (percent) of every model against its parameters, its FLOPs and, where known, what all its system's training
    cost (from the worst of its models to the best); lines are Pareto fronts."""
    with matplotlib.rc_context(STYLE):
        known = [system for system in systems if system.cost]
        handles = [
            Line2D([], [], color=_colour(index), marker=_marker(index), ls="-", lw=1.2, ms=5, label=system.name)
            for index, system in enumerate(systems)
        ]
        figure, axes = new_panels(3 if known else 2, 4.0, handles, gap=0.09, sharey=True)
        figure.suptitle(title, x=0.066, y=0.97, ha="left", va="top", fontsize=11.5, fontweight="bold")
        every = [row for system in systems for row in system.rows]
        divisor, letter = flops_unit(every)
        for panel, cost, unit in zip(axes, ("params", "flops"), (1e6, divisor), strict=False):
            for index, system in enumerate(systems):
                _points(panel, system.rows, cost, unit, _colour(index), _marker(index))
            cost_axis(panel, [row[cost] / unit for row in every])
        for index, system in enumerate(systems):
            if system.cost:
                top1 = [row["top1"] for row in system.rows]
                x = system.cost / 1e12
                axes[2].plot([x, x], [min(top1), max(top1)], color=_colour(index), lw=1.2, alpha=0.6)
                axes[2].plot(x, fmean(top1), marker=_marker(index), color=_colour(index), ms=6.5, ls="")
        if known:
            cost_axis(axes[2], [system.cost / 1e12 for system in known])
            if axes[2].get_xscale() == "linear":
                axes[2].locator_params(axis="x", nbins=4)
            axes[2].set_xlabel("All training (T multiply-adds)")
        axes[0].set_xlabel("Parameters (M)")
        axes[1].set_xlabel(f"FLOPs ({letter} multiply-adds)")
        axes[0].set_ylabel("Top-1 accuracy (%)")
    return figure


def _points(panel: Axes, rows: Sequence[Row], cost: str, unit: float, colour: str, marker: str) -> None:
    panel.plot(
        [r[cost] / unit for r in rows], [r["top1"] for r in rows], ls="", marker=marker, ms=4, color=colour, alpha=0.4
    )
    front = pareto_front(rows, cost)
    panel.plot([r[cost] / unit for r in front], [r["top1"] for r in front], marker=marker, ms=5, color=colour, lw=1.2)


def variants_figure(
    means: Mapping[str, Mapping[str, Any]], curves: Mapping[str, Mapping[int, float]], *, title: str
) -> Figure:
    """Variants of a study: narrow row, wide row and mean over paths with their intervals; the mean during training.

    means: measures with `mean` and `half` by variant. curves: top-1 (percent) by optimizer step, by variant; the
    second panel is left out if all are empty.
    """
    shown = {"narrow": "Narrow row", "wide": "Wide row", "mean": "Mean over paths"}
    with matplotlib.rc_context(STYLE):
        handles = [Line2D([], [], color=_colour(i), marker=_marker(i), ls="-", lw=1.2, ms=5, label=name)
                   for i, name in enumerate(means)]  # fmt: skip
        watched = any(curves.values())
        figure, axes = new_panels(1 + watched, 4.0, handles, gap=0.16)
        figure.suptitle(title, x=0.066, y=0.97, ha="left", va="top", fontsize=11.5, fontweight="bold")
        for index, found in enumerate(means.values()):
            for place, name in enumerate(shown):
                if name in found:
                    x = place + 0.7 * (index - (len(means) - 1) / 2) / len(means)
                    half = found[name].half or 0.0
                    axes[0].errorbar(
                        x, found[name].mean, half, color=_colour(index), marker=_marker(index), ms=5, capsize=2
                    )
        axes[0].set_xticks(range(len(shown)), shown.values())
        axes[0].set_ylabel("Top-1 accuracy (%)")
        for panel in axes[1:]:
            for index, name in enumerate(means):
                curve = curves.get(name, {})
                panel.plot(list(curve), list(curve.values()), color=_colour(index), marker=_marker(index), ms=3, lw=1.2)
            panel.set_xlabel("Optimizer step of fine-tuning")
            panel.set_ylabel("Mean over paths during training (%)")
    return figure


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _marker(index: int) -> str:
    return MARKERS[index % len(MARKERS)]
