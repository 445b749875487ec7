"""The command line: `lgp STAGE RECIPE [overrides]`. Thin: what a command needs is imported when it is called."""

import errno
import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

import tyro

from lgp_dist.config import STAGES, RunConfig
from lgp_dist.errors import UserError
from lgp_dist.paths import PathSpace
from lgp_dist.recipes import RECIPES

# The value itself is a type, and mypy cannot know it: tyro makes one subcommand per recipe, with its fields as options.
Recipe = Annotated[
    tyro.extras.subcommand_type_from_defaults(  # type: ignore[valid-type]
        {name: recipe() for name, recipe in RECIPES.items()},
        descriptions={name: (recipe.__doc__ or "").splitlines()[0] for name, recipe in RECIPES.items()},
        prefix_names=False,
    ),
    tyro.conf.arg(name=""),
]

SUMMARIES = {
    "ancestry": "Train or load the frozen teacher.",
    "distil": "Distil the ancestry into the rows of the pool.",
    "pool": "Put rows together and start the stitch layers.",
    "finetune": "Train all paths, each rank on its own.",
    "evaluate": "Accuracy and cost of every path.",
    "descend": "Choose the best path within a budget.",
    "export": "Write a descendant as a standalone model.",
}
"""Help of the stages' commands."""

NOT_WRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM}

PEER_GONE = ("Connection closed by peer", "Connection reset by peer")
"""What gloo says on a rank whose peer has failed."""

PATIENCE_S = 15.0
"""How long a rank leaves the word to another that failed first, seconds."""

app = tyro.extras.SubcommandApp()


def _stage_command(stage: str) -> None:
    def command(recipe: Recipe) -> None:
        _guarded(lambda: _run(recipe, (stage,)), recipe.debug, recipe.directory)

    command.__doc__ = SUMMARIES[stage]
    app.command(command, name=stage)


for _stage in STAGES:
    _stage_command(_stage)


@app.command
def run(recipe: Recipe) -> None:
    """All stages in order, skipping those that are complete."""
    _guarded(lambda: _run(recipe, STAGES), recipe.debug, recipe.directory)


@app.command
def paths(recipe: Recipe, json: bool = False) -> None:  # noqa: A002  the flag's name
    """List a pool's paths and what each costs.

    Args:
        json: Print a list of objects with the fields of paths.json.
    """
    _guarded(lambda: _paths(recipe, as_json=json), recipe.debug)


@dataclass(frozen=True)
class Cut:
    """How images are laid out in shards."""

    per_shard: int = 1000
    """Samples in a shard."""
    shards: int = 0
    """Shards of the largest split, the others in proportion; 0 to go by --per-shard."""
    shard_mb: int = 0
    """Megabytes of images in a shard, at most; 0 to go by --per-shard."""
    short_side: int = 0
    """Re-encode images with a longer short side to this one, pixels, as JPEG; 0 keeps all bytes."""
    quality: int = 90
    """Of these JPEGs."""
    train: int = 0
    """Training images, equally many of each class; 0 for all."""
    test: int = 0
    """Images of every other split; 0 for all."""
    seed: int = 0
    """Of the shuffle."""
    workers: int = 0
    """Threads; 0 for one per core."""


@dataclass(frozen=True)
class Build(Cut):
    """Make shards of a data set; after an interruption, the same command goes on."""

    layout: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="LAYOUT")] = tyro.MISSING
    """imagefolder, imagenet (the official tars), kaggle, parquet (the hub's files), webdataset or fashion-mnist."""
    out: Path = tyro.MISSING
    """Folder to make; must not exist, or be empty."""
    source: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Folder of the data set; fashion-mnist's is that of Debian's package unless named."""


@dataclass(frozen=True)
class Index:
    """Write manifest, _info.json and indexes beside shards from elsewhere."""

    root: Annotated[Path, tyro.conf.Positional]
    """Folder of the tars."""


@dataclass(frozen=True)
class Verify:
    """Check hashes, structure, images and labels of shards; name every bad sample."""

    root: Annotated[Path, tyro.conf.Positional]
    """Folder of the tars."""
    out: Path | None = None
    """Also write a JSON list of the problems to this file."""
    workers: int = 0
    """Threads; 0 for one per core."""


@dataclass(frozen=True)
class Show:
    """Print counts, sizes and classes of shards; draw a contact sheet."""

    root: Annotated[Path, tyro.conf.Positional]
    """Folder of the tars."""
    sheet: Path | None = None
    """PNG to write, with images of all classes."""
    split: str = ""
    """Split of the contact sheet; the first if empty."""
    images: int = 64
    """Images on the contact sheet."""
    seed: int = 0
    """Of the choice of images."""
    json: bool = False
    """Print an object."""


@dataclass(frozen=True)
class Reshard(Cut):
    """Write shards anew: another count, size or short side."""

    root: Annotated[Path, tyro.conf.Positional] = tyro.MISSING
    """Folder of the tars."""
    out: Path = tyro.MISSING
    """Folder to make; must not exist, or be empty."""


ShardsAction = Annotated[
    Annotated[Build, tyro.conf.subcommand("build", prefix_name=False)]
    | Annotated[Index, tyro.conf.subcommand("index", prefix_name=False)]
    | Annotated[Verify, tyro.conf.subcommand("verify", prefix_name=False)]
    | Annotated[Show, tyro.conf.subcommand("show", prefix_name=False)]
    | Annotated[Reshard, tyro.conf.subcommand("reshard", prefix_name=False)],
    tyro.conf.arg(name=""),
]


@app.command
def shards(action: ShardsAction) -> None:
    """Build, index, verify, show and reshard shards."""
    _guarded(lambda: _shards(action), debug=False)


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


BenchAction = Annotated[
    Annotated[BenchSampler, tyro.conf.subcommand("sampler", prefix_name=False)]
    | Annotated[BenchPaths, tyro.conf.subcommand("paths", prefix_name=False)],
    tyro.conf.arg(name=""),
]


@app.command
def bench(action: BenchAction) -> None:
    """Measure policies (by arithmetic) and paths (by the clock)."""
    debug = isinstance(action, BenchPaths) and action.recipe.debug
    _guarded(lambda: _bench(action), debug=debug)


def _run(config: RunConfig, stages: tuple[str, ...]) -> None:
    from lgp_dist.pipeline import run_stages  # torch, timm and deepspeed: 15 s that `lgp --help` must not wait for

    run_stages(config, stages)


def _paths(config: RunConfig, *, as_json: bool) -> None:
    space = PathSpace.from_config(config)
    rows = sorted((space.describe(path) for path in space.paths), key=lambda row: row["flops"])
    if as_json:
        unmeasured = [{**row, "top1": None, "top5": None} for row in rows]
        sys.stdout.write(json.dumps(unmeasured, indent=2) + "\n")
        return
    lines = [f"{'key':<24}{'low':>5}{'high':>5}{'params M':>10}{'paper M':>10}{'GFLOPs':>9}"]
    for row in rows:
        millions = [f"{row[name] / 1e6:>10.2f}" for name in ("params", "params_paper")]
        lines.append(f"{row['key']:<24}{row['low']:>5}{row['high']:>5}{''.join(millions)}{row['flops'] / 1e9:>9.2f}")
    total = f"{len(rows)} paths, {len(space.stitch_widths)} stitch layers, {space.stored_params / 1e6:.2f} M stored"
    sys.stdout.write("\n".join([*lines, total]) + "\n")


def _shards(action: Build | Index | Verify | Show | Reshard) -> None:
    from lgp_dist.data import build, index, show, verify  # webdataset and torch, as above

    if isinstance(action, (Build, Reshard)):
        options = build.BuildOptions(
            **{field.name: getattr(action, field.name) for field in fields(build.BuildOptions)}
        )
        layout, root = ("webdataset", action.root) if isinstance(action, Reshard) else (action.layout, action.source)
        manifest = build.build_shards(layout, root, action.out, options)
        sys.stdout.write(show.describe(show.summarise(manifest)) + "\n")
    elif isinstance(action, Index):
        index.index_shards(action.root)
    elif isinstance(action, Show):
        manifest = index.ShardManifest.load(action.root)
        summary = show.summarise(manifest)
        sys.stdout.write((json.dumps(summary, indent=2) if action.json else show.describe(summary)) + "\n")
        if action.sheet:
            show.contact_sheet(manifest, action.split, action.sheet, action.images, action.seed)
    else:
        problems = verify.verify_shards(action.root, workers=action.workers or len(os.sched_getaffinity(0)))
        if action.out:
            verify.write_problems(problems, action.out)
        if problems:
            sys.stdout.write(verify.table(problems))
            raise UserError(verify.summary(action.root, problems))
        sys.stdout.write(f"{action.root}: every shard and image is whole\n")


def _bench(action: BenchSampler | BenchPaths) -> None:
    if isinstance(action, BenchPaths):
        from lgp_dist.bench.paths import bench_paths, say  # torch and timm, as above

        say(bench_paths(action.recipe, action.out, action.batch, action.repeats), action.out)
        return
    from lgp_dist.bench import sampler

    rows = sampler.bench_sampler(
        action.recipe,
        sampler.parse_numbers("--ranks", action.ranks),
        sampler.parse_numbers("--micro-steps", action.micro_steps),
        sampler.parse_policies(action.policies),
        action.steps,
        action.seed,
    )
    sys.stdout.write((json.dumps(rows, indent=2) if action.json else sampler.sampler_table(rows)) + "\n")


def _guarded(call: Callable[[], None], debug: bool, run_dir: str = "") -> None:
    """Turns what a person can put right into one sentence and status 2."""
    try:
        call()
    except UserError as error:
        _fail(str(error), debug)
    except OSError as error:
        if error.errno not in NOT_WRITABLE:
            raise
        where = error.filename or f"The run directory {run_dir}"
        _fail(f"{where} cannot be written ({error.strerror}): free space, or choose another --run-dir.", debug)
    except RuntimeError as error:
        if not any(text in str(error) for text in PEER_GONE):
            raise
        time.sleep(PATIENCE_S)  # the rank that failed says why, and the launcher ends this one
        raise
    except KeyboardInterrupt:
        sys.exit(130)


def _fail(sentence: str, debug: bool) -> None:
    """Says it once: rank 0 at once; another rank waits, and is ended by the launcher if rank 0 has failed too."""
    rank = int(os.environ.get("RANK", "0"))
    if rank:
        time.sleep(PATIENCE_S)
    if debug:
        traceback.print_exc()
    sys.stderr.write(f"lgp: {sentence}\n" if rank == 0 else f"lgp (rank {rank}): {sentence}\n")
    sys.stderr.flush()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        os._exit(2)  # one of several ranks: without waiting for the others at exit
    sys.exit(2)


def main() -> None:
    """Entry point of `lgp` and `python -m lgp_dist`."""
    # DeepSpeed speaks while it is imported, before anything could lower its level.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    app.cli(
        prog="lgp",
        description="Learngene Pool: variable-sized vision models from one pretrained model.",
        config=(tyro.conf.CascadeSubcommandArgs,),
        console_outputs=os.environ.get("RANK", "0") == "0",
    )
