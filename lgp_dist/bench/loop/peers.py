"""The project's loop of stage finetune against others', in turns inside one run."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from statistics import fmean, median
from typing import Any

from lgp_dist.bench.common import as_table, check_least, facts, join, leave, of_rounds, spread
from lgp_dist.bench.loop.interleave import Finetuning, Turns
from lgp_dist.bench.loop.train import WARM_UP, about
from lgp_dist.bench.loop.train_loops import RIVALS, own_draws
from lgp_dist.config.run_config import RunConfig
from lgp_dist.engine.watch.watchdog import Watchdog
from lgp_dist.errors import UserError
from lgp_dist.paths.cost import TRAINING
from lgp_dist.paths.stitched import PathSpace
from lgp_dist.protocols import Batch

KEPT = 8
"""Batches in memory for `bare`."""


def bench_peers(
    config: RunConfig, out: Path, peers: Sequence[str] = (), workers: int = 1, rounds: int = 5, steps: int = 24
) -> list[dict[str, Any]]:
    """Trains a recipe's pool, with random weights, in the project's loop and in others; rank 0 writes a list.

    peers: of `peers.RIVALS`, empty for all that can be on these ranks; `bare` is for one process. For `timm` both train
    the widest row alone without the ancestry. workers: a DataLoader's processes on a rank; the project's loader has
    data.threads. In each round either trains a block of `steps` steps. One object for each peer: images_per_s and
    peer_images_per_s (of all ranks, medians) with spread and peer_spread, ratio (median over rounds of how often as
    fast the project is in the same round) with ratio_spread and ratio_low to ratio_high (`figures.interval`); and by
    arithmetic gmacs and peer_gmacs (of an image's path in forward and backward, ancestry left out), since other paths
    are drawn where the policy is not `independent`.
    UserError for a peer that is none or cannot be on these ranks, and where a number is below 1 (workers: 0).
    """
    check_least("--workers", workers, 0)
    for name in peers:
        if name not in RIVALS:
            raise UserError(f"--peers names {name!r}, which is none: choose from {', '.join(RIVALS)}.")
    bench = Finetuning(config, join(config, rounds=rounds, steps=steps))
    world = bench.workers.world
    if "bare" in peers and world > 1:
        raise UserError(f"--peers names bare, which is for one process, but {world} run: start lgp without a launcher.")
    chosen = tuple(peers) or tuple(name for name in RIVALS if name != "bare" or world == 1)
    rows = [_against(_of(bench, name), name, workers, rounds, steps) for name in chosen]
    leave(bench.workers, out, rows)
    return rows


def _of(bench: Finetuning, peer: str) -> Finetuning:
    """What the project trains beside a peer: for timm the widest row alone, without an ancestry."""
    if peer != "timm":
        return bench
    widest = PathSpace.from_config(bench.config).paths[len(bench.config.model.rows) - 1].key
    finetune = replace(bench.config.finetune, only=(widest,), distil_weight=0.0, paths_per_batch=1)
    return Finetuning(replace(bench.config, finetune=finetune), bench.workers)


def _against(bench: Finetuning, peer: str, workers: int, rounds: int, steps: int) -> dict[str, Any]:
    kept = [replace(batch, facts={}) for batch in islice(bench.batches(0, KEPT), KEPT)] if peer == "bare" else []
    rival = RIVALS[peer](bench, workers, kept)
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
        theirs.append(rival.run(numbers, WARM_UP))

    turns = Turns(
        memory if kept else bench.batches,
        bench.train.accumulate,
        ("lgp",),
        (rounds, steps, WARM_UP),
        bench.wait,
        lambda kind: None,
        ended,
    )
    bench.run(bench.task(), turns, Watchdog.off())
    ours, theirs, done = ours[1:], theirs[1:], done[1:]
    ratios = [other / mine for mine, other in zip(ours, theirs, strict=True)]
    count = steps * bench.images
    macs = sum(bench.multiply_adds(numbers)[0] for numbers in done) * bench.workers.world / len(done) / count
    return (
        {"peer": peer, "workers": workers}
        | about(bench)
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
    """Multiply-adds of an image's path in forward and backward, mean over what ranks draw alone in these steps."""
    own, world = own_draws(bench), bench.workers.world
    paths = [own.draw(step, 0, rank, world) for numbers in done for step in numbers for rank in range(world)]
    return fmean(TRAINING * bench.space.cost(path).flops for path in paths)


def peers_table(rows: list[dict[str, Any]]) -> str:
    """The objects of `bench_peers` as text."""
    names = ("peer", "recipe", "engine", "policy", "ranks", "threads", "workers", "images_per_s", "peer_images_per_s")
    return as_table(rows, (*names, "ratio", "ratio_low", "ratio_high", "gmacs", "peer_gmacs"))
