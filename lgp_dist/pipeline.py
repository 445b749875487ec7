"""Runs stages in order over one run directory, skipping those that are complete."""

import logging
import sys

from lgp_dist.artifacts import RunDirectory, write_json
from lgp_dist.config import STAGES, RunConfig, flatten
from lgp_dist.engine.setup import Workers, check_trackers
from lgp_dist.errors import UserError
from lgp_dist.paths import PathSpace
from lgp_dist.provenance import environment
from lgp_dist.report.publish import publish
from lgp_dist.stages import ancestry, descend, distil, evaluate, export, finetune, pool
from lgp_dist.stages.context import Context

log = logging.getLogger("lgp")

RUN = {
    "ancestry": ancestry.run,
    "distil": distil.run,
    "pool": pool.run,
    "finetune": finetune.run,
    "evaluate": evaluate.run,
    "descend": descend.run,
    "export": export.run,
}
"""What each stage calls."""


def run_stages(config: RunConfig, stages: tuple[str, ...]) -> None:
    """Runs the named stages, or skips them where their artifact is complete and made with the same settings.

    Raises UserError for whatever a person can put right.
    """
    check_config(config)
    directory = RunDirectory.of(config)
    workers = Workers.start(config.engine)
    about = environment()
    context = Context(config, directory, workers, about["commit"])
    if workers.is_main:
        directory.check_writable()
        _log_to(directory)
        write_json(directory.root / "config.json", flatten(config))
        write_json(directory.root / "environment.json", about)
    for stage in stages:
        done = not config.force and directory.is_current(stage, config)
        if workers.agree(done):
            if workers.is_main:
                log.info("%s: complete in %s, skipped", stage, directory.root / stage)
            continue
        if workers.is_main:
            log.info("%s: begins on %d process(es), %s", stage, workers.world, workers.device.type)
        RUN[stage](context)
    if workers.is_main:
        _publish(context)
    workers.barrier()
    workers.close()


def check_config(config: RunConfig) -> None:
    """UserError for settings that no later check would name."""
    space = PathSpace.from_config(config)
    for index, row in enumerate(config.model.rows):
        if row.heads < 1 or row.width % row.heads:
            raise UserError(
                f"model.rows.{index} has width {row.width} and {row.heads} heads, but heads must divide the "
                "width: change one of them."
            )
    if len(config.data.mean) != config.data.channels or len(config.data.std) != config.data.channels:
        raise UserError(
            f"data.mean and data.std have {len(config.data.mean)} and {len(config.data.std)} values, but data.channels "
            f"is {config.data.channels}: give one value per channel."
        )
    if config.export.path:
        space.by_key(config.export.path)
    check_trackers(config.trackers)


def _log_to(directory: RunDirectory) -> None:
    """The log goes to the terminal and to log.txt."""
    log.setLevel(logging.INFO)
    log.propagate = False
    for handler in list(log.handlers):
        log.removeHandler(handler)
    for handler in (logging.StreamHandler(sys.stderr), logging.FileHandler(directory.root / "log.txt")):
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        log.addHandler(handler)


def _publish(context: Context) -> None:
    """Writes tables, plots and report of what is complete, and shows the table."""
    directory = context.run
    artifacts = [found for stage in STAGES if (found := directory.find(stage))]
    table = publish(directory.root, context.config.recipe, flatten(context.config), artifacts)
    if table:
        sys.stdout.write(f"\n{table}\n\nResults: {directory.root}/report.html, paths.csv, pareto.png, export/\n")
