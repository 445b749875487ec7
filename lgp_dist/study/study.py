"""`lgp study`: runs the cells of a question and writes its tables and plots, as far as they are complete."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lgp_dist.config.flat import STAGES
from lgp_dist.config.run_config import RunConfig
from lgp_dist.data.remote.roots import local_root
from lgp_dist.data.shards.manifest import ShardManifest
from lgp_dist.errors import UserError
from lgp_dist.files import write_atomic, write_json
from lgp_dist.pipeline import sources
from lgp_dist.report.compare import System, arms_figure, compare_figure
from lgp_dist.report.plots import save_figure
from lgp_dist.run.artifacts import RunDirectory
from lgp_dist.run.provenance import environment
from lgp_dist.run.text_table import markdown_table
from lgp_dist.study.cells import Cell, adopt, cells_of
from lgp_dist.study.questions import QUESTIONS, Question
from lgp_dist.study.results import MEASURES, PAIRED, cell_record, layer_fits, mean_curve, mean_rows, summary, verdicts
from lgp_dist.study.runner import run_cells
from lgp_dist.study.statistics import Estimate

Say = Callable[[str], None]


def study(
    name: str,
    base: RunConfig,
    seeds: Sequence[int],
    out: Path,
    jobs: int,
    arms: Sequence[str],
    say: Say,
    beside: Sequence[Path] = (),
) -> str:
    """Runs what is left of a question's cells and writes study.json, table.md and figures into `out`; the table.

    name: of QUESTIONS. base: a recipe, with what all arms change in it. arms: their names, empty for all; the one that
    others are compared with always runs. beside: folders of other studies, of which runs are taken over that are made
    alike. UserError for whatever a person can put right.
    """
    if jobs < 1:
        raise UserError(f"--jobs is {jobs}, but must be 1 or more: choose another value.")
    question = chosen(QUESTIONS[name], arms)
    cells = [replace(cell, sources=sources_of(cell)) for cell in cells_of(question, base, seeds, out)]
    folders = runs_of(beside)
    out.mkdir(parents=True, exist_ok=True)
    for cell in cells if folders else ():
        adopt(cell, folders, question.ranks)
    run_cells(cells, is_done, out, jobs, question.ranks, say)
    return publish(question, cells, out)


def chosen(question: Question, arms: Sequence[str]) -> Question:
    """The question with these arms and its reference alone; UserError where it has no such arm."""
    names = [arm.name for arm in question.arms]
    for name in arms:
        if name not in names:
            raise UserError(
                f"--arms names {name!r}, but study {question.name} has {', '.join(names)}: choose of these."
            )
    kept = [arm for arm in question.arms if not arms or arm.name in (question.reference, *arms)]
    return replace(question, arms=tuple(kept))


def runs_of(studies: Sequence[Path]) -> list[Path]:
    """The runs in folders of studies; UserError where one holds none."""
    found = {path: sorted(path.glob("*/seed*")) for path in studies}
    for path, runs in found.items():
        if not runs:
            raise UserError(f"--beside names {path}, which holds no runs of a study: name the --out of one.")
    return [run for runs in found.values() for run in runs]


def sources_of(cell: Cell) -> dict[str, str]:
    """Content of its shards and files, by setting."""
    return sources(cell.config, ShardManifest.load(local_root(cell.config.data)))


def is_done(cell: Cell) -> bool:
    """Whether all its stages are complete; UserError where they were made with other settings."""
    directory = RunDirectory(cell.folder, cell.sources)
    try:
        return all(directory.is_current(stage, cell.config) for stage in ("evaluate", STAGES[-1]))
    except UserError as error:
        raise UserError(
            f"{cell.folder} does not hold what this study would make ({str(error).rstrip('.')}): choose another --out, "
            "or remove that folder."
        ) from None


def publish(question: Question, cells: Sequence[Cell], out: Path) -> str:
    """Writes what complete cells measured; the tables as Markdown."""
    records = [cell_record(cell, out) for cell in cells]
    found = summary(records, question.reference)
    judged = verdicts(records, question.reference) if question.keeps_rows else {}
    text = tables(question, found, layer_fits(records), judged)
    write_json(
        out / "study.json",
        {
            "question": question.name,
            "asks": question.asks,
            "reference": question.reference,
            "ranks": question.ranks,
            "seeds": sorted({cell.seed for cell in cells}),
            **environment(),
            "arms": {arm.name: {"what": arm.what, **_plain(found[arm.name])} for arm in question.arms},
            "cells": records,
        },
    )
    write_atomic(out / "table.md", (text + "\n").encode())
    curves = {arm.name: mean_curve(records, arm.name) for arm in question.arms}
    means = {name: arm["means"] for name, arm in found.items()}
    save_figure(arms_figure(means, curves, title=question.asks), out / "arms")
    systems = [
        System(n, mean_rows(records, n), 1e12 * m["cost"].mean if "cost" in m else None) for n, m in means.items()
    ]
    save_figure(compare_figure(systems, title=question.asks), out / "paths")
    return text


def tables(
    question: Question, found: Mapping[str, Any], fits: Mapping[str, Mapping[int, Estimate]], judged: Mapping[str, Any]
) -> str:
    """Means of every arm, differences from the reference, what `layer_fits` found where arms differ in it, and what
    `verdicts` says."""
    names = [name for name in MEASURES if any(name in arm["means"] for arm in found.values())]
    head = ["arm", *(MEASURES[name] for name in names)]
    means = [[arm, *(str(each["means"].get(name, "-")) for name in names)] for arm, each in found.items()]
    pairs = [
        [arm, *(str(each["differences"].get(name, "-")) for name in names if name in PAIRED)]
        for arm, each in found.items()
        if arm != question.reference
    ]
    count = max(each["means"]["mean"].count for each in found.values())
    parts = [
        f"**{question.name}**: {question.asks}",
        f"Mean and 95 % interval over {count} seed(s):",
        markdown_table(head, means),
        f"Difference from `{question.reference}` on the same seeds:",
        markdown_table(["arm", *(MEASURES[name] for name in names if name in PAIRED)], pairs),
    ]
    if any(fit != fits[question.reference] for fit in fits.values()):
        layers = sorted({layer for fit in fits.values() for layer in fit})
        body = [[arm, *(str(fit.get(layer, "-")) for layer in layers)] for arm, fit in fits.items()]
        parts += ["R² of each stitch layer before fine-tuning:", markdown_table(["arm", *map(str, layers)], body)]
    if judged:
        lines = [
            [arm, str(each["wide"]), str(each["narrow"]), str(each["mean"]), "yes" if each["passes"] else "no"]
            for arm, each in judged.items()
        ]
        reference = f"all paths against {question.reference}"
        parts += [
            "Passes where, by means, the wide row ends no worse than before fine-tuning, the narrow better, and all "
            f"paths together at least as well as `{question.reference}`:",
            markdown_table(["arm", "wide, change", "narrow, change", reference, "passes"], lines),
        ]
    return "\n\n".join(parts)


def _plain(arm: Mapping[str, Any]) -> dict[str, Any]:
    """Estimates as JSON."""
    return {kind: {name: asdict(value) for name, value in arm[kind].items()} for kind in ("means", "differences")}
