"""`lgp study`: runs the trials of a question and writes its tables and plots."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lgp_dist.config.flat import STAGES
from lgp_dist.config.run_config import RunConfig
from lgp_dist.data.remote.roots import load_manifest
from lgp_dist.errors import UserError
from lgp_dist.files import write_atomic, write_json
from lgp_dist.report.compare import System, compare_figure, variants_figure
from lgp_dist.report.plots import save_figure
from lgp_dist.run.artifacts import is_complete, specialised_folder
from lgp_dist.run.provenance import environment
from lgp_dist.run.text_table import markdown_table
from lgp_dist.stages.start import sources
from lgp_dist.study.questions import Question
from lgp_dist.study.results import (
    MEASURES,
    PAIRED,
    RowCheck,
    Summary,
    layer_fits,
    mean_curve,
    mean_rows,
    row_checks,
    specialised_paths,
    summary,
    trial_record,
)
from lgp_dist.study.runner import run_trials
from lgp_dist.study.statistics import Estimate
from lgp_dist.study.trials import Trial, trials_of

Say = Callable[[str], None]


def study(question: Question, base: RunConfig, seeds: Sequence[int], out: Path, jobs: int, say: Say) -> str:
    """Runs a question's trials that are not complete, writes study.json, table.md and figures into `out`; the tables.

    base: a recipe with the settings that all variants change. UserError for what a person can correct.
    """
    trials = [replace(trial, sources=sources_of(trial.config)) for trial in trials_of(question, base, seeds, out)]
    out.mkdir(parents=True, exist_ok=True)
    run_trials(trials, is_done, out, jobs, question.ranks, say)
    return publish(question, trials, out)


def sources_of(config: RunConfig) -> dict[str, str]:
    """Fingerprints of a run's shards and files, by setting."""
    return sources(config, load_manifest(config.data))


def is_done(trial: Trial) -> bool:
    """Whether all its stages are complete, and its specialised paths'; UserError if made with other settings."""
    alone = (specialised_folder(trial.folder, key) for key in trial.config.specialise.paths)
    if not all(is_complete(folder, STAGES[-1]) for folder in alone):
        return False
    try:
        return all(trial.run.is_current(stage) for stage in ("evaluate", STAGES[-1]))
    except UserError as error:
        raise UserError(
            f"{trial.folder} does not hold what this study would make ({str(error).rstrip('.')}): choose another "
            "--out, or remove that folder."
        ) from None


def publish(question: Question, trials: Sequence[Trial], out: Path) -> str:
    """Writes what the complete trials measured; the tables as Markdown."""
    records = [trial_record(trial, out) for trial in trials]
    found = summary(records, question.reference)
    checks = row_checks(records, question.reference) if question.keeps_rows else {}
    text = tables(question, found, layer_fits(records), checks)
    if alone := specialised_paths(records):
        text += "\n\nPaths trained alone afterwards:\n\n" + _table(alone, {"pool": "in the pool", "alone": "alone"})
    write_json(
        out / "study.json",
        {
            "question": question.name,
            "asks": question.asks,
            "reference": question.reference,
            "ranks": question.ranks,
            "seeds": sorted({trial.seed for trial in trials}),
            **environment(),
            "arms": {each.name: {"what": each.what, **asdict(found[each.name])} for each in question.variants},
            "cells": records,
        },
    )
    write_atomic(out / "table.md", (text + "\n").encode())
    curves = {name: mean_curve(records, name) for name in found}
    means = {
        name: {measure: (value.mean, value.half or 0.0) for measure, value in each.means.items()}
        for name, each in found.items()
    }
    save_figure(variants_figure(means, curves, title=question.asks), out / "variants")
    systems: list[System] = []
    for name, each in means.items():
        system = System.of_paths(name, mean_rows(records, name), 1e12 * each["cost"][0] if "cost" in each else None)
        if system.rows not in [other.rows for other in systems]:  # variants may share their pool
            systems.append(system)
        if rows := mean_rows(records, name, "specialised"):
            systems.append(System(f"{name}: paths trained alone afterwards", rows, None))
    save_figure(compare_figure(systems, title=question.asks), out / "paths")
    return text


def tables(
    question: Question,
    found: Mapping[str, Summary],
    fits: Mapping[str, Mapping[int, Estimate]],
    checks: Mapping[str, RowCheck],
) -> str:
    """Tables of means, of differences from the reference, of `layer_fits` if variants differ in it, and of checks."""
    names = [name for name in MEASURES if any(name in each.means for each in found.values())]
    paired = [name for name in names if name in PAIRED]
    others = {variant: each.differences for variant, each in found.items() if variant != question.reference}
    count = max(each.means["mean"].count for each in found.values())
    parts = [
        f"**{question.name}**: {question.asks}",
        f"Mean and 95 % interval over {count} seed(s):",
        _table({variant: each.means for variant, each in found.items()}, {name: MEASURES[name] for name in names}),
        f"Difference from `{question.reference}` on the same seeds:",
        _table(others, {name: MEASURES[name] for name in paired}),
    ]
    if any(fit != fits[question.reference] for fit in fits.values()):
        layers = sorted({layer for fit in fits.values() for layer in fit})
        parts += ["R² of each stitch layer before fine-tuning:", _table(fits, {each: str(each) for each in layers})]
    if checks:
        lines = [
            [variant, str(each.wide), str(each.narrow), str(each.mean), "yes" if each.passes else "no"]
            for variant, each in checks.items()
        ]
        reference = f"all paths, difference from {question.reference}"
        parts += [
            "A variant passes if, by means, the wide row ends no worse than before fine-tuning, the narrow row ends "
            f"better, and the mean over all paths is at least that of `{question.reference}`:",
            markdown_table(["variant", "wide, change", "narrow, change", reference, "passes"], lines),
        ]
    return "\n\n".join(parts)


def _table(values: Mapping[str, Mapping[Any, Estimate]], columns: Mapping[Any, str]) -> str:
    """A line for each variant. columns: names in `values` and their headings."""
    body = [[variant, *(str(each.get(name, "-")) for name in columns)] for variant, each in values.items()]
    return markdown_table(["variant", *columns.values()], body)
