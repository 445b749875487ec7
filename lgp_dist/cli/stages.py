"""`lgp STAGE RECIPE`, `lgp run RECIPE` and `lgp paths RECIPE`."""

import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from lgp_dist.cli.parse import Command
from lgp_dist.cli.recipe import Recipe
from lgp_dist.config.flat import STAGES
from lgp_dist.config.run_config import RunConfig
from lgp_dist.data.remote.address import local_path
from lgp_dist.engine.checkpoints.manifest import check_resume
from lgp_dist.engine.launch.environment import Launch, check_ranks, check_requests
from lgp_dist.engine.watch.signals import Preemption
from lgp_dist.errors import UserError
from lgp_dist.files import LOCK, check_unlocked, existing
from lgp_dist.paths.space import space_of
from lgp_dist.report.rows import flops_unit
from lgp_dist.run.checks import check_classes, check_config, check_model
from lgp_dist.run.run_status import ended
from lgp_dist.run.text_table import text_table

SUMMARIES = {
    "ancestry": "Train or load the frozen teacher.",
    "distil": "Distil the ancestry into the rows of the pool.",
    "pool": "Join the rows by stitch layers and initialise these.",
    "finetune": "Train all paths, each rank on a path of its own.",
    "evaluate": "Measure accuracy and cost of every path.",
    "descend": "Choose the best path within a budget.",
    "export": "Write a path as a standalone model.",
    "run": "All of these in order, skipping those that are complete.",
}
"""A line for each stage's command."""


@dataclass(frozen=True)
class Paths:
    """List a pool's paths and what each costs, without training."""

    recipe: Recipe
    json: bool = False
    """Print a list of objects with the fields of paths.json."""


def stage_commands(of_a_run: Mapping[str, Command]) -> dict[str, Command]:
    """A command for each stage, and for all; of_a_run: what one does with a run directory in place of a recipe."""
    stages = {name: (name,) for name in STAGES} | {"run": STAGES}
    return {
        name: Command(RunConfig, _running(name, stages[name]), summary, otherwise=of_a_run.get(name))
        for name, summary in SUMMARIES.items()
    }


def _running(name: str, stages: tuple[str, ...]) -> Callable[[RunConfig], None]:
    def run(config: RunConfig) -> None:
        specialises = config.specialise.top > 0 or bool(config.specialise.paths)
        if specialises and name != "run":
            raise UserError(f"--specialise is for lgp run: leave it out of lgp {name}, or use lgp specialise.")
        if config.check and name != "ancestry":
            raise UserError(f"--check is for lgp ancestry: leave it out of lgp {name}.")
        if config.check:
            check_config(config)
            from lgp_dist.stages.ancestry import check  # torch and timm: 5 s

            check(config)
            return
        with Preemption(at_once=True), ended(Path(config.directory)):
            check_start(config)
            if specialises:
                from lgp_dist.commands.specialise import run_and_specialise  # torch, timm and deepspeed: 10 s

                run_and_specialise(config)
            else:
                from lgp_dist.pipeline import run_stages  # the same

                run_stages(config, stages)

    return run


def check_start(config: RunConfig) -> None:
    """UserError for what can be known before torch is imported: launch, settings, checkpoint, shards, run directory.

    Checks only the variables of a launch of several ranks, which join first, so that all of them end.
    """
    check_ranks(os.environ)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        return
    check_config(config)
    check_requests(Launch.from_environment(os.environ), config.engine)
    check_resume(config)
    shards = local_path(config.data.root)
    if shards is not None:
        from lgp_dist.data.shards.manifest import ShardManifest  # NumPy and Pillow

        check_classes(config.data, len(ShardManifest.load(shards).classes))
    folder = Path(config.directory)
    there = existing(folder)
    if not there.is_dir():
        raise UserError(
            f"The run directory {folder} cannot be made, since {there} is a file: choose another --run-dir."
        )
    check_unlocked(folder / LOCK)


def list_paths(action: Paths) -> None:
    """Prints the paths from cheap to dear."""
    check_model(action.recipe)
    space = space_of(action.recipe)
    rows = sorted((space.describe(path) for path in space.paths), key=lambda row: row["flops"])
    if action.json:
        unmeasured = [{**row, "top1": None, "top5": None} for row in rows]
        sys.stdout.write(json.dumps(unmeasured, indent=2) + "\n")
        return
    divisor, letter = flops_unit(rows)
    lines = [
        [row["key"], str(row["low"]), str(row["high"])]
        + [f"{row[name] / unit:.2f}" for name, unit in (("params", 1e6), ("params_paper", 1e6), ("flops", divisor))]
        for row in rows
    ]
    head = ["path", "low", "high", "params (M)", "params, paper (M)", f"FLOPs ({letter})"]
    table = text_table(head, lines)
    total = f"{len(rows)} paths, {len(space.stitch_widths)} stitch layers, {space.stored_params / 1e6:.2f} M stored"
    sys.stdout.write(f"{table}\n{total}\n")
