"""Stage export: a descendant as a folder that loads anywhere, written only if every format equals its path."""

import logging
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from lgp_dist.data.stream import evaluation_batches, open_split
from lgp_dist.errors import UserError
from lgp_dist.export.folder import Exported, told, write_folder
from lgp_dist.export.latency import NAME, LatencyFile, with_path_latencies
from lgp_dist.export.pool_folder import pool_table, write_pool_folder
from lgp_dist.models.descendant import descendant_from_path, timm_config
from lgp_dist.protocols import Batch
from lgp_dist.run.artifacts import Artifact
from lgp_dist.run.path_rows import PathRow, read_rows
from lgp_dist.stages.context import Context

log = logging.getLogger("lgp")


def run(context: Context) -> None:
    """Writes the folder export/: config.json, model.safetensors, README.md, verify.json and the formats asked for."""
    began = time.monotonic()
    tuned, evaluated = context.require("finetune"), context.require("evaluate")
    inputs, key = [evaluated, tuned], context.config.export.path
    if not key:
        inputs.append(context.require("descend"))
        key = inputs[-1].facts["key"]
    context.write("export", inputs, partial(fill, context, tuned, evaluated, key), time.monotonic() - began)


def fill(context: Context, tuned: Artifact, evaluated: Artifact, key: str, folder: Path) -> PathRow:
    """Writes a path of the run as a descendant's folder. Returns its row of paths.json and the largest difference
    between logits of the path and of the weights read back."""
    path, data, settings = context.space.by_key(key), context.config.data, context.config.export
    rows = read_rows(evaluated.folder / "paths.json")
    facts = next((row for row in rows if row["key"] == key), None)
    if facts is None:
        raise UserError(f"{evaluated.folder / 'paths.json'} has no path {key!r}: export one that was evaluated.")
    pool = context.load_pool(tuned).cpu()
    config = timm_config(context.space, context.heads, path, data, context.manifest.classes)
    file = LatencyFile(context.run.root / NAME, tuned.id)
    (timed,) = with_path_latencies([facts], context.space, context.heads, context.config.budget, file)
    exported = Exported(
        model=descendant_from_path(pool, context.heads, path),
        config=config | {"lgp": {**config["lgp"], "measured": facts, "pool": tuned.id}},
        facts=timed,
        origin=_origin(context, tuned, evaluated),
    )
    verdict = write_folder(folder, exported, settings, batches_of(context), partial(pool, path=path))
    for line in told(verdict):
        log.info("export: %s, %s", key, line)
    return {**facts, "largest_difference": verdict["formats"]["timm"]["largest_difference"]}


def fill_pool(context: Context, tuned: Artifact, evaluated: Artifact, rows: list[PathRow], folder: Path) -> None:
    """Writes the run's pool as a folder with the paths of these rows. Latencies that they lack are measured."""
    space, heads, data = context.space, context.heads, context.config.data
    if "latency_ms" not in rows[0]:
        file = LatencyFile(context.run.root / NAME, tuned.id)
        rows = with_path_latencies(rows, space, heads, context.config.budget, file)
    config = timm_config(space, heads, space.by_key(rows[0]["key"]), data, context.manifest.classes)
    table = pool_table(space, heads, rows, config, _origin(context, tuned, evaluated))
    write_pool_folder(folder, context.load_pool(tuned).cpu(), table, context.config.export, batches_of(context))


def _origin(context: Context, tuned: Artifact, evaluated: Artifact) -> dict[str, str]:
    """Where the weights of an export come from."""
    return {
        "trained pool (artifact finetune)": tuned.id,
        "sha256 of its pool.safetensors": tuned.record["files"]["pool.safetensors"],
        "evaluation (artifact evaluate)": evaluated.id,
        "commit of lgp_dist": context.environment["commit"] or "none: not a checkout",
    }


def batches_of(context: Context) -> Callable[[int], Iterable[Batch]]:
    """A number of validation images to that many, evenly spread, as batches; each that comes is progress."""
    data = context.config.data

    def batches(images: int) -> Iterable[Batch]:
        index = open_split(data, data.val_split)
        return context.workers.watchdog.over(evaluation_batches(index, data, 64, rank=0, world=1, limit=images))

    return batches
