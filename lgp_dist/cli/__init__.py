"""The command line: `lgp STAGE RECIPE [overrides]`. Thin: what a command needs is imported when it is called."""

import json
import logging
import os
import sys
from typing import Annotated, Literal

import tyro

from lgp_dist.cli.bench import BenchAction, run_bench
from lgp_dist.cli.checkpoint import CheckpointAction, run_checkpoint
from lgp_dist.cli.descendants import REGISTRY, Downstream, of_a_run, run_downstream
from lgp_dist.cli.doctor import run_doctor
from lgp_dist.cli.exit_status import guarded
from lgp_dist.cli.launch import Check, run_launch
from lgp_dist.cli.recipe import Recipe
from lgp_dist.cli.shards import ShardsAction, run_shards
from lgp_dist.cli.study import run_report, run_study
from lgp_dist.config.flat import STAGES
from lgp_dist.config.run_config import RunConfig
from lgp_dist.paths.space import space_of
from lgp_dist.run.text_table import text_table
from lgp_dist.study.questions import QUESTIONS

SUMMARIES = {
    "ancestry": "Train or load the frozen teacher.",
    "distil": "Distil the ancestry into the rows of the pool.",
    "pool": "Put rows together and start the stitch layers.",
    "finetune": "Train all paths, each rank on its own.",
    "evaluate": "Accuracy and cost of every path.",
    "descend": "Choose the best path within a budget, of a recipe or of a finished run's directory.",
    "export": "Write a descendant as a standalone model, of a recipe or of a finished run's directory.",
}
"""Help of the stages' commands."""

Question = tyro.conf.Positional[Literal[tuple(QUESTIONS)]]  # type: ignore[valid-type]

app = tyro.extras.SubcommandApp()


def _stage_command(stage: str) -> None:
    def command(recipe: Recipe) -> None:
        guarded(lambda: _run(recipe, (stage,)), recipe.debug, recipe.directory)

    command.__doc__ = SUMMARIES[stage]
    app.command(command, name=stage)


for _stage in STAGES:
    _stage_command(_stage)


@app.command
def run(recipe: Recipe) -> None:
    """All stages in order, skipping those that are complete."""
    guarded(lambda: _run(recipe, STAGES), recipe.debug, recipe.directory)


@app.command
def paths(recipe: Recipe, json: bool = False) -> None:  # noqa: A002  the flag's name
    """List a pool's paths and what each costs.

    Args:
        json: Print a list of objects with the fields of paths.json.
    """
    guarded(lambda: _paths(recipe, as_json=json), recipe.debug)


@app.command
def shards(action: ShardsAction) -> None:
    """Build, index, verify, show and reshard shards."""
    guarded(lambda: run_shards(action), debug=False)


@app.command
def checkpoint(action: CheckpointAction) -> None:
    """Verify and show checkpoints, and take weights out of them."""
    guarded(lambda: run_checkpoint(action), debug=False)


@app.command
def launch(action: Annotated[Check, tyro.conf.arg(name="")]) -> None:
    """Check what a launch file would start."""
    guarded(lambda: run_launch(action), debug=False)


@app.command
def doctor(data: str = "", json: bool = False) -> None:  # noqa: A002  the flag's name
    """Look for what this machine lacks; status 1 where something is to do.

    Args:
        data: A data.root to reach, as folder or address.
        json: Print a list of objects.
    """
    guarded(lambda: run_doctor(data, as_json=json), debug=False)


@app.command
def bench(action: BenchAction) -> None:
    """Measure policies (by arithmetic), paths, engines, checkpoints, operations and loaders (by the clock)."""
    recipe = getattr(action, "recipe", None)
    guarded(lambda: run_bench(action), debug=isinstance(recipe, RunConfig) and recipe.debug)


@app.command(name="finetune-descendant")
def finetune_descendant(action: Annotated[Downstream, tyro.conf.arg(name="")]) -> None:
    """Train an exported descendant on another data set, with a new head."""
    guarded(lambda: run_downstream(action), action.debug, action.config.directory)


@app.command
def study(
    question: Question,
    recipe: Recipe,
    out: str = "",
    seeds: tuple[int, ...] = (0, 1, 2),
    jobs: int = 1,
    variants: tuple[str, ...] = (),
) -> None:
    """Answer a question: run its variants on several seeds, with means and intervals.

    Args:
        question: What is compared; variants are changes of the recipe.
        out: Folder of all runs and of the result; empty for runs/study/QUESTION.
        seeds: Every variant runs once on each.
        jobs: Runs at a time, each on one thread.
        variants: Variants to run besides the reference; empty for all.
    """
    guarded(lambda: run_study(question, recipe, out, seeds, jobs, variants), recipe.debug)


@app.command
def report(runs: tyro.conf.Positional[tuple[str, ...]], snnet: str = "", out: str = "runs/report") -> None:
    """Lay finished runs over each other: one table, one figure.

    Args:
        runs: Run directories that `lgp run` has completed.
        snnet: SN-Net's own file of results, for one more curve: JSON lines with cfg_id, flops, params and acc1.
        out: Folder for compare.md, compare.png and compare.svg.
    """
    guarded(lambda: run_report(runs, snnet, out), debug=False)


def _run(config: RunConfig, stages: tuple[str, ...]) -> None:
    from lgp_dist.pipeline import run_stages  # torch, timm and deepspeed: 15 s that `lgp --help` must not wait for

    run_stages(config, stages)


def _paths(config: RunConfig, *, as_json: bool) -> None:
    space = space_of(config)
    rows = sorted((space.describe(path) for path in space.paths), key=lambda row: row["flops"])
    if as_json:
        unmeasured = [{**row, "top1": None, "top5": None} for row in rows]
        sys.stdout.write(json.dumps(unmeasured, indent=2) + "\n")
        return
    lines = [
        [row["key"], str(row["low"]), str(row["high"])]
        + [f"{row[name] / unit:.2f}" for name, unit in (("params", 1e6), ("params_paper", 1e6), ("flops", 1e9))]
        for row in rows
    ]
    table = text_table(["key", "low", "high", "params M", "paper M", "GFLOPs"], lines)
    total = f"{len(rows)} paths, {len(space.stitch_widths)} stitch layers, {space.stored_params / 1e6:.2f} M stored"
    sys.stdout.write(f"{table}\n{total}\n")


def main() -> None:
    """Entry point of `lgp` and `python -m lgp_dist`."""
    # DeepSpeed speaks while it is imported, before anything could lower its level.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if of_a_run(sys.argv[1:]):
        return
    app.cli(
        prog="lgp",
        description="Learngene Pool: variable-sized vision models from one pretrained model.",
        config=(tyro.conf.CascadeSubcommandArgs,),
        console_outputs=os.environ.get("RANK", "0") == "0",
        registry=REGISTRY,
    )
