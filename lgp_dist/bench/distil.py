"""Distilling all auxiliary models in one pass over the ancestry, against one run for each."""

from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from lgp_dist.bench.common import as_table, check_least, chosen_device, facts, in_turns, of_rounds, spread
from lgp_dist.config.run_config import RunConfig
from lgp_dist.engine.optim import build_optimizer
from lgp_dist.engine.workers import autocast, choose_attention
from lgp_dist.models.ancestry import Ancestry
from lgp_dist.models.auxiliary import AuxiliaryRows, build_rows
from lgp_dist.models.build import ancestry_vit
from lgp_dist.paths.cost import TRAINING, ancestry_flops
from lgp_dist.paths.stitched import PathSpace
from lgp_dist.protocols import Batch, StepContext
from lgp_dist.run.checks import check_config
from lgp_dist.stages.distil import decays
from lgp_dist.tasks.distil import DistilTask


def bench_distil(config: RunConfig, batch: int = 0, repeats: int = 5) -> list[dict[str, Any]]:
    """Steps of stage distil on random images: all rows together, and each row in a run of its own.

    One object: together_ms (a step), apart_ms (a step of every run, summed), ratio (median over `repeats` rounds of
    together over apart of the same round) with ratio_spread, ratio_low to ratio_high (`figures.interval`) and spread
    (of together), and by_arithmetic: the same from multiply-adds, 3 forwards for a row's forward and backward,
    transformations left out; null where the ancestry's size is not known. A step is the task's forwards (the ancestry's
    too), backward and AdamW's step. batch: images; 0 for the recipe's in a micro-step. UserError where a number is out
    of range.
    """
    check_config(config)
    for option, value, least in (("--batch", batch, 0), ("--repeats", repeats, 1)):
        check_least(option, value, least)
    device, space = chosen_device(config.engine.device, "--engine.device"), PathSpace.from_config(config)
    train = config.distil.train
    images = batch or max(1, train.batch_size // train.accumulate)
    torch.manual_seed(config.seed)
    shape = (images, space.channels, space.image_size, space.image_size)
    data = Batch(torch.randn(shape), torch.randint(space.num_classes, (images,)), torch.ones(images)).to(device)
    rows = range(len(config.model.rows))
    together = _step(config, space, tuple(rows), data)
    alone = [_step(config, space, (row,), data) for row in rows]
    calls = {"together": together, "apart": lambda: [step() for step in alone]}
    seconds = in_turns(calls, device, repeats)
    ratios = [one / many for one, many in zip(seconds["together"], seconds["apart"], strict=True)]
    row = {
        "recipe": config.recipe,
        "precision": config.engine.precision,
        "ancestry": config.engine.ancestry(config.distil.ancestry_precision),
        "compile": config.engine.compile,
        "widths": list(space.widths),
        "image_size": space.image_size,
        "batch": images,
        "together_ms": round(1e3 * median(seconds["together"]), 3),
        "apart_ms": round(1e3 * median(seconds["apart"]), 3),
        "spread": spread(seconds["together"]),
    }
    return [row | of_rounds(ratios) | {"by_arithmetic": by_arithmetic(config, space)} | facts(device)]


def by_arithmetic(config: RunConfig, space: PathSpace) -> float | None:
    """Multiply-adds of one pass over the ancestry and all rows, over those of a pass for each row."""
    teacher = ancestry_flops(config)
    if teacher is None:
        return None
    rows = [TRAINING * space.cost(path).flops for path in space.paths[: len(space.widths)]]
    return round((teacher + sum(rows)) / (len(rows) * teacher + sum(rows)), 4)


def _step(config: RunConfig, space: PathSpace, rows: tuple[int, ...], batch: Batch) -> Callable[[], None]:
    """One optimizer step of a run that distils some rows."""
    device, engine, train = batch.images.device, config.engine, config.distil.train
    torch.manual_seed(config.seed)
    choose_attention(device.type, engine.precision)
    ancestry = Ancestry(ancestry_vit(config)).to(device)
    every = build_rows(space, config.model.rows, config.distil, ancestry.depth, ancestry.vit.embed_dim)
    ancestry.prepare(engine.ancestry(config.distil.ancestry_precision), engine.compile)
    module = AuxiliaryRows([every[row] for row in rows]).to(device).train()
    task, optimizer = DistilTask(module, ancestry, config.distil), build_optimizer(module, train, decays)

    def step() -> None:
        with autocast(device.type, engine.precision):
            loss = task.losses(module, batch, StepContext(0, 0, 0, 1))["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def distil_table(rows: list[dict[str, Any]]) -> str:
    """The objects of `bench_distil` as text."""
    names = ("recipe", "precision", "batch", "together_ms", "apart_ms", "spread", "ratio", "ratio_low", "ratio_high")
    return as_table(rows, (*names, "by_arithmetic"))
