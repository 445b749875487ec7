"""Stage finetune: all paths of the pool, each rank on its own."""

import time
from pathlib import Path
from typing import Any

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
    training = context.train("finetune", FinetuneTask(pool, ancestry, sampler, config), config.train)

    def fill(folder: Path) -> dict[str, Any]:
        save_tensors(folder / "pool.safetensors", pool.state_dict())
        return {"training": training, "policy": config.policy}

    context.write("finetune", inputs, fill, time.monotonic() - began)
