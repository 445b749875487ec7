"""How a run starts and ends: ranks join, compare what they were given and refuse what cannot work; all leave together.

Here a configuration is checked and flattened, and what it names is hashed, once; stages are given the result.
"""

import contextlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from lgp_dist.config.flat import STAGES, flatten, stage_settings
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
from lgp_dist.run.artifacts import RunDirectory, fingerprint
from lgp_dist.run.checks import check_config
from lgp_dist.run.log import end_log, open_log
from lgp_dist.run.provenance import code_hashes, environment
from lgp_dist.run.run_status import RunStatus, clear_run_status, write_run_status
from lgp_dist.stages.context import Context

log = logging.getLogger("lgp")


@contextlib.contextmanager
def joined(config: RunConfig, stages: tuple[str, ...], refusal: UserError | None = None) -> Iterator[Context]:
    """Joins the other ranks, watched until the block ends, with a run that is the same on all of them.

    stages: that will run. refusal: why this rank cannot start, if that is known already. UserError on every rank if one
    rank's recipe, launch or inputs are refused or differ. A refused rank joins too: launchers of other nodes do not see
    it end, and their ranks would wait for it.
    """
    try:
        check_config(config)
    except UserError as error:
        refusal = refusal or error
    timeout_s = 0.0 if refusal else config.faults.timeout_s
    with Watchdog.launched(Path(config.directory) / "heartbeats", timeout_s) as watchdog:
        watchdog.phase("join")
        engine = replace(config.engine, threads=0) if refusal else config.engine
        workers = replace(Workers.start(engine, timeout_s), watchdog=watchdog)
        watchdog.phase("compare", COMPARED_S)
        yield agreed(config, stages, workers, refusal)
    workers.close()


def agreed(config: RunConfig, stages: tuple[str, ...], workers: Workers, refusal: UserError | None) -> Context:
    """The run that all ranks start; UserError on every rank if one rank's recipe or inputs are refused or differ."""
    about, files, sources = environment(), dict[str, Path](), dict[str, str]()
    try:
        if refusal:
            raise refusal
        check_trackers(config.trackers)
        manifest = load_manifest(config.data)
        sources = split_fingerprints(config, manifest)
        files = source_files(config)
    except UserError as error:
        refusal = error
    settings = flatten(config)
    facts = facts_of(settings, workers.launch) | {"stages": list(stages), "device": workers.device.type}
    try:
        sources |= hashes_of(files, workers)
        if refusal:
            raise refusal
    except UserError as error:
        check_equal(facts | {REFUSAL: str(error)}, workers)
        raise
    for name, part in {"code": code_hashes(), "versions": about["versions"], "sources": sources}.items():
        facts |= {f"{name}.{key}": value for key, value in part.items()}
    check_equal(facts, workers)
    run = RunDirectory(Path(config.directory), stage_settings(config) | sources, config.recipe)
    return Context(config, settings, run, workers, manifest, about)


def split_fingerprints(config: RunConfig, manifest: ShardManifest) -> dict[str, str]:
    """Fingerprints of the splits that a run reads; UserError if the manifest does not have them."""
    return {f"data.{split}": manifest.fingerprint(split) for split in (config.data.train_split, config.data.val_split)}


def source_files(config: RunConfig) -> dict[str, Path]:
    """The files that a run reads apart from shards, by the setting that names them."""
    named = {f"model.rows.{index}.weights": row.weights for index, row in enumerate(config.model.rows)
             if row.source == "file"}  # fmt: skip
    if config.needs_ancestry and config.ancestry.source == "file":
        named["ancestry.weights"] = config.ancestry.weights
    named |= {f"finetune.{name}": getattr(config.finetune, name) for name in ("start_weights", "weights", "costs")}
    return {setting: Path(name) for setting, name in named.items() if name}


def sources(config: RunConfig, manifest: ShardManifest) -> dict[str, str]:
    """Hashes of all that a run reads from elsewhere, by setting; UserError if something cannot be read."""
    files = {setting: fingerprint(path) for setting, path in source_files(config).items()}
    return split_fingerprints(config, manifest) | files


def hashes_of(files: Mapping[str, Path], workers: Workers) -> dict[str, str]:
    """sha256 of files by setting. Every rank calls it; UserError on those that name a file which cannot be read.

    The first rank of a node that names a file reads it for the others of its node.
    """
    node = slice(workers.first_of_node, workers.first_of_node + workers.launch.local_world)
    places = {setting: str(path.resolve()) for setting, path in files.items()}
    earlier = {place for named in workers.gather([*places.values()])[node.start : workers.rank] for place in named}
    mine = {place: files[setting] for setting, place in places.items() if place not in earlier}
    found, problems = dict[str, str](), dict[str, str]()
    for place, path in mine.items():
        try:
            found[place] = fingerprint(path)
        except UserError as error:
            problems[place] = str(error)
    for hashes, others in workers.gather([found, problems])[node]:
        found, problems = found | hashes, problems | others
    for place in places.values():
        if place in problems:
            raise UserError(problems[place])
    return {setting: found[place] for setting, place in places.items()}


@contextlib.contextmanager
def recorded(context: Context, stage: str) -> Iterator[None]:
    """Log, settings and environment of the block are in the run directory; outcome.json says how it ended. All ranks
    leave together.

    stage: what is done when the block ends well.
    """
    run, workers = context.run, context.workers
    if workers.is_main:
        run.check_writable()
        clear_run_status(run.root)
        open_log(run.root / "log.txt")
        write_json(run.root / "config.json", context.settings)
        write_json(run.root / "environment.json", context.environment)
    workers.watchdog.phase("start")
    workers.barrier()  # if rank 0 cannot write, the others end with it
    try:
        yield
    except BaseException as error:
        if workers.is_main:
            with contextlib.suppress(UserError):  # the error itself is what a person must see
                write_run_status(run.root, _status(error))
            end_log()
        if isinstance(error, Preempted):
            workers.barrier()  # a launcher ends all ranks when the first has left
        raise
    if workers.is_main:
        write_run_status(run.root, RunStatus("complete", stage))
        end_log()
    workers.barrier()


def _status(error: BaseException) -> RunStatus:
    """How a start that an exception ends has ended."""
    if isinstance(error, Preempted):
        return RunStatus("preempted", error.stage, error.step, str(error))
    return RunStatus("failed", sentence=str(error) or type(error).__name__)


def check_stages(config: RunConfig, stages: tuple[str, ...], run: RunDirectory, world: int, images: int) -> None:
    """UserError if an artifact was made with other settings, or batch or schedule do not fit ranks and images."""
    for stage in STAGES[: STAGES.index(stages[-1]) + 1]:
        if not (config.force and stage in stages):
            run.check_settings(stage)
    check_world(config, stages, world, images)


def check_world(config: RunConfig, stages: tuple[str, ...], world: int, images: int) -> None:
    """UserError if batch or schedule of a stage do not fit so many ranks and images."""
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
