"""Stage pool: rows become a pool, and its stitch layers get their start."""

import logging
import time
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from lgp_dist.data.stream import evaluation_batches, open_split
from lgp_dist.models.ancestry import Ancestry
from lgp_dist.models.auxiliary import AuxiliaryViT
from lgp_dist.models.build import auxiliary_rows, pool_of_rows
from lgp_dist.models.stitch_fit import stitch_fits
from lgp_dist.models.stitch_init import Starts, ancestry_means, least_squares_starts, transformation_starts
from lgp_dist.run.artifacts import Artifact
from lgp_dist.run.facts import PoolFacts
from lgp_dist.run.tensors import load_tensors, save_tensors
from lgp_dist.stages.context import Context

log = logging.getLogger("lgp")

HELD_OUT = 256
"""Validation images on which the start of the stitch layers is measured."""


def run(context: Context) -> None:
    """Writes pool/pool.safetensors."""
    began, distilled = time.monotonic(), context.require("distil")
    ancestry = context.load_ancestry(context.require("ancestry")) if context.config.has_levels else None
    context.seed("pool")

    def fill(folder: Path) -> PoolFacts:
        rows = finished_rows(context, ancestry, distilled)
        starts = stitch_starts(context, ancestry, rows)
        pool = pool_of_rows(context.config, [row.vit for row in rows])
        for index, start in starts.items():
            pool.stitch(index).start_from(start)
        save_tensors(folder / "pool.safetensors", pool.state_dict())
        facts = {
            "stored_params": context.space.stored_params,
            "paths": len(context.space.paths),
            "stitches": len(starts),
        }
        log.info("pool: %(paths)d paths, %(stored_params)d stored parameters", facts)
        fits = stitch_fits(pool.to(context.workers.device), held_out_images(context))
        return {**facts, "stitch_init": context.config.pool.stitch_init, "r2": fits}

    context.write("pool", [distilled], fill, time.monotonic() - began)


def finished_rows(context: Context, ancestry: Ancestry | None, artifact: Artifact) -> list[AuxiliaryViT]:
    """The rows as stage distil left them, on this device in eval mode."""
    module = auxiliary_rows(context.config, ancestry)
    module.load_state_dict(load_tensors(artifact.folder / "rows.safetensors"), strict=True)
    return list(module.to(context.workers.device).eval().rows)


def stitch_starts(context: Context, ancestry: Ancestry | None, rows: list[AuxiliaryViT]) -> Starts:
    """Where the recipe's `stitch_init` lets each stitch layer start; nothing for random, or for a pool of one row."""
    config, init = context.config, context.config.pool.stitch_init
    if init == "random" or not context.space.stitch_widths:
        return {}
    if init == "least_squares":
        return least_squares_starts(context.space, rows, clean_images(context), config.pool.ridge)
    levels = {level for row in rows for level in row.levels}
    means = ancestry_means(ancestry, levels, clean_images(context)) if levels and init == "transformation_pinv" else {}
    return transformation_starts(init, context.space, rows, means)


def clean_images(context: Context) -> Iterator[Tensor]:
    """`pool.samples` training images without augmentation, in batches [B, C, H, W]."""
    return (batch.images for batch in context.clean_batches(context.config.pool.samples))


def held_out_images(context: Context) -> Iterator[Tensor]:
    """HELD_OUT validation images, evenly spread over the split, in batches [B, C, H, W]."""
    data, device = context.config.data, context.workers.device
    index = open_split(data, data.val_split)
    for batch in evaluation_batches(index, data, 64, 0, 1, HELD_OUT, device):
        yield batch.images[batch.weight > 0]
