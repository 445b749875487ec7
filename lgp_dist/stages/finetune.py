"""Stage finetune: all paths of the pool, each rank on its own."""

import time
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from lgp_dist.artifacts import save_tensors
from lgp_dist.sampling import PathSampler
from lgp_dist.stages.context import Context
from lgp_dist.tasks.finetune import FinetuneTask


def run(context: Context) -> None:
    """Writes finetune/pool.safetensors."""
    began, config = time.monotonic(), context.config.finetune
    inputs = [context.require("ancestry"), context.require("pool")]
    ancestry = context.load_ancestry() if config.distil_weight else None
    pool = context.load_pool("pool")
    context.seed("finetune")
    sampler = PathSampler(context.space.paths, config.policy, context.config.seed)
    training = context.train(
        "finetune",
        FinetuneTask(pool, ancestry, sampler, config),
        config.train,
        gradients=config.gradients,
        watch=partial(measure, context),
        watch_every=config.watch_every,
    )

    def fill(folder: Path) -> dict[str, Any]:
        save_tensors(folder / "pool.safetensors", pool.state_dict())
        return {"training": training, "policy": config.policy}

    context.write("finetune", inputs, fill, time.monotonic() - began)


def measure(context: Context, pool: nn.Module) -> dict[str, float]:
    """Top-1 of every path while the pool trains, on a part of the validation split, as `top1/KEY`."""
    forwards = {path.key: partial(pool, path=path) for path in context.space.paths}
    found = context.accuracies(forwards, context.config.finetune.watch_images)
    return {f"top1/{key}": top1 for key, (top1, _) in found.items()}
