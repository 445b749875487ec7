"""`lgp study` and `lgp report`."""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from lgp_dist.cli.recipe import Recipe
from lgp_dist.commands.finished import check_run
from lgp_dist.errors import UserError
from lgp_dist.files import LOCK, locked
from lgp_dist.study.questions import QUESTIONS, with_variants


@dataclass(frozen=True)
class Study:
    """Answer a question: run its variants on several seeds, with means and intervals."""

    question: tyro.conf.Positional[Literal[tuple(QUESTIONS)]]  # type: ignore[valid-type]
    """What is compared; variants are changes of the recipe."""
    recipe: Recipe
    out: str = ""
    """Folder of all runs and of the result; empty for runs/study/QUESTION."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Every variant runs once on each."""
    jobs: int = 1
    """Runs at a time, each on one thread."""
    variants: tuple[str, ...] = ()
    """Variants to run besides the reference; empty for all."""


@dataclass(frozen=True)
class ReportRuns:
    """Compare finished runs: one table, one figure."""

    runs: tyro.conf.Positional[tuple[str, ...]]
    """Run directories that `lgp run` has completed."""
    snnet: str = ""
    """SN-Net's own file of results, for one more curve: JSON lines with cfg_id, flops, params and acc1."""
    out: str = "runs/report"
    """Folder for compare.md, compare.png and compare.svg."""


def run_study(action: Study) -> None:
    """Runs what is left of the study and prints its tables."""
    question = with_variants(QUESTIONS[action.question], action.variants)
    if action.jobs < 1:
        raise UserError(f"--jobs is {action.jobs}, but must be 1 or more: choose another value.")
    folder = Path(action.out or f"runs/study/{action.question}")
    with locked(folder / LOCK, "--out"):
        from lgp_dist.study.study import study  # torch and timm

        text = study(question, action.recipe, action.seeds, folder, action.jobs, _say)
    sys.stdout.write(f"{text}\n\nResults: {folder}/study.json, table.md, variants.png, paths.png\n")


def _say(line: str) -> None:
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {line}\n")
    sys.stderr.flush()


def run_report(action: ReportRuns) -> None:
    """Prints one table of all runs and draws one figure."""
    for run in action.runs:
        check_run(Path(run))
    with locked(Path(action.out) / LOCK, "--out"):
        from lgp_dist.report.compare import write_comparison  # matplotlib

        text = write_comparison([Path(run) for run in action.runs], action.snnet, Path(action.out))
    sys.stdout.write(f"{text}\n\nResults: {action.out}/compare.md, compare.png, compare.svg\n")
