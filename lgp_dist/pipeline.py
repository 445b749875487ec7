"""A run: its stages in order. Stages whose artifacts are complete are skipped."""

import logging
from collections.abc import Callable

from lgp_dist.config.run_config import RunConfig
from lgp_dist.report.publish import publish
from lgp_dist.run.log import show
from lgp_dist.run.path_rows import read_rows
from lgp_dist.stages import ancestry, descend, distil, evaluate, export, finetune, pool
from lgp_dist.stages.context import Context
from lgp_dist.stages.start import check_pretrained, check_stages, joined, recorded

log = logging.getLogger("lgp")

RUN: dict[str, Callable[[Context], None]] = {
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
    """Runs the named stages, or skips those whose artifact is complete and made with the same settings.

    Raises UserError for whatever a person can put right; what can be known before the first stage is checked before it.
    """
    with joined(config, stages) as context:
        run_joined(context, stages)


def run_joined(context: Context, stages: tuple[str, ...]) -> None:
    """`run_stages` for ranks that have joined."""
    check_stages(context.config, stages, context.run, context.workers.world, context.train_images)
    with recorded(context, stages[-1]) as context:
        check_pretrained(context, stages)
        for stage in stages:
            if is_to_do(stage, context):
                RUN[stage](context)
        report(context, stages)


def is_to_do(stage: str, context: Context) -> bool:
    """Whether a stage has to run; the log says so."""
    if stage == "ancestry" and not context.config.needs_ancestry:
        log.info("ancestry: not needed, skipped")
        return False
    workers = context.workers
    workers.watchdog.begin(stage)
    if not context.config.force and context.is_current(stage):
        log.info("%s: complete in %s, skipped", stage, context.run.root / stage)
        return False
    log.info("%s: begins on %d process(es), %s", stage, workers.world, workers.device.type)
    return True


def report(context: Context, stages: tuple[str, ...]) -> None:
    """Rank 0 writes tables, plots and report.html, and shows the paths if they were to be evaluated."""
    run, workers = context.run, context.workers
    workers.watchdog.begin("report")
    if workers.is_main:
        artifacts = {artifact.record["stage"]: artifact for artifact in run.consistent()}
        table = publish(run.root, context.config.recipe, context.settings, [*artifacts.values()], workers.device_name)
        choice = next((artifacts[stage].facts for stage in ("export", "descend") if stage in artifacts), {})
        rows = read_rows(run.root / "paths.json") if table else []
        context.tracking.results(run.root, rows, choice)
        if table and "evaluate" in stages:
            show(f"\n{table}\n\nResults: {run.root}/report.html, paths.csv, pareto.png, export/\n")
