"""`lgp bench`: arguments and what they call."""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lgp_dist.cli.recipe import Recipe

Rows = list[dict[str, Any]]
Result = tuple[Rows, Callable[[Rows], str]]
"""What was measured, and what makes text of it."""


@dataclass(frozen=True, kw_only=True)
class Compared:
    """What every benchmark takes."""

    compare: Path | None = None
    """File of an earlier result of this benchmark: also print ratios to it."""
    json: bool = False
    """Print a list of objects in place of a table."""


@dataclass(frozen=True, kw_only=True)
class BenchSampler(Compared):
    """Work, coverage and shares of each policy, by arithmetic."""

    recipe: str = "pool12"
    """Name of a recipe, or several, separated by commas."""
    ranks: str = "1,2,8,64,1024"
    """Numbers of ranks, separated by commas."""
    micro_steps: str = "1,2,4"
    """Numbers of micro-steps of a step, separated by commas."""
    policies: str = ""
    """Policies, separated by commas; empty for all."""
    meet: Literal["step", "micro_step"] = "step"
    """Where ranks wait for each other, as --finetune.meet."""
    steps: int = 0
    """Steps to look at; 0 for as many as 60,000 draws need, from 200 to 4,000."""
    seed: int = 0
    """Of the schedule."""


@dataclass(frozen=True, kw_only=True)
class BenchPaths(Compared):
    """Measure seconds of every path on this machine, for --finetune.costs."""

    recipe: Recipe
    out: Path
    """File to write."""
    batch: int = 0
    """Images of a micro-step; 0 for the recipe's, on one rank."""
    repeats: int = 5
    """Rounds over all paths; the median counts."""


@dataclass(frozen=True, kw_only=True)
class BenchEngine(Compared):
    """Time, bytes and memory of a step on this launch's engine: one shared path against a path for every rank."""

    recipe: Recipe
    out: Path
    """File to write: a JSON list of objects."""
    rounds: int = 5
    """Rounds over the policies; the median counts."""
    steps: int = 24
    """Optimizer steps of each policy in a round."""


@dataclass(frozen=True, kw_only=True)
class BenchCheckpoint(Compared):
    """What a checkpoint costs on this launch's engine: in the background, as runs write it, and waited for."""

    recipe: Recipe
    out: Path
    """File to write: a JSON list of objects. Checkpoints are written beside it."""
    rounds: int = 5
    """Saves of either kind; the median counts."""
    steps: int = 8
    """Optimizer steps before each save, which say what a step takes without one."""


@dataclass(frozen=True, kw_only=True)
class BenchOp(Compared):
    """The fused operations: checked against float64 on this device, then timed beside eager and compiled ones."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes the GPU if there is one."""
    batch: int = 128
    """Images of 197 tokens."""
    repeats: int = 20
    """Rounds over the ways; the median counts."""


@dataclass(frozen=True, kw_only=True)
class BenchStep(Compared):
    """Paths of a recipe on eager, compiled and fused blocks, and several paths for one forward of the ancestry."""

    recipe: Recipe
    batch: int = 0
    """Images; 0 for the recipe's in a micro-step."""
    repeats: int = 5
    """Rounds over the ways; the median counts."""
    compiled: bool = True
    """Also what torch.compile makes, which takes minutes to compile on a CPU."""


@dataclass(frozen=True, kw_only=True)
class BenchData(Compared):
    """Images per CPU second of this loader and its index, and of others, on generated photographs."""

    folder: Path
    """Folder of the photographs' shards; --photos makes it."""
    photos: str = ""
    """Folders with photographs to make them from, separated by commas; empty if --folder has them already."""
    samples: int = 4000
    """Images to make."""
    loaders: str = ""
    """Loaders, separated by commas; empty for all that are installed."""
    threads: int = 2
    """Threads or worker processes."""
    batch: int = 128
    """Images of a batch."""
    repeats: int = 3
    """Rounds over all loaders; the median counts."""


@dataclass(frozen=True, kw_only=True)
class BenchTrain(Compared):
    """Throughput of stage finetune on this launch, where the time of its steps goes, and what to change."""

    recipe: Recipe
    out: Path
    """File to write: a JSON list of one object."""
    rounds: int = 5
    """Rounds, each of a block without and one with a clock; the median counts."""
    steps: int = 24
    """Optimizer steps of a block."""


@dataclass(frozen=True, kw_only=True)
class BenchPeers(Compared):
    """The loop of stage finetune against others' in turns: a bare loop, SN-Net's way, timm's loop."""

    recipe: Recipe
    out: Path
    """File to write: a JSON list of objects."""
    peers: str = ""
    """bare (one process alone), snnet, timm, separated by commas; empty for all that can be."""
    workers: int = 1
    """Worker processes of the others' DataLoader on each rank; this project's loader has data.threads."""
    rounds: int = 5
    """Rounds over both; the median counts."""
    steps: int = 24
    """Optimizer steps of a block."""


@dataclass(frozen=True, kw_only=True)
class BenchDistil(Compared):
    """Distilling all rows in one pass over the ancestry, against a run for each row."""

    recipe: Recipe
    batch: int = 0
    """Images; 0 for the recipe's in a micro-step."""
    repeats: int = 5
    """Rounds over both; the median counts."""


@dataclass(frozen=True, kw_only=True)
class BenchScaling(Compared):
    """Steps on many ranks, by a model that is fitted to steps on one and two and judged by those on more."""

    recipe: Recipe
    measured: str
    """Files of `lgp bench engine`, separated by commas; scripts/bench_scaling makes them."""
    ranks: str = "1,2,4,8,16,64,256,1024"
    """Numbers of ranks to predict, separated by commas."""
    policies: str = ""
    """Policies, separated by commas; empty for all."""
    images: int = 0
    """Images of a rank's micro-step; 0 for the recipe's on one rank."""


def _bench_sampler(action: BenchSampler) -> Result:
    from lgp_dist.bench import sampler

    rows = sampler.bench_sampler(
        action.recipe,
        sampler.parse_numbers("--ranks", action.ranks),
        sampler.parse_numbers("--micro-steps", action.micro_steps),
        sampler.parse_policies(action.policies),
        action.steps,
        action.seed,
        action.meet,
    )
    return rows, sampler.sampler_table


def _bench_paths(action: BenchPaths) -> Result:
    from lgp_dist.bench.baseline_ratios import as_rows
    from lgp_dist.bench.paths import bench_paths, paths_line  # torch and timm, as in those below

    table = bench_paths(action.recipe, action.out, action.batch, action.repeats)
    return as_rows(table), lambda rows: paths_line(table, action.out)


def _bench_engine(action: BenchEngine) -> Result:
    from lgp_dist.bench.engine import bench_engine, engine_table  # torch, timm and deepspeed, as above

    return bench_engine(action.recipe, action.out, action.rounds, action.steps), engine_table


def _bench_checkpoint(action: BenchCheckpoint) -> Result:
    from lgp_dist.bench.checkpoint import bench_checkpoint, checkpoint_table  # as above

    return bench_checkpoint(action.recipe, action.out, action.rounds, action.steps), checkpoint_table


def _bench_op(action: BenchOp) -> Result:
    from lgp_dist.bench.op import bench_op, op_table  # torch, as above

    return bench_op(action.device, action.batch, action.repeats), op_table


def _bench_step(action: BenchStep) -> Result:
    from lgp_dist.bench.step import bench_step, step_table  # torch and timm, as above

    return bench_step(action.recipe, action.batch, action.repeats, action.compiled), step_table


def _bench_data(action: BenchData) -> Result:
    from lgp_dist.bench.loaders.data import bench_data, data_table  # torch and timm, as above

    rows = bench_data(
        action.folder,
        [Path(part) for part in _parts(action.photos)],
        action.samples,
        _parts(action.loaders),
        action.threads,
        action.batch,
        action.repeats,
        lambda line: sys.stderr.write(line + "\n") and None,
    )
    return rows, data_table


def _bench_train(action: BenchTrain) -> Result:
    from lgp_dist.bench.loop.train import bench_train, train_table  # torch, timm and deepspeed, as above

    return bench_train(action.recipe, action.out, action.rounds, action.steps), train_table


def _bench_peers(action: BenchPeers) -> Result:
    from lgp_dist.bench.loop.peers import bench_peers, peers_table  # as above

    peers = _parts(action.peers)
    return bench_peers(action.recipe, action.out, peers, action.workers, action.rounds, action.steps), peers_table


def _bench_distil(action: BenchDistil) -> Result:
    from lgp_dist.bench.distil import bench_distil, distil_table  # as above

    return bench_distil(action.recipe, action.batch, action.repeats), distil_table


def _bench_scaling(action: BenchScaling) -> Result:
    from lgp_dist.bench import sampler, scaling  # torch, as above

    ranks, policies = sampler.parse_numbers("--ranks", action.ranks), sampler.parse_policies(action.policies)
    files = [Path(part) for part in _parts(action.measured)]
    return scaling.bench_scaling(action.recipe, files, ranks, policies, action.images), scaling.scaling_table


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


BENCHES: dict[type, tuple[str, Callable[[Any], Result]]] = {
    BenchSampler: ("sampler", _bench_sampler),
    BenchPaths: ("paths", _bench_paths),
    BenchEngine: ("engine", _bench_engine),
    BenchCheckpoint: ("checkpoint", _bench_checkpoint),
    BenchOp: ("op", _bench_op),
    BenchStep: ("step", _bench_step),
    BenchData: ("data", _bench_data),
    BenchTrain: ("train", _bench_train),
    BenchPeers: ("peers", _bench_peers),
    BenchDistil: ("distil", _bench_distil),
    BenchScaling: ("scaling", _bench_scaling),
}
"""The name of each benchmark, and what measures it."""


def run_bench(action: Compared) -> None:
    """Measures what the arguments ask for; rank 0 prints a table or JSON, and ratios to an earlier result."""
    from lgp_dist.bench.baseline_ratios import comparison, read_rows  # torch, as above

    name, measure = BENCHES[type(action)]
    before = read_rows(name, action.compare) if action.compare else None
    rows, table = measure(action)
    if os.environ.get("RANK", "0") != "0":
        return
    sys.stdout.write((json.dumps(rows, indent=2) if action.json else table(rows)) + "\n")
    if before is not None:
        stream = sys.stderr if action.json else sys.stdout
        stream.write(comparison(name, rows, before, action.compare) + "\n")
