"""Seconds that each path takes on this machine, for `finetune.costs`."""

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from lgp_dist.bench.common import check_least, chosen_device, facts, spread
from lgp_dist.config.run_config import RunConfig
from lgp_dist.engine.workers import autocast, choose_attention
from lgp_dist.errors import UserError
from lgp_dist.files import write_json
from lgp_dist.models.ancestry import Ancestry
from lgp_dist.models.build import ancestry_vit
from lgp_dist.models.pool import LearngenePool
from lgp_dist.paths.path import Space
from lgp_dist.paths.space import heads_of, space_of
from lgp_dist.run.checks import check_config

WARM_UP = 1
"""Rounds over all paths before the first that counts."""


def bench_paths(config: RunConfig, out: Path, batch: int = 0, repeats: int = 5) -> dict[str, Any]:
    """Measures every path of a recipe's pool and writes the table that `finetune.costs` reads.

    costs: seconds of forward and backward of one micro-step for each path, the median of `repeats` rounds over all
    paths, so that a slow moment of the machine meets all of them; spread: (slowest - fastest) / median of the same.
    ancestry: seconds of the ancestry's forward, null where it does not run. Weights and images are random.
    batch: images of a micro-step; 0 for the recipe's batch size over its micro-steps, one rank. UserError where a
    setting is out of range, the device is missing or the file cannot be written.
    """
    check_config(config)
    train = config.finetune.train
    for option, value, least in (("--batch", batch, 0), ("--repeats", repeats, 1)):
        check_least(option, value, least)
    if out.is_dir():
        raise UserError(f"--out {out} is a folder: name a file in it.")
    space, device = space_of(config), _device(config)
    images = batch or max(1, train.batch_size // train.accumulate)
    calls = _calls(config, space, device, images)
    seconds: dict[str, list[float]] = {key: [] for key in calls}
    for turn in range(WARM_UP + repeats):
        for key, call in calls.items():
            taken = _timed(call, device)
            if turn >= WARM_UP:
                seconds[key].append(taken)
    middle = {key: median(values) for key, values in seconds.items()}
    ancestry = middle.pop("ancestry", None)
    table = {
        "recipe": config.recipe,
        "precision": config.engine.precision,
        "batch": images,
        "repeats": repeats,
        "costs": {path.key: middle[path.key] for path in space.paths},
        "ancestry": ancestry,
        "spread": {key: spread(values) for key, values in seconds.items()},
        **facts(device),
    }
    write_json(out, table)
    return table


def _device(config: RunConfig) -> torch.device:
    device = chosen_device(config.engine.device, "--engine.device")
    if config.engine.threads:
        torch.set_num_threads(config.engine.threads)
    return device


def _calls(config: RunConfig, space: Space, device: torch.device, batch: int) -> dict[str, Callable[[], Any]]:
    """What is timed: a forward and backward of each path, by its key, and the ancestry's forward."""
    torch.manual_seed(config.seed)
    choose_attention(device.type, config.engine.precision)
    pool = LearngenePool.empty(space, heads_of(config)).to(device).train()
    images = torch.randn(batch, space.channels, space.image_size, space.image_size, device=device)
    targets = torch.randint(space.num_classes, (batch,), device=device)
    precision = config.engine.precision

    def path_call(path: Any) -> Callable[[], None]:
        def call() -> None:
            with autocast(device.type, precision):
                logits = pool(images, path)
            cross_entropy(logits.float(), targets).backward()
            pool.zero_grad(set_to_none=True)

        return call

    calls = {path.key: path_call(path) for path in space.paths}
    if config.finetune.distil_weight:
        own = config.engine.ancestry(config.finetune.ancestry_precision)
        ancestry = Ancestry(ancestry_vit(config)).to(device).prepare(own, config.engine.compile)
        calls["ancestry"] = lambda: ancestry(images)
    return calls


def _timed(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call, waiting for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def paths_line(table: dict[str, Any], out: Path) -> str:
    """One line on what was measured."""
    costs = table["costs"].values()
    return (
        f"{len(costs)} paths of {table['recipe']} on {table['machine']['device']}, batch {table['batch']}: "
        f"{1000 * min(costs):.2f} to {1000 * max(costs):.2f} ms; written to {out}"
    )
