"""`lgp bench`: the arguments of each benchmark. The benchmark itself is imported when it runs."""

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, Literal

import tyro

from lgp_dist.cli.recipe import Recipe
from lgp_dist.files import beside, locked
from lgp_dist.run.text_table import Column, Row, objects_table


@dataclass(frozen=True, kw_only=True)
class Compared:
    """What every benchmark takes."""

    compare: Path | None = None
    """File of an earlier result of this benchmark: also print ratios to it."""
    json: bool = False
    """Print a list of objects in place of a table."""


@dataclass(frozen=True, kw_only=True)
class OneProcess(Compared):
    """A benchmark of a recipe's models in one process."""

    recipe: Recipe
    batch: int = 0
    """Images; 0 for the recipe's in a micro-step, on one rank."""
    repeats: int = 5
    """Rounds over all that is compared; the median counts."""


@dataclass(frozen=True, kw_only=True)
class Launched(Compared):
    """A benchmark of a recipe's steps on the processes and the engine of this launch."""

    recipe: Recipe
    out: Path
    """File to write: a JSON list of objects."""
    rounds: int = 5
    """Rounds over all that is compared; the median counts."""
    steps: int = 24
    """Optimizer steps of each in a round."""


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
    """Seed of the schedule."""


@dataclass(frozen=True, kw_only=True)
class BenchPaths(OneProcess):
    """Seconds of every path on this machine, for --finetune.costs."""

    out: Path
    """File to write."""


@dataclass(frozen=True, kw_only=True)
class BenchLatency(Compared):
    """Latency of every path of an exported pool in onnxruntime, for lgp descend --latency-table."""

    folder: Annotated[Path, tyro.conf.Positional]
    """Folder that `lgp export RUN --all` wrote."""
    out: Path
    """CSV file to write."""
    batch: int = 1
    """Images of a forward."""
    threads: int = 0
    """Threads of onnxruntime; 0 for its choice."""


@dataclass(frozen=True, kw_only=True)
class BenchEngine(Launched):
    """Time, bytes and memory of a step on this launch's engine, for each policy."""


@dataclass(frozen=True, kw_only=True)
class BenchCheckpoint(Launched):
    """What a checkpoint costs on this launch's engine, in the background and waited for.

    Checkpoints are written next to --out.
    """

    steps: int = 8
    """Optimizer steps before each save, which say what a step takes without one."""


@dataclass(frozen=True, kw_only=True)
class BenchOp(Compared):
    """Fused operations: checked against float64, then compared in time with eager and compiled ones."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes the GPU if there is one."""
    batch: int = 128
    """Images of 197 tokens."""
    repeats: int = 20
    """Rounds over all that is compared; the median counts."""


@dataclass(frozen=True, kw_only=True)
class BenchStep(OneProcess):
    """Paths on eager, compiled and fused blocks, and several paths for one forward of the ancestry."""

    compiled: bool = True
    """Also with torch.compile, which takes minutes to compile on a CPU."""


@dataclass(frozen=True, kw_only=True)
class BenchData(Compared):
    """Images per CPU second of this project's loader and of others, on generated photographs."""

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
class BenchTrain(Launched):
    """Throughput of stage finetune on this launch, and where the time of its steps goes."""


@dataclass(frozen=True, kw_only=True)
class BenchPeers(Launched):
    """The loop of stage finetune compared with a bare loop, SN-Net's way and timm's loop."""

    peers: str = ""
    """bare (one process alone), snnet, timm, separated by commas; empty for all that can run."""
    workers: int = 1
    """Worker processes of the others' DataLoader on each rank; this project's loader has data.threads."""


@dataclass(frozen=True, kw_only=True)
class BenchDistil(OneProcess):
    """Distilling all rows with one forward of the ancestry, compared with a run for each row."""


@dataclass(frozen=True, kw_only=True)
class BenchScaling(Compared):
    """Predicted steps on many ranks, by a model fitted to steps on a few and judged by held-out ones."""

    recipe: Recipe
    measured: str
    """Files of `lgp bench engine`, separated by commas; scripts/bench_scaling makes them."""
    ranks: str = "1,2,4,8,16,64,256,1024"
    """Numbers of ranks to predict, separated by commas."""
    policies: str = ""
    """Policies, separated by commas; empty for all."""
    images: int = 0
    """Images of a rank's micro-step; 0 for the recipe's on one rank."""


Columns = Mapping[str, Sequence[Column]] | Sequence[Sequence[Column]]

BENCHES: dict[str, tuple[type[Compared], str]] = {
    "sampler": (BenchSampler, "sampler"),
    "paths": (BenchPaths, "paths"),
    "latency": (BenchLatency, "latency"),
    "engine": (BenchEngine, "engine"),
    "checkpoint": (BenchCheckpoint, "checkpoint"),
    "op": (BenchOp, "op"),
    "step": (BenchStep, "step"),
    "data": (BenchData, "loaders.data"),
    "train": (BenchTrain, "loop.train"),
    "peers": (BenchPeers, "loop.peers"),
    "distil": (BenchDistil, "distil"),
    "scaling": (BenchScaling, "scaling"),
}
"""Name -> arguments, and the module in `lgp_dist.bench` whose `bench_NAME` measures and whose COLUMNS a table shows.

`bench_NAME` takes the recipe, if there is one, and the other arguments under their names; it returns a list of objects.
COLUMNS are the fields that each table shows: of the objects of a `kind`, or of all.
"""


def run_bench(action: Compared) -> None:
    """Runs a benchmark; rank 0 prints a table or JSON, and ratios to an earlier result."""
    from lgp_dist.bench.baseline_ratios import FIELDS, comparison, read_rows

    name, place = next((name, place) for name, (kind, place) in BENCHES.items() if type(action) is kind)
    before = None
    if action.compare:
        before = read_rows("--compare", action.compare, FIELDS[name].same[:1], f"name a file of `lgp bench {name}`")
    arguments = {field.name: getattr(action, field.name) for field in dataclasses.fields(action)}
    options = {name: value for name, value in arguments.items() if name not in ("compare", "json", "recipe")}
    recipe = [arguments["recipe"]] if "recipe" in arguments else []
    module = import_module(f"lgp_dist.bench.{place}")  # torch and timm, some also deepspeed
    with contextlib.ExitStack() as stack:
        if "out" in options and os.environ.get("RANK", "0") == "0":
            stack.enter_context(locked(beside(options["out"]), "--out"))
        rows = getattr(module, f"bench_{name}")(*recipe, **options)
    if os.environ.get("RANK", "0") != "0":
        return
    text = json.dumps(rows, indent=2) if action.json else _tables(rows, module.COLUMNS)
    sys.stdout.write(text + "\n")
    if before is not None:
        stream = sys.stderr if action.json else sys.stdout
        stream.write(comparison(name, rows, before, action.compare) + "\n")


def _tables(rows: Sequence[Row], columns: Columns) -> str:
    """The objects as text: a table for each kind, or several of all, and what the objects advise."""
    if isinstance(columns, Mapping):
        parts = [([row for row in rows if row["kind"] == kind], names) for kind, names in columns.items()]
    else:
        parts = [(rows, names) for names in columns]
    advice = [row["advice"] for row in rows if "advice" in row]
    return "\n\n".join([*(objects_table(*part) for part in parts), *advice])
