"""Runs stages in order over one run directory, skipping those that are complete."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from lgp_dist.config.flat import STAGES, flatten
from lgp_dist.config.run_config import RunConfig
from lgp_dist.data.remote.roots import load_manifest
from lgp_dist.data.shards.manifest import ShardManifest
from lgp_dist.data.stream import check_batch
from lgp_dist.engine.rank_consistency import COMPARED_S, REFUSAL, check_equal, facts_of
from lgp_dist.engine.watch.watchdog import Watchdog
from lgp_dist.engine.workers import Workers, check_trackers
from lgp_dist.errors import Preempted, UserError
from lgp_dist.files import write_json
from lgp_dist.paths.sampler import PathSampler
from lgp_dist.paths.space import space_of
from lgp_dist.report.publish import publish
from lgp_dist.run.artifacts import RunDirectory, fingerprint
from lgp_dist.run.checks import check_config
from lgp_dist.run.log import end_log, open_log, show
from lgp_dist.run.provenance import code_hashes, environment, versions
from lgp_dist.run.run_status import RunStatus, clear_run_status, write_run_status
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

    Raises UserError for whatever a person can put right; what can be known before the first stage is checked before it.
    """
    with joined(config) as (workers, refusal):
        manifest, directory = inputs(config, stages, workers, refusal)
        images = sum(entry.samples for entry in manifest.entries(config.data.train_split))
        check_stages(config, stages, directory, workers.world, images)

        def finish() -> None:
            table = publish(directory.root, config.recipe, flatten(config), directory.consistent())
            if table and "evaluate" in stages:
                show(f"\n{table}\n\nResults: {directory.root}/report.html, paths.csv, pareto.png, export/\n")

        recorded(config, directory, workers, stages[-1], lambda context: _run(context, stages), finish)


def recorded(
    config: RunConfig,
    directory: RunDirectory,
    workers: Workers,
    stage: str,
    work: Callable[[Context], None],
    finish: Callable[[], None] = lambda: None,
) -> None:
    """Calls `work` on every rank, with log, settings and environment in the run directory, then `finish` on rank 0;
    outcome.json says how it ended.

    stage: what is done when all is.
    """
    about = environment()
    if workers.is_main:
        directory.check_writable()
        clear_run_status(directory.root)
        open_log(directory.root / "log.txt")
        write_json(directory.root / "config.json", flatten(config))
        write_json(directory.root / "environment.json", about)
    workers.watchdog.phase("start")
    workers.barrier()  # where rank 0 cannot write, the others end with it
    _work_and_tell(Context(config, directory, workers, about["commit"]), stage, work, finish)


def _work_and_tell(context: Context, stage: str, work: Callable[[Context], None], finish: Callable[[], None]) -> None:
    """The work, the report and the outcome; all ranks leave together."""
    directory, workers = context.run, context.workers
    try:
        work(context)
    except BaseException as error:
        if workers.is_main:
            with contextlib.suppress(UserError):  # the error itself is what a person must see
                write_run_status(directory.root, _status(error))
            end_log()
        if isinstance(error, Preempted):
            workers.barrier()  # a launcher ends all ranks when the first has left
        raise
    workers.watchdog.begin("report")
    if workers.is_main:
        finish()
        write_run_status(directory.root, RunStatus("complete", stage))
        end_log()
    workers.barrier()


def _run(context: Context, stages: tuple[str, ...]) -> None:
    config, directory, workers = context.config, context.run, context.workers
    for stage in stages:
        if stage == "ancestry" and not config.needs_ancestry:
            log.info("ancestry: not needed, skipped")
            continue
        workers.watchdog.begin(stage)
        done = not config.force and directory.is_current(stage, config)
        if workers.agree(done):
            log.info("%s: complete in %s, skipped", stage, directory.root / stage)
            continue
        log.info("%s: begins on %d process(es), %s", stage, workers.world, workers.device.type)
        RUN[stage](context)


def _status(error: BaseException) -> RunStatus:
    """How a start that an exception ends has ended."""
    if isinstance(error, Preempted):
        return RunStatus("preempted", error.stage, error.step, str(error))
    return RunStatus("failed", sentence=str(error) or type(error).__name__)


@contextlib.contextmanager
def joined(config: RunConfig) -> Iterator[tuple[Workers, UserError | None]]:
    """This rank among the others, watched until it leaves; also where its settings are refused, with the refusal: ranks
    of other nodes would wait for it."""
    refusal = None
    try:
        check_config(config)
    except UserError as error:
        refusal = error
    timeout_s = 0.0 if refusal else config.faults.timeout_s
    with Watchdog.launched(Path(config.directory) / "heartbeats", timeout_s) as watchdog:
        watchdog.phase("join")
        engine = replace(config.engine, threads=0) if refusal else config.engine
        workers = replace(Workers.start(engine, timeout_s), watchdog=watchdog)
        watchdog.phase("compare", COMPARED_S)
        yield workers, refusal
    workers.close()


def inputs(
    config: RunConfig, stages: tuple[str, ...], workers: Workers, refusal: UserError | None
) -> tuple[ShardManifest, RunDirectory]:
    """What the run reads; UserError on every rank where one rank's recipe or inputs are refused or differ."""
    try:
        if refusal:
            raise refusal
        check_trackers(config.trackers)
        manifest = load_manifest(config.data)
        directory = RunDirectory(Path(config.directory), sources(config, manifest))
    except UserError as error:
        check_equal(shared(config, stages, workers, {}) | {REFUSAL: str(error)}, workers)
        raise
    check_equal(shared(config, stages, workers, directory.sources), workers)
    return manifest, directory


def sources(config: RunConfig, manifest: ShardManifest) -> dict[str, str]:
    """Fingerprints of shards, weights and costs; UserError where they cannot be read."""
    found = {f"data.{split}": manifest.fingerprint(split) for split in (config.data.train_split, config.data.val_split)}
    if config.needs_ancestry and config.ancestry.source == "file":
        found["ancestry.weights"] = fingerprint(Path(config.ancestry.weights))
    for index, row in enumerate(config.model.rows):
        if row.source == "file":
            found[f"model.rows.{index}.weights"] = fingerprint(Path(row.weights))
    if config.finetune.start_weights:
        found["finetune.start_weights"] = fingerprint(Path(config.finetune.start_weights))
    if config.finetune.weights:
        found["finetune.weights"] = fingerprint(Path(config.finetune.weights))
    if config.finetune.costs:
        found["finetune.costs"] = fingerprint(Path(config.finetune.costs), "JSON")
    return found


def shared(config: RunConfig, stages: tuple[str, ...], workers: Workers, sources: dict[str, str]) -> dict[str, Any]:
    """What every rank must have alike, by dotted key: recipe, launch, stages, device, code, versions and inputs."""
    found = facts_of(config, workers.launch) | {"stages": list(stages), "device": workers.device.type}
    for name, part in {"code": code_hashes(), "versions": versions(), "sources": sources}.items():
        found |= {f"{name}.{key}": value for key, value in part.items()}
    return found


def check_stages(config: RunConfig, stages: tuple[str, ...], directory: RunDirectory, world: int, images: int) -> None:
    """UserError where an artifact was made with other settings, or batch or schedule do not fit ranks and images."""
    for stage in STAGES[: STAGES.index(stages[-1]) + 1]:
        if not (config.force and stage in stages):
            directory.check_settings(stage, config)
    check_world(config, stages, world, images)


def check_world(config: RunConfig, stages: tuple[str, ...], world: int, images: int) -> None:
    """UserError where batch or schedule of a stage do not fit so many ranks and images."""
    trains = {"finetune": config.finetune.train}
    if any(row.trains for row in config.model.rows):
        trains["distil"] = config.distil.train
    if config.needs_ancestry and config.ancestry.source == "train":
        trains["ancestry"] = config.ancestry.train
    for stage in stages:
        if stage in trains:
            check_batch(trains[stage], world, images, f"{stage}.train.")
    if "finetune" in stages:
        PathSampler.from_config(config, space_of(config)).check(world)
