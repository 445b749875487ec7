"""Stage descend: the best path within a budget, as a standalone model."""

import json
import logging
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lgp_dist.artifacts import save_tensors, write_json
from lgp_dist.config import Budget
from lgp_dist.errors import UserError
from lgp_dist.models.descendant import descendant_from_path
from lgp_dist.models.pool import LearngenePool
from lgp_dist.stages.context import Context

log = logging.getLogger("lgp")

LIMITS = {"params": "max_params", "flops": "max_flops", "latency_ms": "max_latency_ms"}
"""Field of a path's row and of the budget."""


def run(context: Context) -> None:
    """Writes descend/descendant.json and descend/model.safetensors."""
    began = time.monotonic()
    evaluated, tuned = context.require("evaluate"), context.require("finetune")
    rows = json.loads((evaluated.folder / "paths.json").read_text())
    budget = context.config.budget

    def fill(folder: Path) -> dict[str, Any]:
        pool = context.load_pool("finetune").cpu()
        if budget.max_latency_ms:
            for row in context.workers.watchdog.over(rows):
                row["latency_ms"] = latency_ms(context, pool, row["key"])
        chosen = choose(rows, budget)
        model = descendant_from_path(pool, context.heads, context.space.by_key(chosen["key"]))
        save_tensors(folder / "model.safetensors", model.state_dict())
        write_json(folder / "descendant.json", chosen)
        log.info("descend: %s, %d parameters, top-1 %.2f %%", chosen["key"], chosen["params"], chosen["top1"])
        return chosen

    context.write("descend", [evaluated, tuned], fill, time.monotonic() - began)


def choose(rows: list[dict[str, Any]], budget: Budget) -> dict[str, Any]:
    """The most accurate row within the budget, the cheaper of two equals; UserError naming the nearest if none is."""
    limits = {field: getattr(budget, name) for field, name in LIMITS.items() if getattr(budget, name)}

    def excess(row: dict[str, Any]) -> float:
        return max((row[field] / limit for field, limit in limits.items()), default=0.0)

    fitting = [row for row in rows if excess(row) <= 1.0]
    if fitting:
        return max(fitting, key=lambda row: (row["top1"], -row["flops"]))
    nearest = min(rows, key=excess)
    missed = "; ".join(
        f"{field} {nearest[field]:.6g} over --budget.{LIMITS[field].replace('_', '-')} {limit:.6g}"
        for field, limit in limits.items()
        if nearest[field] > limit
    )
    raise UserError(f"No path fits the budget; the nearest is {nearest['key']} ({missed}): raise the limit.")


@torch.no_grad()
def latency_ms(context: Context, pool: LearngenePool, key: str, repeats: int = 30) -> float:
    """Median milliseconds of one image on this machine's CPU, after a warm-up of a sixth as many."""
    data = context.config.data
    model: nn.Module = descendant_from_path(pool, context.heads, context.space.by_key(key))
    image = torch.zeros(1, data.channels, data.image_size, data.image_size)
    times = []
    for _ in range(repeats + repeats // 6):
        start = time.perf_counter()
        model(image)
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[-repeats:])
