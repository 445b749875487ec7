"""Writes what a person looks at first: tables, plots and the report of the stages that are complete."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lgp_dist.files import write_atomic
from lgp_dist.report.curves import curves_of
from lgp_dist.report.html import RunReport, render_report
from lgp_dist.report.plots import figure_svg, report_figures, save_figure
from lgp_dist.report.tables import paths_table, write_paths_csv, write_paths_json
from lgp_dist.run.artifacts import Artifact
from lgp_dist.run.metrics import read_lines
from lgp_dist.run.path_rows import PathRow, read_rows

SUMMARY = ("stage", "id", "created", "seconds", "world", "command", "commit")
"""What the report says of an artifact."""


def publish(root: Path, recipe: str, config: dict[str, Any], artifacts: Sequence[Artifact]) -> str:
    """Writes report.html and, of an evaluation, paths.json, paths.csv and pareto.png and .svg into a run directory.

    Without an evaluation among the artifacts, older tables and plots are removed.

    config: flat. artifacts: of the complete stages, in order. Returns the table of paths, empty without an evaluation.
    """
    folders = {artifact.record["stage"]: artifact.folder for artifact in artifacts}
    facts: dict[str, Any] = {artifact.record["stage"]: artifact.facts for artifact in artifacts}
    curves = curves_of(read_lines(root / "metrics.jsonl"))
    rows: list[PathRow] = []
    before: list[PathRow] = []
    if folder := folders.get("evaluate"):
        rows = read_rows(folder / "paths.json")
        before = read_rows(folder / "before.json") if (folder / "before.json").is_file() else []
        write_paths_json(rows, root / "paths.json")
        write_paths_csv(rows, root / "paths.csv")
    else:
        for name in ("paths.json", "paths.csv", "pareto.png", "pareto.svg"):
            (root / name).unlink(missing_ok=True)
    figures = report_figures(rows, curves, title=f"Pool {recipe}: {len(rows)} paths", before=before)
    if "pareto" in figures:
        save_figure(figures["pareto"], root / "pareto")
    report = RunReport(
        title=f"lgp_dist: {recipe}",
        rows=rows,
        before=before,
        curves=curves,
        figures={name: figure_svg(figure) for name, figure in figures.items()},
        ledger=_read(folders["finetune"] / "ledger.json") if "finetune" in folders else None,
        artifacts=[{name: made.record.get(name) for name in SUMMARY} for made in artifacts],
        descendant=facts.get("export"),
        export_folder=str(folders.get("export", "")),
        config=config,
        environment=_read(root / "environment.json") or {},
    )
    write_atomic(root / "report.html", render_report(report).encode())
    return paths_table(rows) if rows else ""


def _read(path: Path) -> Any:
    return json.loads(path.read_text()) if path.is_file() else None
