"""`lgp shards`: its options and what they call."""

import json
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro

from lgp_dist.data.build.options import BuildOptions, Layout, ReadOptions
from lgp_dist.engine.launch.machine import usable_cpus
from lgp_dist.errors import UserError
from lgp_dist.files import replace_folder, write_json


@dataclass(frozen=True)
class Build(BuildOptions):
    """Make shards of a data set; repeat the command after an interruption to continue."""

    layout: Annotated[Layout, tyro.conf.Positional] = tyro.MISSING
    """imagefolder, imagenet (the official tars), kaggle, parquet (the hub's files), webdataset or fashion-mnist."""
    out: Path = tyro.MISSING
    """Folder to make; must not exist, or be empty."""
    source: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Folder of the data set; fashion-mnist defaults to that of Debian's package."""


@dataclass(frozen=True)
class Index(ReadOptions):
    """Write manifest, _info.json and indexes next to shards from elsewhere."""

    root: Annotated[Path, tyro.conf.Positional] = tyro.MISSING
    """Folder of the tars."""
    out: Path | None = None
    """Write to this folder, as where that of the tars is read-only; data.root is then this folder."""


@dataclass(frozen=True)
class VerifyShards:
    """Check hashes, structure, images and labels of shards, and name every bad sample."""

    root: Annotated[Path, tyro.conf.Positional]
    """Folder of the tars."""
    out: Path | None = None
    """Also write a JSON list of the problems to this file."""
    workers: int = 0
    """Threads; 0 for one per core."""


@dataclass(frozen=True)
class ShowShards:
    """Print counts, sizes and classes of shards; draw a contact sheet."""

    root: Annotated[Path, tyro.conf.Positional]
    """Folder of the tars."""
    sheet: Path | None = None
    """PNG to write, with images of all classes, equally many of each."""
    split: str = ""
    """Split of the contact sheet; the first if empty."""
    images: int = 64
    """Images on the contact sheet."""
    seed: int = 0
    """Seed of the choice of images."""
    json: bool = False
    """Print JSON."""


@dataclass(frozen=True)
class Reshard(BuildOptions):
    """Rewrite shards with another number, size or short side."""

    root: Annotated[Path, tyro.conf.Positional] = tyro.MISSING
    """Folder of the tars."""
    out: Path = tyro.MISSING
    """Folder to make; must not exist, or be empty."""


@dataclass(frozen=True)
class SampleShards:
    """Copy the quickstart's shards of Fashion-MNIST, which come with this package."""

    out: Path = Path("shards/sample")
    """Folder to make; must not exist."""


SAMPLE = Path(__file__).resolve().parents[1] / "sample"
SHARDS = {
    "sample": SampleShards,
    "build": Build,
    "index": Index,
    "verify": VerifyShards,
    "show": ShowShards,
    "reshard": Reshard,
}
"""Action -> its arguments."""


def run_shards(action: SampleShards | Build | Index | VerifyShards | ShowShards | Reshard) -> None:
    """Does what the arguments ask for."""
    from lgp_dist.data.build import build  # NumPy and the decoders
    from lgp_dist.data.shards import index, show, verify
    from lgp_dist.data.shards.classes import read_classes

    if isinstance(action, SampleShards):
        if action.out.exists():
            raise UserError(f"{action.out} is there already: choose another --out, or remove it.")
        replace_folder(action.out, lambda folder: shutil.copytree(SAMPLE, folder, dirs_exist_ok=True))
        sys.stdout.write(f"{action.out}: shards and ancestry of the recipe tiny\n")
    elif isinstance(action, Build | Reshard):
        layout, root = ("webdataset", action.root) if isinstance(action, Reshard) else (action.layout, action.source)
        manifest = build.build_shards(layout, root, action.out, action)
        sys.stdout.write(show.describe(manifest, show.summarise(manifest)) + "\n")
    elif isinstance(action, Index):
        reading = index.Reading(action.image, action.label, read_classes(action.classes))
        index.index_shards(action.root, print, action.out, reading, action.accept_missing)
    elif isinstance(action, ShowShards):
        manifest = index.ShardManifest.load(action.root)
        splits = show.summarise(manifest)
        about = {"root": str(manifest.root), "source": manifest.source, "licence": manifest.licence}
        numbers = {**about, "classes": len(manifest.classes), "splits": splits}
        text = "\n".join([show.describe(manifest, splits), *show.class_report(manifest, splits)])
        sys.stdout.write((json.dumps(numbers, indent=2) if action.json else text) + "\n")
        if action.sheet:
            show.contact_sheet(manifest, action.split, action.sheet, action.images, action.seed)
    else:
        problems = verify.verify_shards(action.root, workers=action.workers or usable_cpus())
        if action.out:
            write_json(action.out, [asdict(problem) for problem in problems])
        if problems:
            sys.stdout.write(verify.table(problems))
            raise UserError(verify.summary(action.root, problems))
        sys.stdout.write(f"{action.root}: every shard and image is whole\n")
