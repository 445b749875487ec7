"""Throughput of stage finetune on this launch, and where the time of its steps goes."""

from pathlib import Path
from statistics import median
from typing import Any

import torch

from lgp_dist.bench.common import DTYPES, ceilings, facts, join, leave, measured, spread
from lgp_dist.bench.loop.interleave import Finetuning, InterleavedBatches
from lgp_dist.bench.loop.phases import PHASES, Clock, advice, watch_exchange
from lgp_dist.config.run_config import RunConfig
from lgp_dist.engine.comm_stats import peak_bytes, reset_peak
from lgp_dist.paths.cost import ancestry_forward

PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "L40S": 362e12,
    "A100": 312e12,
    "A10G": 70e12,
    "A10": 125e12,
    "L4": 121e12,
}
"""FLOP/s of dense bf16 and fp16 products by NVIDIA's data sheets, for the first name that is part of the device's."""
WARM_UP = 2
"""Steps of a block that are not timed."""
COLUMNS = (
    ("recipe", "engine", "policy", "ranks", "images_per_s", "spread", "step_ms", "peak_mb", "mfu", "of_product"),
    tuple(f"{name}_ms" for name in (*PHASES, "transfer", "skew")),
)


def peak_of(device: str, precision: str) -> float | None:
    """FLOP/s of a known GPU at a precision; None for others, for CPUs and for fp32."""
    if precision == "fp32":
        return None
    return next((rate for name, rate in PEAKS.items() if name in device), None)


def bench_train(config: RunConfig, out: Path, rounds: int = 5, steps: int = 24) -> list[dict[str, Any]]:
    """Fine-tunes a recipe's pool, with random weights, on its shards in the whole loop; rank 0 writes a list of one.

    Blocks of `steps` without and with a clock take turns. Without: images_per_s of all ranks, where an image that takes
    two paths counts twice, median over rounds, and spread ((most - least) / median). With, in ms of a mean step and
    rank: data, forward, backward, exchange, optimizer and loop (`phases`), and two parts of exchange: transfer, what
    the rank that came last took, and skew, what the others waited for it.

    peak_mb: largest over ranks. mfu: 2 x multiply-adds of a step (three forwards of a path, one of the ancestry) a
    second, over the GPU's rate by its data sheet; null where that is not known. of_product: the same over the fastest
    matrix product measured on this device; null where the ancestry's size is not known. advice: the largest waste and
    what to change. UserError where a number is below 1 or the recipe is refused.
    """
    workers = join(config, rounds=rounds, steps=steps)
    bench, clock = Finetuning(config, workers), Clock(workers.device)
    quiet: list[tuple[float, float]] = []
    parts: list[dict[str, float]] = []
    peak, _ = ceilings(workers.device, DTYPES[config.engine.precision])

    def begins(kind: str) -> None:
        if kind == "clock":
            reset_peak(workers.device)
            clock.start()

    def ended(kind: str, numbers: range, seconds: float) -> None:
        if kind == "clock":
            parts.extend(clock.stop())
        else:
            quiet.append((seconds, bench.multiply_adds(numbers)))

    kinds, size = ("quiet", "clock"), (rounds, steps, WARM_UP)
    batches = InterleavedBatches(bench.batches, bench.train.accumulate, kinds, size, bench.wait, begins, ended)
    task = bench.task()
    if workers.world > 1:
        watch_exchange(task, clock)
    bench.run(task, batches, clock)
    rows = [_row(bench, quiet[1:], parts[steps:], peak, steps)]
    leave(workers, out, rows)
    return rows


def _row(
    bench: Finetuning, quiet: list[tuple[float, float]], parts: list[dict[str, float]], peak: float, steps: int
) -> dict[str, Any]:
    workers, train = bench.workers, bench.train
    seconds = [took for took, _ in quiet]
    per_s = steps * bench.images / median(seconds)
    phases = over_ranks(bench, parts)
    teacher = ancestry_forward(bench.config)
    rate = None
    if teacher is not None:
        forwards = bench.stream.per_rank * (train.accumulate // bench.config.finetune.paths_per_batch) * steps
        rate = median(2 * (work + forwards * teacher) / took for took, work in quiet)
    highest = workers.highest([peak_bytes(workers.device) / 2**20])[0]
    found = facts(workers.device)
    known = peak_of(found["machine"]["device"], bench.config.engine.precision)
    row = measured(bench.config, workers) | {
        "images_per_s": round(per_s, 2),
        "spread": spread(seconds),
        "step_ms": round(1e3 * median(seconds) / steps, 3),
        **{f"{name}_ms": round(1e3 * value, 3) for name, value in phases.items()},
        "peak_mb": round(highest, 1),
        "tflops_per_rank": None if rate is None else round(rate / 1e12, 5),
        "mfu": None if rate is None or known is None else round(rate / known, 4),
        "of_product": None if rate is None else round(rate / peak, 4),
    }
    return row | {"advice": advice(row)} | found


def over_ranks(bench: Finetuning, parts: list[dict[str, float]]) -> dict[str, float]:
    """Seconds of each phase in a mean step and rank, with transfer and skew. parts: of this rank, by step."""
    table = torch.tensor(bench.workers.gather([[part[name] for name in PHASES] for part in parts]), dtype=torch.float64)
    means = dict(zip(PHASES, table.mean((0, 1)).tolist(), strict=True))
    exchange = table[:, :, PHASES.index("exchange")]
    transfer = float(exchange.min(0).values.mean())
    return means | {"transfer": transfer, "skew": means["exchange"] - transfer}
