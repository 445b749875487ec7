"""`lgp bench`: arguments and what they call."""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from lgp_dist.cli.recipe import Recipe


@dataclass(frozen=True)
class BenchSampler:
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
    json: bool = False
    """Print a list of objects."""


@dataclass(frozen=True)
class BenchPaths:
    """Measure seconds of every path on this machine, for --finetune.costs."""

    recipe: Recipe
    out: Path
    """File to write."""
    batch: int = 0
    """Images of a micro-step; 0 for the recipe's, on one rank."""
    repeats: int = 5
    """Rounds over all paths; the median counts."""


@dataclass(frozen=True)
class BenchEngine:
    """Time, bytes and memory of a step on this launch's engine: one shared path against a path for every rank."""

    recipe: Recipe
    out: Path
    """File to write: a JSON list of objects."""
    rounds: int = 5
    """Rounds over the policies; the median counts."""
    steps: int = 24
    """Optimizer steps of each policy in a round."""


@dataclass(frozen=True)
class BenchCheckpoint:
    """What a checkpoint costs on this launch's engine: in the background, as runs write it, and waited for."""

    recipe: Recipe
    out: Path
    """File to write: a JSON list of objects. Checkpoints are written beside it."""
    rounds: int = 5
    """Saves of either kind; the median counts."""
    steps: int = 8
    """Optimizer steps before each save, which say what a step takes without one."""


@dataclass(frozen=True)
class BenchOp:
    """The fused operations: checked against float64 on this device, then timed beside eager and compiled ones."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes the GPU if there is one."""
    batch: int = 128
    """Images of 197 tokens."""
    repeats: int = 20
    """Rounds over the ways; the median counts."""
    json: bool = False
    """Print a list of objects."""


@dataclass(frozen=True)
class BenchStep:
    """Paths of a recipe on eager, compiled and fused blocks, and several paths for one forward of the ancestry."""

    recipe: Recipe
    batch: int = 0
    """Images; 0 for the recipe's in a micro-step."""
    repeats: int = 5
    """Rounds over the ways; the median counts."""
    compiled: bool = True
    """Also what torch.compile makes, which takes minutes to compile on a CPU."""
    json: bool = False
    """Print a list of objects."""


@dataclass(frozen=True)
class BenchData:
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
    json: bool = False
    """Print a list of objects."""


BenchAction = Annotated[
    Annotated[BenchSampler, tyro.conf.subcommand("sampler", prefix_name=False)]
    | Annotated[BenchPaths, tyro.conf.subcommand("paths", prefix_name=False)]
    | Annotated[BenchEngine, tyro.conf.subcommand("engine", prefix_name=False)]
    | Annotated[BenchCheckpoint, tyro.conf.subcommand("checkpoint", prefix_name=False)]
    | Annotated[BenchOp, tyro.conf.subcommand("op", prefix_name=False)]
    | Annotated[BenchStep, tyro.conf.subcommand("step", prefix_name=False)]
    | Annotated[BenchData, tyro.conf.subcommand("data", prefix_name=False)],
    tyro.conf.arg(name=""),
]


def _bench_sampler(action: BenchSampler) -> None:
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
    sys.stdout.write((json.dumps(rows, indent=2) if action.json else sampler.sampler_table(rows)) + "\n")


def _bench_paths(action: BenchPaths) -> None:
    from lgp_dist.bench.paths import bench_paths, say  # torch and timm, as in those below

    say(bench_paths(action.recipe, action.out, action.batch, action.repeats), action.out)


def _bench_engine(action: BenchEngine) -> None:
    from lgp_dist.bench.engine import bench_engine, engine_table  # torch, timm and deepspeed, as above

    rows = bench_engine(action.recipe, action.out, action.rounds, action.steps)
    if os.environ.get("RANK", "0") == "0":
        sys.stdout.write(engine_table(rows) + "\n")


def _bench_checkpoint(action: BenchCheckpoint) -> None:
    from lgp_dist.bench.checkpoint import bench_checkpoint, checkpoint_table  # as above

    rows = bench_checkpoint(action.recipe, action.out, action.rounds, action.steps)
    if os.environ.get("RANK", "0") == "0":
        sys.stdout.write(checkpoint_table(rows) + "\n")


def _bench_op(action: BenchOp) -> None:
    from lgp_dist.bench.op import bench_op, op_table  # torch, as above

    rows = bench_op(action.device, action.batch, action.repeats)
    sys.stdout.write((json.dumps(rows, indent=2) if action.json else op_table(rows)) + "\n")


def _bench_step(action: BenchStep) -> None:
    from lgp_dist.bench.step import bench_step, step_table  # torch and timm, as above

    rows = bench_step(action.recipe, action.batch, action.repeats, action.compiled)
    sys.stdout.write((json.dumps(rows, indent=2) if action.json else step_table(rows)) + "\n")


def _bench_data(action: BenchData) -> None:
    from lgp_dist.bench.data import bench_data, data_table  # torch and timm, as above

    rows = bench_data(
        action.folder,
        [Path(part) for part in action.photos.split(",") if part],
        action.samples,
        [part.strip() for part in action.loaders.split(",") if part],
        action.threads,
        action.batch,
        action.repeats,
        lambda line: sys.stderr.write(line + "\n") and None,
    )
    sys.stdout.write((json.dumps(rows, indent=2) if action.json else data_table(rows)) + "\n")


BENCHES = {
    BenchSampler: _bench_sampler,
    BenchPaths: _bench_paths,
    BenchEngine: _bench_engine,
    BenchCheckpoint: _bench_checkpoint,
    BenchOp: _bench_op,
    BenchStep: _bench_step,
    BenchData: _bench_data,
}
"""What each kind of arguments calls."""


def run_bench(
    action: BenchSampler | BenchPaths | BenchEngine | BenchCheckpoint | BenchOp | BenchStep | BenchData,
) -> None:
    """Does what the arguments ask for."""
    BENCHES[type(action)](action)
