"""What is done with a finished run: `lgp descend RUN`, `export`, `specialise`, `finetune-descendant` and `push`."""

import json
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from lgp_dist.cli.stages import check_start
from lgp_dist.commands.finished import FinishedRun, exporting
from lgp_dist.config.budget import Amount, Budget
from lgp_dist.config.flat import STAGES
from lgp_dist.config.run_config import (
    AugmentConfig,
    CheckpointConfig,
    DataConfig,
    EngineConfig,
    ExportConfig,
    FaultConfig,
    FinetuneConfig,
    Format,
    FormatsConfig,
    RunConfig,
    TrainConfig,
)
from lgp_dist.engine.checkpoints.manifest import check_resume
from lgp_dist.engine.launch.environment import Launch, check_ranks, check_requests
from lgp_dist.engine.watch.signals import Preemption
from lgp_dist.errors import UserError
from lgp_dist.files import LOCK, beside, check_unlocked, locked
from lgp_dist.run.latency_table import with_table
from lgp_dist.run.path_rows import PathRow, read_rows
from lgp_dist.run.run_status import ended
from lgp_dist.run.text_table import text_table


@dataclass(frozen=True)
class DescendRun:
    """Choose the best path of a finished run within a budget."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run directory."""
    budget: tyro.conf.OmitArgPrefixes[Budget] = Budget()
    """Limits; 0 for none."""
    latency_table: Path | None = None
    """CSV or JSON file with latencies of all paths that were measured elsewhere; `lgp bench latency` makes one."""
    plot: bool = False
    """Draw accuracy against parameters, FLOPs and latency, with the choice marked: RUN/descend.png and .svg."""
    json: bool = False
    """Print an object with the fields of paths.json and latency."""
    debug: bool = False
    """Show the traceback of an error before its sentence."""


@dataclass(frozen=True)
class ExportRun:
    """Write a path of a finished run as a standalone model, or all paths with weights that are stored once."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run directory."""
    out: Path
    """Folder to write; must be empty or not exist."""
    path: str = ""
    """Key of the path."""
    all: bool = False
    """All evaluated paths, in place of one."""
    latency_table: Path | None = None
    """With --all: latencies in place of those of this machine, as for `lgp descend`."""
    formats: tuple[Format, ...] = ExportConfig().formats
    """Formats in addition to safetensors, as --export.formats; of these --all takes onnx alone."""
    images: int = ExportConfig().images
    """Validation images on which each format is compared with the path."""
    data: str = ""
    """Root of the shards; empty for the one that the run names."""
    debug: bool = False
    """Show the traceback of an error before its sentence."""


@dataclass(frozen=True)
class Predict:
    """Print the most likely classes of images, by an exported model."""

    folder: Annotated[Path, tyro.conf.Positional]
    """Folder that `lgp export` wrote, or a run's export/."""
    images: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """JPEG, PNG or WebP files."""
    top: int = 5
    """Classes for each image."""
    json: bool = False
    """Print an object: file -> list of class and probability."""
    debug: bool = False
    """Show the traceback of an error before its sentence."""


@dataclass(frozen=True)
class SpecialiseRun:
    """Train one path of a finished run alone, from the pool's weights."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run directory."""
    path: str = ""
    """Key of the path; empty for the best within the limits."""
    max_params: Amount = Amount(0)
    """Largest number of parameters, such as 10M; 0 for any."""
    max_flops: Amount = Amount(0)
    """Most multiply-adds per image, such as 2G; 0 for any."""
    epochs: float = 0.0
    """Passes over the training split; 0 for a quarter of stage finetune's."""
    lr: float = 0.0
    """Peak learning rate; 0 for a quarter of stage finetune's."""
    data: str = ""
    """Root of the shards; empty for the one that the run names."""
    resume: str = "auto"
    """auto, latest, never or a path, as --resume of a run."""
    debug: bool = False
    """Show the traceback of an error before its sentence."""


@dataclass(frozen=True)
class Push:
    """Upload an exported folder to Hugging Face's hub, in one commit."""

    folder: Annotated[Path, tyro.conf.Positional]
    """Folder that `lgp export` wrote."""
    name: Annotated[str, tyro.conf.Positional]
    """Repository: USER/NAME. It is made if it does not exist."""
    private: bool = False
    """Whether a new repository is private."""
    debug: bool = False
    """Show the traceback of an error before its sentence."""


@dataclass(frozen=True)
class Downstream:
    """Train an exported descendant on another data set, with a new head."""

    folder: Annotated[Path, tyro.conf.Positional]
    """Folder that `lgp export` wrote."""
    data: str
    """Root of the shards: a folder, or an http(s)://, s3://, gs:// or hf:// address."""
    out: str = ""
    """Run directory; empty for runs/downstream. The new folder is OUT/export."""
    num_classes: int = 0
    """Number of classes; 0 for those that the shards' manifest names."""
    train_split: str = "train"
    """Split to train on."""
    val_split: str = "validation"
    """Split to evaluate on, and for the check of the new folder."""
    seed: int = 0
    """Seed of the new head, order of images and augmentation."""
    threads: int = 8
    """Decoding threads per rank; 0 decodes in the training thread."""
    train: TrainConfig = TrainConfig(epochs=20.0, lr=1e-4, warmup_epochs=2.0, label_smoothing=0.1)
    """Length, batch, optimizer, learning rate and regularisation."""
    augment: AugmentConfig = AugmentConfig()
    """Augmentation of training images."""
    engine: EngineConfig = EngineConfig()
    """Precision, device, memory and communication."""
    faults: FaultConfig = FaultConfig()
    """What the run does about bad steps and hanging ranks."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When it saves while it trains, and how many checkpoints are kept."""
    export: FormatsConfig = FormatsConfig()
    """Formats of the new folder."""
    resume: str = "auto"
    """auto, latest, never or a path, as --resume of a run."""
    debug: bool = False
    """Show the traceback of an error before its sentence."""

    @property
    def config(self) -> RunConfig:
        """As a run's; what the folder and the shards say is still to come."""
        data = DataConfig(
            root=self.data,
            train_split=self.train_split,
            val_split=self.val_split,
            num_classes=self.num_classes,
            augment=self.augment,
            threads=self.threads,
        )
        return RunConfig(
            recipe="downstream",
            seed=self.seed,
            data=data,
            engine=self.engine,
            faults=self.faults,
            finetune=FinetuneConfig(train=self.train),
            checkpoint=self.checkpoint,
            export=ExportConfig(**vars(self.export)),
            run_dir=self.out,
            resume=self.resume,
        )


def descend(action: DescendRun) -> None:
    """Prints the best path of a finished run."""
    here = (action.budget.device, action.budget.batch, action.budget.dtype)
    if action.latency_table and here != (Budget().device, Budget().batch, Budget().dtype):
        raise UserError("--latency-table was measured elsewhere: leave out --device, --batch and --dtype.")
    run = FinishedRun.open(action.run, budget=action.budget)
    rows = _rows(run, action.latency_table)
    from lgp_dist.commands.descendants import choice_text, choose_of_run  # torch and timm

    row = choose_of_run(run, rows, action.budget, plot=action.plot)
    text = json.dumps(row, indent=2) if action.json else choice_text(action.run, row, plot=action.plot)
    sys.stdout.write(text + "\n")


def _rows(run: FinishedRun, table: Path | None) -> list[PathRow]:
    """The evaluated paths of a run, with latencies if there is a table of them."""
    rows = read_rows(run.evaluated.folder / "paths.json")
    return with_table(rows, table) if table else rows


def export(action: ExportRun) -> None:
    """Writes a path of a finished run, or all of them, as a folder."""
    if bool(action.path) == action.all:
        raise UserError("lgp export RUN writes one path or all: give either --path KEY or --all.")
    if action.all and action.formats and "onnx" not in action.formats:
        raise UserError("--all writes graphs of ONNX alone: leave out --formats, or write --formats onnx.")
    if action.latency_table and not action.all:
        raise UserError("--latency-table is for the paths of --all, but --path names one: leave it out.")
    settings = ExportConfig(path=action.path, formats=action.formats, images=action.images)
    run = exporting(action.run, action.out, settings, action.data)
    rows = _rows(run, action.latency_table) if action.all else []
    if action.all and run.config.model.widths:
        raise UserError(
            f"{action.run} has nested widths, whose models are slices of one ViT and no whole tensors of a file: "
            "export each of them with --path KEY."
        )
    with locked(beside(action.out), "--out"):
        from lgp_dist.commands.descendants import export_of_run  # torch and timm

        sys.stdout.write(export_of_run(run, action.out, rows) + "\n")


def push(action: Push) -> None:
    """Uploads an exported folder."""
    from lgp_dist.commands import push as hub  # huggingface_hub

    sys.stdout.write(hub.push(action.folder, action.name, private=action.private) + "\n")


def predict(action: Predict) -> None:
    """Prints a table for each image."""
    if not action.images:
        raise UserError(f"No image is named: write lgp predict {action.folder} IMAGE.")
    if action.top < 1:
        raise UserError(f"--top is {action.top}, but must be 1 or more: choose another value.")
    from lgp_dist.commands.exported import read_config  # libraries of remote shards

    read_config(action.folder)
    missing = next((image for image in action.images if not image.is_file()), None)
    if missing is not None:
        raise UserError(f"There is no file {missing}: name an image.")
    from lgp_dist.commands.predict import predictions  # torch and timm

    found = dict(zip(map(str, action.images), predictions(action.folder, action.images, action.top), strict=True))
    if action.json:
        sys.stdout.write(json.dumps(found, indent=2, ensure_ascii=False) + "\n")
        return
    for image, guesses in found.items():
        table = text_table([image, "%"], [[name, f"{100 * value:.2f}"] for name, value in guesses])
        sys.stdout.write(table + "\n")


def specialise(action: SpecialiseRun) -> None:
    """Trains a path of a finished run alone, and says how much it gained."""
    if action.path and (action.max_params or action.max_flops):
        raise UserError("--path names the path, so --max-params and --max-flops would choose none: leave them out.")
    from lgp_dist.commands.specialise import chosen_key, gain_text, link_earlier_stages, specialised

    run = FinishedRun.open(action.run)
    key = chosen_key(run, action.path, Budget(action.max_params, action.max_flops))
    config = replace(specialised(run.config, key, action.epochs, action.lr), resume=action.resume)
    if action.data:
        config = replace(config, data=replace(config.data, root=action.data))
    check_start(config)
    first = os.environ.get("RANK", "0") == "0"
    if first:
        with locked(Path(config.directory) / LOCK, "--path"):
            link_earlier_stages(run.root, config)
    from lgp_dist.pipeline import run_stages  # torch, timm and deepspeed

    run_stages(config, STAGES)
    if first:
        sys.stdout.write(gain_text(Path(config.directory), key) + "\n")


def finetune_descendant(action: Downstream) -> None:
    """Trains an exported descendant on another data set."""
    out = Path(action.config.directory)
    with Preemption(at_once=True), ended(out):
        check_ranks(os.environ)
        if os.environ.get("WORLD_SIZE", "1") == "1":
            check_requests(Launch.from_environment(os.environ), action.engine)
            check_resume(action.config)
            check_unlocked(out / LOCK, "--out")
            from lgp_dist.commands.exported import completed  # libraries of remote shards

            completed(action.folder, action.config)
        from lgp_dist.commands import downstream  # torch, timm and deepspeed

        downstream.finetune_descendant(action.folder, action.config)
