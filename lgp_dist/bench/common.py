"""What several benchmarks share: random models and batches of a recipe, timing in turns, statistics and checks."""

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from math import comb
from pathlib import Path
from statistics import median
from typing import Any

import torch

from lgp_dist.config.run_config import RunConfig, TrainConfig
from lgp_dist.engine.workers import Workers
from lgp_dist.errors import UserError
from lgp_dist.files import write_json
from lgp_dist.models.ancestry import Ancestry
from lgp_dist.models.build import ancestry_precision, build_ancestry, build_pool, prepare_ancestry
from lgp_dist.models.pool import LearngenePool
from lgp_dist.paths.space import space_of
from lgp_dist.protocols import Batch
from lgp_dist.run.checks import check_config
from lgp_dist.run.provenance import environment

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""By `engine.precision`."""


def random_pool(config: RunConfig, workers: Workers, *, training: bool) -> LearngenePool:
    """`build_pool` with the same random weights at every call and on every rank."""
    torch.manual_seed(config.seed)
    return build_pool(config, workers.device, training=training)


def random_ancestry(config: RunConfig, workers: Workers) -> Ancestry:
    """`build_ancestry` with the same random weights at every call and on every rank."""
    torch.manual_seed(config.seed)
    return build_ancestry(config, workers.device)


def finetune_models(config: RunConfig, workers: Workers) -> tuple[LearngenePool, Ancestry | None]:
    """The pool that stage finetune gives to the engine and, if it distils, the ancestry, with random weights."""
    pool, ancestry = random_pool(config, workers, training=True), None
    if config.teaches_paths:
        ancestry = prepare_ancestry(random_ancestry(config, workers), config, "finetune")
    return pool, ancestry


def micro_batch(config: RunConfig, train: TrainConfig, count: int, device: torch.device) -> Batch:
    """`count` random images with random labels; for 0 as many as a micro-step on one rank has."""
    data, count = config.data, count or max(1, train.batch_size // train.accumulate)
    images = torch.randn(count, data.channels, data.image_size, data.image_size)
    return Batch(images, torch.randint(data.num_classes, (count,)), torch.ones(count)).to(device)


def spread(values: Sequence[float]) -> float:
    """(Largest - smallest) / median of one number or more, rounded to 4 digits."""
    return round((max(values) - min(values)) / median(values), 4)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the median, whatever the distribution: two of the values, by their ranks.

    The median lies below the k-th smallest value only if fewer than k values lie below the median, and their number is
    binomial with probability 1/2. k is the largest for which either side has at most 2.5 %. Fewer than six values give
    the smallest and the largest, an interval of 50 to 94 %.
    """
    found, count = sorted(values), len(values)
    within = [
        cut for cut in range(1, count // 2 + 1) if sum(comb(count, below) for below in range(cut)) <= 0.025 * 2**count
    ]
    outside = max(within, default=1) - 1
    return round(found[outside], 4), round(found[count - 1 - outside], 4)


def of_rounds(ratios: Sequence[float]) -> dict[str, float]:
    """Median, spread and interval of a ratio that was taken in each round."""
    low, high = interval(ratios)
    return {"ratio": round(median(ratios), 4), "ratio_spread": spread(ratios), "ratio_low": low, "ratio_high": high}


def measured(config: RunConfig, workers: Workers) -> dict[str, Any]:
    """The fields of a recipe and a launch that say what a benchmark of stage finetune has measured."""
    finetune, train = config.finetune, config.finetune.train
    return {
        "recipe": config.recipe,
        "engine": workers.launch.engine_name,
        "reduction": config.engine.reduction,
        "policy": finetune.policy,
        "only": list(finetune.only),
        "ranks": workers.world,
        "micro_steps": train.accumulate,
        "paths_per_batch": finetune.paths_per_batch,
        "widths": list(space_of(config).widths),
        "image_size": config.data.image_size,
        "images": train.batch_size,
        "precision": config.engine.precision,
        "compile": config.engine.compile,
        "ancestry": ancestry_precision(config, "finetune") if config.teaches_paths else None,
        "threads": config.data.threads,
    }


def facts(device: torch.device | None = None) -> dict[str, Any]:
    """Machine, versions, commit and command. device: also its name, and torch's number of threads."""
    about = environment()
    machine = about["machine"] | {"platform": platform.platform()}
    if device is not None:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        machine |= {"device": name, "threads": torch.get_num_threads()}
    return about | {"machine": machine}


def check_least(option: str, value: int, least: int) -> None:
    """Raises UserError where an option's number is below the least that it may be."""
    if value < least:
        raise UserError(f"{option} is {value}, but must be {least} or more: choose another value.")


def interleaved(
    calls: Mapping[str, Callable[[], Any]], device: torch.device, repeats: int, warm_up: int = 2
) -> dict[str, list[float]]:
    """Seconds of `repeats` calls of each, in turns, so that a slow moment of the machine affects all of them.

    On a GPU by its own clock, each after a write that replaces the content of the L2 cache.
    """
    flush = torch.empty(2**26, dtype=torch.int32, device=device) if device.type == "cuda" else None
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(warm_up + repeats):
        for name, call in calls.items():
            took = _wall_clock(call) if flush is None else _gpu_clock(call, flush)
            if turn >= warm_up:
                seconds[name].append(took)
    return seconds


def _wall_clock(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _gpu_clock(call: Callable[[], Any], flush: torch.Tensor) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush.zero_()
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def ceilings(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """The highest rates measured on this device: FLOP/s of a large product in a dtype, and bytes/s of a large copy."""
    side, count = (8192, 2**29) if device.type == "cuda" else (1024, 2**24)
    matrix = torch.randn(side, side, device=device).to(dtype)
    source = torch.empty(count, dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    calls = {"product": lambda: matrix @ matrix, "copy": lambda: target.copy_(source)}
    best = {name: min(values) for name, values in interleaved(calls, device, 5).items()}
    return 2 * side**3 / best["product"], 8 * count / best["copy"]


def join(config: RunConfig, **numbers: int) -> Workers:
    """The processes of this launch; UserError where an option's number is below 1 or the recipe is refused."""
    for name, value in numbers.items():
        check_least("--" + name.replace("_", "-"), value, 1)
    check_config(config)
    return Workers.start(config.engine)


def one_process(config: RunConfig, batch: int, repeats: int) -> Workers:
    """`join` for a benchmark of one process; UserError under a launcher of several."""
    check_least("--batch", batch, 0)
    workers = join(config, repeats=repeats)
    if workers.world > 1:
        raise UserError(f"This benchmark is for one process, but {workers.world} run: start lgp without a launcher.")
    return workers


def wait(workers: Workers) -> None:
    """Waits until the devices of all ranks have finished their work."""
    if workers.device.type == "cuda":
        torch.cuda.synchronize()
    workers.barrier()


def leave(workers: Workers, out: Path, rows: list[dict[str, Any]]) -> None:
    """Rank 0 writes the objects; all ranks leave."""
    if workers.is_main:
        write_json(out, rows)
    workers.barrier()
    workers.close()
