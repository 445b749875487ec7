"""What all measurements share: their spread, what they were made with, and checks of their options."""

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from math import comb
from pathlib import Path
from statistics import median
from typing import Any

import torch

from lgp_dist.config.run_config import RunConfig
from lgp_dist.engine.workers import Workers
from lgp_dist.errors import UserError
from lgp_dist.files import write_json
from lgp_dist.run.checks import check_config
from lgp_dist.run.provenance import environment


def spread(values: Sequence[float]) -> float:
    """(Largest - smallest) / median of one number or more, rounded to 4 digits."""
    return round((max(values) - min(values)) / median(values), 4)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Of the median: two of the values that have it between them with at least 95 %, whatever their distribution.

    Of fewer than six numbers the smallest and the largest, which have it between them with 50 to 94 %.
    """
    found, count = sorted(values), len(values)
    within = [
        cut for cut in range(1, count // 2 + 1) if sum(comb(count, below) for below in range(cut)) <= 0.025 * 2**count
    ]
    outside = max(within, default=1) - 1
    return round(found[outside], 4), round(found[count - 1 - outside], 4)


def of_rounds(ratios: Sequence[float]) -> dict[str, float]:
    """What a benchmark says of a ratio that it took in each round."""
    low, high = interval(ratios)
    return {
        "ratio": round(median(ratios), 4),
        "ratio_spread": spread(ratios),
        "ratio_low": low,
        "ratio_high": high,
    }


def facts(device: torch.device | None = None) -> dict[str, Any]:
    """Machine, versions, commit and command; of what computes on a device, its name and torch's threads too."""
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


def chosen_device(wanted: str, option: str) -> torch.device:
    """The GPU if there is one and `wanted` is not cpu; UserError where cuda is wanted and there is none."""
    there = torch.cuda.is_available()
    if wanted == "cuda" and not there:
        raise UserError(f"{option} is cuda, but this machine shows no GPU: pass {option} cpu.")
    return torch.device("cuda" if there and wanted != "cpu" else "cpu")


def in_turns(
    calls: Mapping[str, Callable[[], Any]], device: torch.device, repeats: int, warm_up: int = 2
) -> dict[str, list[float]]:
    """Seconds of `repeats` calls of each, taking turns, so that a slow moment of the machine meets all of them.

    On a GPU by its own clock, each after a write that leaves nothing of its inputs in the L2 cache.
    """
    flush = torch.empty(2**26, dtype=torch.int32, device=device) if device.type == "cuda" else None
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(warm_up + repeats):
        for name, call in calls.items():
            took = _by_the_clock(call) if flush is None else _by_the_card(call, flush)
            if turn >= warm_up:
                seconds[name].append(took)
    return seconds


def _by_the_clock(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _by_the_card(call: Callable[[], Any], flush: torch.Tensor) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush.zero_()
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def ceilings(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """The most that this device was seen to do: FLOP/s of a large product in a dtype, and bytes/s of a large copy."""
    side, count = (8192, 2**29) if device.type == "cuda" else (1024, 2**24)
    matrix = torch.randn(side, side, device=device).to(dtype)
    source = torch.empty(count, dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    calls = {"product": lambda: matrix @ matrix, "copy": lambda: target.copy_(source)}
    best = {name: min(values) for name, values in in_turns(calls, device, 5).items()}
    return 2 * side**3 / best["product"], 8 * count / best["copy"]


def as_table(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    """Some fields of objects as lines of text under their names."""
    lines = [list(names), *([str(row[name]) for name in names] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(names))]
    cells = ([cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines)
    return "\n".join("  ".join(line).rstrip() for line in cells)


def join(config: RunConfig, **numbers: int) -> Workers:
    """The processes of this launch; UserError where an option's number is below 1, or the recipe is refused."""
    for name, value in numbers.items():
        check_least("--" + name.replace("_", "-"), value, 1)
    check_config(config)
    return Workers.start(config.engine)


def wait(workers: Workers) -> None:
    """Until all ranks' devices have done what they were given."""
    if workers.device.type == "cuda":
        torch.cuda.synchronize()
    workers.barrier()


def leave(workers: Workers, out: Path, rows: list[dict[str, Any]]) -> None:
    """Rank 0 writes the objects; all ranks leave."""
    if workers.is_main:
        write_json(out, rows)
    workers.barrier()
    workers.close()
