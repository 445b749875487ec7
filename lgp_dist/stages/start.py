"""How a run starts and ends: ranks join, compare what they were given, refuse what cannot work, and leave together.

The configuration is checked and flattened here, and the files that it names are hashed; stages get the result.
"""

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lgp_dist.config import flat
from lgp_dist.config.flat import STAGES, depends_on, flatten, stage_settings
from lgp_dist.config.own_recipe import source_of
from lgp_dist.config.run_config import RunConfig
from lgp_dist.data.remote.roots import load_manifest
from lgp_dist.data.shards.manifest import ShardManifest
from lgp_dist.data.stream import check_batch
from lgp_dist.engine.checkpoints.manifest import check_resume
from lgp_dist.engine.rank_consistency import COMPARED_S, REFUSAL, check_equal, facts_of
from lgp_dist.engine.tracking import Tracking, check_trackers
from lgp_dist.engine.watch.watchdog import Watchdog
from lgp_dist.engine.workers import Workers
from lgp_dist.errors import Preempted, RankExited, UserError, peer_gone
from lgp_dist.files import LOCK, check_unlocked, locked, write_json
from lgp_dist.models.pretrained import check_images
from lgp_dist.paths.sampler import PathSampler
from lgp_dist.paths.space import space_of
from lgp_dist.recipes import known_recipes
from lgp_dist.run.artifacts import RunDirectory, fingerprint
from lgp_dist.run.checks import check_classes, check_config, tracker_options
from lgp_dist.run.log import end_log, open_log
from lgp_dist.run.provenance import code_hashes, environment, repeated_options
from lgp_dist.run.run_status import RunStatus, clear_run_status, read_run_status, status_of, write_run_status
from lgp_dist.stages.context import Context

log = logging.getLogger("lgp")

TRACKERS_S, SOON_S = 60.0, 10.0  # in which trackers must start and end, and end when the run leaves or has failed


@contextlib.contextmanager
def joined(config: RunConfig, stages: tuple[str, ...], refusal: UserError | None = None) -> Iterator[Context]:
    """Joins the other ranks, watched until the block ends, with a run that is the same on all of them.

    stages: that will run. refusal: why this rank cannot start, if that is known already. UserError on every rank if one
    rank's recipe, launch or inputs are refused or differ. A refused rank joins too: launchers of other nodes do not see
    it end, and their ranks would wait for it.
    """
    directory = Path(config.directory)
    with contextlib.ExitStack() as stack:
        try:
            check_config(config)
            check_resume(config)
            if os.environ.get("RANK", "0") == "0":
                stack.enter_context(locked(directory / LOCK))
            else:
                check_unlocked(directory / LOCK)
        except UserError as error:
            refusal = refusal or error
        timeout_s = 0.0 if refusal else config.faults.timeout_s
        watchdog = stack.enter_context(Watchdog.launched(directory / "heartbeats", timeout_s))
        watchdog.phase("join")
        engine = replace(config.engine, threads=0) if refusal else config.engine
        workers = replace(Workers.start(engine, timeout_s), watchdog=watchdog)
        watchdog.phase("compare", COMPARED_S)
        try:
            yield agreed(config, stages, workers, refusal)
        except RuntimeError as error:
            if peer_gone(error) and not isinstance(error, RankExited):
                raise workers.exited(error) from error
            raise
    workers.close()


def agreed(config: RunConfig, stages: tuple[str, ...], workers: Workers, refusal: UserError | None) -> Context:
    """The run that all ranks start; UserError on every rank if one rank's recipe or inputs are refused or differ."""
    settings, about = flatten(config), environment(source_of(config.recipe))
    facts = facts_of(settings, workers.launch) | {"stages": list(stages), "device": workers.device.type}
    facts |= _named("code", code_hashes()) | _named("versions", about["versions"])
    try:
        if refusal:
            raise refusal
        check_trackers(config.trackers)
        manifest = load_manifest(config.data)
        check_classes(config.data, len(manifest.classes))
        splits = split_fingerprints(config, manifest)
    except UserError as error:
        raise _refused(error, workers) from None
    check_equal(facts | _named("sources", splits), workers)
    # From here on all ranks run the same code, so that they can hash files together.
    try:
        files = hashes_of(source_files(config), workers)
    except UserError as error:
        raise _refused(error, workers) from None
    check_equal(_named("sources", files), workers)
    run = RunDirectory(Path(config.directory), stage_settings(config) | splits | files, config.recipe)
    return Context(config, settings, run, workers, manifest, about)


def _named(kind: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{kind}.{name}": value for name, value in facts.items()}


def _refused(error: UserError, workers: Workers) -> UserError:
    """Tells all ranks why this one cannot start: all raise a UserError."""
    check_equal({REFUSAL: str(error)}, workers)
    return error


def split_fingerprints(config: RunConfig, manifest: ShardManifest) -> dict[str, str]:
    """Fingerprints of the splits that a run reads, as `data.SPLIT`; UserError if the manifest lacks one."""
    return {f"data.{split}": manifest.fingerprint(split) for split in (config.data.train_split, config.data.val_split)}


def source_files(config: RunConfig) -> dict[str, Path]:
    """The files that a run reads next to shards, by the setting that names them."""
    named = {f"finetune.{name}": getattr(config.finetune, name) for name in ("start_weights", "weights", "costs")}
    if config.needs_ancestry and config.ancestry.source == "file":
        named["ancestry.weights"] = config.ancestry.weights
    for index, row in enumerate(config.model.rows):
        if row.source == "file":
            named[f"model.rows.{index}.weights"] = row.weights
    return {setting: Path(name) for setting, name in named.items() if name}


def sources(config: RunConfig, manifest: ShardManifest) -> dict[str, str]:
    """Hashes of all that a run reads from elsewhere, by setting; UserError if something cannot be read."""
    files = {setting: fingerprint(path, setting) for setting, path in source_files(config).items()}
    return split_fingerprints(config, manifest) | files


def hashes_of(files: Mapping[str, Path], workers: Workers) -> dict[str, str]:
    """sha256 of files by setting. Every rank calls it; UserError on the ranks that name a file which cannot be read.

    Ranks may name different files. The first rank of a node that names a file reads it for its node.
    """
    node = slice(workers.first_of_node, workers.first_of_node + workers.launch.local_world)
    places = {setting: str(path.resolve()) for setting, path in files.items()}
    earlier = {place for named in workers.gather([*places.values()])[node.start : workers.rank] for place in named}
    mine = {place: setting for setting, place in places.items() if place not in earlier}
    hashes, problems = dict[str, str](), dict[str, str]()
    for place, setting in mine.items():
        try:
            hashes[place] = fingerprint(files[setting], setting)
        except UserError as error:
            problems[place] = str(error)
    for others, failures in workers.gather([hashes, problems])[node]:
        hashes, problems = hashes | others, problems | failures
    for place in places.values():
        if place in problems:
            raise UserError(problems[place])
    return {setting: hashes[place] for setting, place in places.items()}


@contextlib.contextmanager
def recorded(context: Context, stage: str) -> Iterator[Context]:
    """Keeps log, settings and environment in the run directory, and how the block ended in outcome.json.

    Yields the context with the run's trackers. All ranks leave together. stage: the last, which is done if the block
    ends well.
    """
    run, workers, config, tracking = context.run, context.workers, context.config, context.tracking
    patience = min(TRACKERS_S, config.faults.timeout_s / 2)  # otherwise the watchdog would end the run
    workers.watchdog.phase("start")
    about_launch = workers.described()
    if workers.is_main:
        run.check_writable()
        clear_run_status(run.root)
        open_log(run.root / "log.txt")
        for line in [*about_launch, *repeated_options(), *differences(context.config, stage)]:
            log.info("%s", line)
        write_json(run.root / "config.json", context.settings)
        write_json(run.root / "environment.json", context.environment)
        project = config.recipe.rpartition(":")[2]
        tracking = Tracking.start(tracker_options(config), project, run.root, context.settings, patience)
    workers.barrier()  # if rank 0 cannot write, the others end with it
    try:
        yield replace(context, tracking=tracking)
    except BaseException as failure:
        error = workers.exited(failure) if peer_gone(failure) else failure
        with contextlib.suppress(UserError):  # the error itself is what a person must see
            # A launcher ends rank 0 when another rank has failed: that rank says so before, and its word stands.
            if (workers.is_main or isinstance(error, Exception)) and read_run_status(run.root) is None:
                write_run_status(run.root, status_of(error, *workers.watchdog.place))
        if workers.is_main:
            tracking.close(min(SOON_S, patience))
            end_log()
        if isinstance(error, Preempted) and error.stage:
            workers.barrier()  # a launcher ends all ranks when the first has left
        if error is not failure:
            raise error from failure
        raise
    if workers.is_main:
        write_run_status(run.root, RunStatus("complete", stage))
        tracking.close(patience)
        end_log()
    workers.barrier()


def check_stages(config: RunConfig, stages: tuple[str, ...], run: RunDirectory, world: int, images: int) -> None:
    """UserError if an artifact was made with other settings, or a batch or schedule does not fit ranks and images."""
    for stage in STAGES[: STAGES.index(stages[-1]) + 1]:
        if not (config.force and stage in stages):
            run.check_settings(stage)
    check_world(config, stages, world, images)


def check_pretrained(context: Context, stages: tuple[str, ...]) -> None:
    """Compares what pretrained weights expect with the images that they get, for stages that are to read them.

    UserError where they would see other colours; the log says what else differs.
    """
    config, keys = context.config, {"ancestry": ["ancestry"] * context.config.needs_ancestry}
    keys["distil"] = [f"model.rows.{index}" for index in range(len(config.model.rows))]
    due = [stage for stage in stages if config.force or context.run.find(stage) is None]
    for key in (key for stage in due for key in keys.get(stage, ())):
        if (difference := check_images(config, key)) and context.workers.is_main:
            log.warning("%s", difference)


def check_world(config: RunConfig, stages: tuple[str, ...], world: int, images: int) -> None:
    """UserError if the batch or schedule of a stage does not fit the numbers of ranks and images."""
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


def differences(config: RunConfig, stage: str = STAGES[-1]) -> list[str]:
    """What differs from the configuration's recipe, as "key value (recipe value)"; nothing without a recipe.

    stage: the last that runs; settings of later ones are marked.
    """
    now, known = flatten(config), known_recipes()
    later = depends_on(now, STAGES[-1]).keys() - depends_on(now, stage).keys()
    own = flatten(known[config.recipe]()) if config.recipe in known else now
    return [
        f"{key} {text}" + f": of a later stage, not read by {stage}" * (key in later)
        for key, text in flat.differences(now, own, "recipe").items()
    ]
