"""Stage export: a descendant as a folder that loads anywhere, written only if it equals its path bit for bit."""

import json
import logging
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lgp_dist.artifacts import load_tensors, save_tensors, write_json
from lgp_dist.data.stream import evaluation_batches, open_split
from lgp_dist.models.descendant import descendant_from_path, load_descendant, timm_config
from lgp_dist.models.pool import LearngenePool
from lgp_dist.stages.context import Context

log = logging.getLogger("lgp")


def run(context: Context) -> None:
    """Writes export/config.json and export/model.safetensors."""
    began = time.monotonic()
    tuned, evaluated = context.require("finetune"), context.require("evaluate")
    inputs, key = [evaluated, tuned], context.config.export.path
    if not key:
        inputs.append(context.require("descend"))
        key = inputs[-1].facts["key"]
    path = context.space.by_key(key)
    rows = json.loads((evaluated.folder / "paths.json").read_text())
    facts = next(row for row in rows if row["key"] == key)

    def fill(folder: Path) -> dict[str, Any]:
        pool = context.load_pool("finetune").cpu()
        model = descendant_from_path(pool, context.heads, path)
        config = timm_config(context.space, context.heads, path, context.config.data)
        write_json(folder / "config.json", config | {"lgp": {**config["lgp"], "measured": facts, "pool": tuned.id}})
        save_tensors(folder / "model.safetensors", model.state_dict())
        difference = largest_difference(context, pool, key, folder)
        if difference != 0.0:
            raise RuntimeError(f"the exported model of {key} differs from its path by {difference}")
        log.info("export: %s, equal to its path on %d images", key, context.config.export.images)
        return {**facts, "largest_difference": difference}

    context.write("export", inputs, fill, time.monotonic() - began)


@torch.no_grad()
def largest_difference(context: Context, pool: LearngenePool, key: str, folder: Path) -> float:
    """Largest difference of a logit between the path and the model read back from its folder, on validation images."""
    data, path = context.config.data, context.space.by_key(key)
    model = load_descendant(
        json.loads((folder / "config.json").read_text()), load_tensors(folder / "model.safetensors")
    )
    batches = evaluation_batches(
        open_split(data, data.val_split), data, 64, rank=0, world=1, limit=context.config.export.images
    )
    differences: list[Tensor] = [
        (model(batch.images) - pool(batch.images, path=path)).abs().max()
        for batch in context.workers.watchdog.over(batches)
    ]
    return float(torch.stack(differences).max())
