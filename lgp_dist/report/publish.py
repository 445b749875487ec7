"""Writes what a person looks at first: tables, plots and the report, from whatever stages are complete."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lgp_dist.files import write_atomic
from lgp_dist.report.curves import curves_of
from lgp_dist.report.html import render_report
from lgp_dist.report.plots import figure_svg, report_figures, save_figure
from lgp_dist.report.tables import paths_table, write_paths_csv, write_paths_json
from lgp_dist.run.artifacts import Artifact
from lgp_dist.run.metrics import read_lines

LOAD = """\
import json
from safetensors.torch import load_file
from lgp_dist.models.descendant import load_descendant

folder = "{folder}"
model = load_descendant(json.load(open(folder + "/config.json")), load_file(folder + "/model.safetensors"))
"""


def publish(root: Path, recipe: str, config: dict[str, Any], artifacts: Sequence[Artifact]) -> str:
    """Writes paths.json, paths.csv, pareto.png, pareto.svg and report.html into a run directory.

    Tables and plots of an evaluation that is not among the artifacts are removed.

    config: flat. artifacts: of the complete stages, in order. Returns the table of paths, empty if none is evaluated.
    """
    by_stage = {artifact.record["stage"]: artifact for artifact in artifacts}
    curves = curves_of(read_lines(root / "metrics.jsonl"))
    rows, before, descendant, ledger = [], None, None, None
    if "evaluate" in by_stage:
        folder = by_stage["evaluate"].folder
        rows = json.loads(_read(folder / "paths.json"))
        before = json.loads(_read(folder / "before.json") or "null")
        write_paths_json(rows, root / "paths.json")
        write_paths_csv(rows, root / "paths.csv")
    else:
        for name in ("paths.json", "paths.csv", "pareto.png", "pareto.svg"):
            (root / name).unlink(missing_ok=True)
    if "finetune" in by_stage:
        ledger = json.loads(_read(by_stage["finetune"].folder / "ledger.json") or "null")
    if "export" in by_stage:
        exported = by_stage["export"]
        descendant = {**exported.facts, "file": str(exported.folder), "load": LOAD.format(folder=exported.folder)}
    figures = report_figures(rows, curves, title=f"Pool {recipe}: {len(rows)} paths", before=before)
    if "pareto" in figures:
        save_figure(figures["pareto"], root / "pareto")
    page = render_report(
        title=f"lgp_dist: {recipe}",
        rows=rows,
        curves=curves,
        config=config,
        environment=json.loads(_read(root / "environment.json") or "{}"),
        artifacts=[_summary(artifact) for artifact in artifacts],
        descendant=descendant,
        figures={name: figure_svg(figure) for name, figure in figures.items()},
        before=before,
        ledger=ledger,
    )
    write_atomic(root / "report.html", page.encode())
    return paths_table(rows) if rows else ""


def _summary(artifact: Artifact) -> dict[str, Any]:
    """What the report says of a stage."""
    return {name: artifact.record[name] for name in ("stage", "id", "created", "seconds", "world", "command", "commit")}


def _read(path: Path) -> str:
    return path.read_text() if path.is_file() else ""
