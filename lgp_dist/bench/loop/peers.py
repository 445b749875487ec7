"""The project's loop of stage finetune compared with other training loops, in turns inside one run."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from statistics import fmean, median
from typing import Any

from lgp_dist.bench.common import check_least, facts, join, leave, measured, of_rounds, spread
from lgp_dist.bench.loop.interleave import Finetuning, InterleavedBatches
from lgp_dist.bench.loop.train import WARM_UP
from lgp_dist.bench.loop.train_loops import TRAIN_LOOPS, independent_sampler
from lgp_dist.bench.sampler import parse_names
from lgp_dist.config.run_config import RunConfig
from lgp_dist.engine.watch.watchdog import Watchdog
from lgp_dist.errors import UserError
from lgp_dist.paths.cost import TRAINING
from lgp_dist.protocols import Batch

KEPT = 8
"""Batches in memory for `bare`."""
COLUMNS = (
    ("peer", "recipe", "engine", "policy", "ranks", "threads", "workers", "images_per_s", "peer_images_per_s")
    + ("ratio", "ratio_low", "ratio_high", "gmacs", "peer_gmacs"),
)


def bench_peers(
    config: RunConfig, out: Path, peers: str = "", workers: int = 1, rounds: int = 5, steps: int = 24
) -> list[dict[str, Any]]:
    """Trains a recipe's pool, with random weights, in the project's loop and in others; rank 0 writes a list.

    peers: names in `train_loops.TRAIN_LOOPS`, separated by commas; empty for all that can run on these ranks. `bare` is
    for one process. For `timm` both loops train the widest row alone without the ancestry. workers: processes of a
    DataLoader on each rank; the project's loader has data.threads. In each round each loop trains a block of `steps`.

    Of each peer: images_per_s and peer_images_per_s of all ranks, medians, with spread and peer_spread; ratio, the
    project's speed over the peer's in the same round, median over rounds, with ratio_spread and ratio_low to ratio_high
    (`common.interval`); and, by arithmetic, gmacs and peer_gmacs of an image's path in forward and backward without the
    ancestry, since the two draw different paths unless the policy is `independent`.

    UserError for a peer that is unknown or cannot run on these ranks, and where a number is below 1 (workers: 0).
    """
    check_least("--workers", workers, 0)
    names = parse_names("--peers", peers, TRAIN_LOOPS)
    bench = Finetuning(config, join(config, rounds=rounds, steps=steps))
    world = bench.workers.world
    if "bare" in names and world > 1:
        raise UserError(f"--peers names bare, which is for one process, but {world} run: start lgp without a launcher.")
    chosen = names or tuple(name for name in TRAIN_LOOPS if name != "bare" or world == 1)
    rows = [_compared(_ours(bench, name), name, workers, rounds, steps) for name in chosen]
    leave(bench.workers, out, rows)
    return rows


def _ours(bench: Finetuning, peer: str) -> Finetuning:
    """What the project trains when it is compared with a peer: for timm the widest row alone, without an ancestry."""
    if peer != "timm":
        return bench
    widest = bench.space.paths[len(bench.config.model.rows) - 1].key
    finetune = replace(bench.config.finetune, only=(widest,), distil_weight=0.0, paths_per_batch=1)
    return Finetuning(replace(bench.config, finetune=finetune), bench.workers)


def _compared(bench: Finetuning, peer: str, workers: int, rounds: int, steps: int) -> dict[str, Any]:
    kept = [replace(batch, facts={}) for batch in islice(bench.batches(0, KEPT), KEPT)] if peer == "bare" else []
    loop = TRAIN_LOOPS[peer](bench, workers, kept)
    ours: list[float] = []
    theirs: list[float] = []
    done: list[range] = []

    def memory(first: int, count: int) -> Iterator[Batch]:
        accumulate = bench.train.accumulate
        for number in range(first * accumulate, (first + count) * accumulate):
            yield kept[number % len(kept)]

    def ended(kind: str, numbers: range, seconds: float) -> None:
        ours.append(seconds)
        done.append(numbers)
        theirs.append(loop.run(numbers, WARM_UP))

    batches = InterleavedBatches(
        memory if kept else bench.batches,
        bench.train.accumulate,
        ("lgp",),
        (rounds, steps, WARM_UP),
        bench.wait,
        lambda kind: None,
        ended,
    )
    bench.run(bench.task(), batches, Watchdog.off())
    ours, theirs, done = ours[1:], theirs[1:], done[1:]
    ratios = [other / mine for mine, other in zip(ours, theirs, strict=True)]
    count = steps * bench.images
    macs = fmean(map(bench.multiply_adds, done)) * bench.workers.world / count
    return (
        {"peer": peer, "workers": workers}
        | measured(bench.config, bench.workers)
        | {
            "images_per_s": round(count / median(ours), 2),
            "spread": spread(ours),
            "peer_images_per_s": round(count / median(theirs), 2),
            "peer_spread": spread(theirs),
        }
        | of_rounds(ratios)
        | {
            "gmacs": round(macs / 1e9, 6),
            "peer_gmacs": round((_drawn(bench, done) if peer == "snnet" else macs) / 1e9, 6),
        }
        | facts(bench.workers.device)
    )


def _drawn(bench: Finetuning, done: list[range]) -> float:
    """Multiply-adds of an image's path in forward and backward, mean over what `snnet` draws in these steps."""
    sampler, world = independent_sampler(bench), bench.workers.world
    paths = [sampler.draw(step, 0, rank, world) for numbers in done for step in numbers for rank in range(world)]
    return fmean(TRAINING * bench.space.cost(path).flops for path in paths)
