"""Writes what a person looks at first: tables, plots and the report of the stages that are complete."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lgp_dist.files import write_atomic
from lgp_dist.report.curves import curves_of
from lgp_dist.report.html import RunReport, render_report
from lgp_dist.report.plots import figure_svg, report_figures, save_figure
from lgp_dist.report.rows import amount, date, duration
from lgp_dist.report.tables import paths_table, write_paths_csv, write_paths_json
from lgp_dist.run.artifacts import Artifact
from lgp_dist.run.metrics import read_lines
from lgp_dist.run.path_rows import PathRow, read_rows

SUMMARY = ("stage", "id", "created", "seconds", "world", "command", "commit")
"""What the report says of an artifact."""


def publish(root: Path, recipe: str, config: Mapping[str, Any], artifacts: Sequence[Artifact], device: str = "") -> str:
    """Writes report.html and, of an evaluation, paths.json, paths.csv and pareto.png and .svg into a run directory.

    Without an evaluation among the artifacts, older tables and plots are removed.

    config: flat. artifacts: of the complete stages, in order. device: of this process, in words. Returns the table of
    paths, empty without an evaluation.
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
    environment: dict[str, Any] = _read(root / "environment.json") or {}
    figures = report_figures(rows, curves, title=f"Pool {recipe}: {len(rows)} paths")
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
        overview=overview(config, artifacts, device),
        ancestry=facts.get("ancestry", {}),
        descendant=facts.get("export") or facts.get("descend"),
        budget=budget(config),
        export_folder=str(folders.get("export", "")),
        config=config,
        environment={name: value for name, value in environment.items() if name != "command"},
    )
    write_atomic(root / "report.html", render_report(report).encode())
    return paths_table(rows) if rows else ""


def overview(config: Mapping[str, Any], artifacts: Sequence[Artifact], device: str) -> dict[str, str]:
    """What a run is, in words by label: images, seed, ranks, device, duration, date."""
    root, train, val, side, channels, classes = (
        config[f"data.{name}"] for name in ("root", "train_split", "val_split", "image_size", "channels", "num_classes")
    )
    found = {
        "Data set": f"{root}: trained on {train}, evaluated on {val}",
        "Images": f"{side} x {side} pixels, {channels} channel{'s' * (channels > 1)}, {classes} classes",
        "Seed": str(config["seed"]),
        "Device": device,
    }
    if records := [artifact.record for artifact in artifacts]:
        found["Ranks"] = ", ".join(str(world) for world in sorted({record["world"] for record in records}))
        found["Duration"] = f"{duration(sum(record['seconds'] for record in records))} for {len(records)} stages"
        found["Finished"] = date(max(record["created"] for record in records))
    return {name: value for name, value in found.items() if value}


def budget(config: Mapping[str, Any]) -> str:
    """The limits of stage descend, or the setting that named a path."""
    limits = ((name, config[f"budget.{name}"]) for name in ("max_params", "max_flops", "max_latency_ms"))
    said = ", ".join(f"{name} {amount(limit)}" for name, limit in limits if limit)
    return "none: export.path names the path" if config["export.path"] else said or "none: the most accurate path"


def _read(path: Path) -> Any:
    return json.loads(path.read_text()) if path.is_file() else None
