"""Distilling all auxiliary models with one forward of the ancestry, compared with a run for each of them."""

from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from lgp_dist.bench.common import facts, interleaved, micro_batch, of_rounds, one_process, spread
from lgp_dist.config.run_config import RunConfig
from lgp_dist.engine.optim import build_optimizer
from lgp_dist.engine.trainer import prepare_module
from lgp_dist.engine.workers import Workers
from lgp_dist.errors import UserError
from lgp_dist.models.build import ancestry_precision, auxiliary_rows, build_ancestry
from lgp_dist.paths.cost import TRAINING, ancestry_flops, trained_rows_flops
from lgp_dist.protocols import Batch, StepContext
from lgp_dist.stages.distil import decays
from lgp_dist.tasks.distil import distil_task

COLUMNS = (
    ("recipe", "precision", "batch", "together_ms", "apart_ms", "spread", "ratio", "ratio_low", "ratio_high")
    + ("by_arithmetic",),
)


def bench_distil(config: RunConfig, batch: int = 0, repeats: int = 5) -> list[dict[str, Any]]:
    """Steps of stage distil on random images: all rows together, and each row in a run of its own.

    Returns one object: together_ms of a step and apart_ms of a step of every run, summed; spread of together;
    ratio, the median over `repeats` rounds of together over apart in the same round, with ratio_spread and ratio_low
    to ratio_high (`common.interval`); and by_arithmetic, the same ratio in multiply-adds. A step is the task's forwards
    with the ancestry's, backward and the optimizer's step. batch: images; 0 for the recipe's in a micro-step. UserError
    where a number is out of range, no row is trained or there are several processes.
    """
    workers = one_process(config, batch, repeats)
    rows = [index for index, row in enumerate(config.model.rows) if row.trains]
    if not rows:
        raise UserError("model.rows has no row that stage distil trains: choose a recipe with a source such as distil.")
    data = micro_batch(config, config.distil.train, batch, workers.device)
    together = _step(config, workers, rows, data)
    alone = [_step(config, workers, [row], data) for row in rows]
    calls = {"together": together, "apart": lambda: [step() for step in alone]}
    seconds = interleaved(calls, workers.device, repeats)
    ratios = [one / many for one, many in zip(seconds["together"], seconds["apart"], strict=True)]
    row = {
        "recipe": config.recipe,
        "precision": config.engine.precision,
        "ancestry": ancestry_precision(config, "distil"),
        "compile": config.engine.compile,
        "widths": [row.width for row in config.model.rows],
        "image_size": config.data.image_size,
        "batch": len(data.images),
        "together_ms": round(1e3 * median(seconds["together"]), 3),
        "apart_ms": round(1e3 * median(seconds["apart"]), 3),
        "spread": spread(seconds["together"]),
    }
    workers.close()
    return [row | of_rounds(ratios) | {"by_arithmetic": by_arithmetic(config)} | facts(workers.device)]


def by_arithmetic(config: RunConfig) -> float | None:
    """Multiply-adds of a step of all rows over those of a step for each; None where the ancestry's size is not known.

    A row's forward and backward count as three forwards. Transformations are left out.
    """
    forward, rows = ancestry_flops(config), TRAINING * trained_rows_flops(config)
    if forward is None:
        return None
    distilled = sum(row.source == "distil" for row in config.model.rows)
    return round((min(1, distilled) * forward + rows) / (distilled * forward + rows), 4)


def _step(config: RunConfig, workers: Workers, rows: list[int], batch: Batch) -> Callable[[], None]:
    """One optimizer step of a run that distils some rows."""
    torch.manual_seed(config.seed)
    ancestry = build_ancestry(config, workers.device)
    every = auxiliary_rows(config, ancestry).rows
    task = distil_task(config, [every[row] for row in rows], ancestry)
    module = task.module.to(workers.device).train()
    optimizer = build_optimizer(module, config.distil.train, decays)
    prepare_module(module, workers)

    def step() -> None:
        with workers.autocast():
            loss = task.losses(module, batch, StepContext(0, 0, 0, 1))["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step
