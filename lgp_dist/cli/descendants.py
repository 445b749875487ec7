"""`lgp descend RUN`, `lgp export RUN` and `lgp finetune-descendant FOLDER`: what is done with a finished run."""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from lgp_dist.cli.exit_status import guarded
from lgp_dist.config.budget import Amount, Budget, parse_amount
from lgp_dist.config.run_config import (
    AugmentConfig,
    CheckpointConfig,
    DataConfig,
    EngineConfig,
    ExportConfig,
    FaultConfig,
    FinetuneConfig,
    Format,
    RunConfig,
    TrainConfig,
)
from lgp_dist.recipes import RECIPES

REGISTRY = tyro.constructors.ConstructorRegistry()
"""Types that tyro does not know."""


@REGISTRY.primitive_rule
def _amount(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec | None:
    if info.type is not Amount:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="AMOUNT",
        instance_from_str=lambda words: parse_amount(words[0]),
        is_instance=lambda value: isinstance(value, float | int),
        str_from_instance=lambda value: [f"{value:.12g}"],
    )


@dataclass(frozen=True)
class DescendRun:
    """The best evaluated path of a finished run within a budget."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run directory."""
    budget: tyro.conf.OmitArgPrefixes[Budget] = Budget()
    """Limits."""
    plot: bool = False
    """Draw accuracy against parameters, FLOPs and latency, with the choice marked: RUN/descend.png and .svg."""
    json: bool = False
    """Print an object with the fields of paths.json and latency."""
    debug: bool = False
    """Show tracebacks of errors that have a sentence."""


@dataclass(frozen=True)
class ExportRun:
    """A path of a finished run as a folder."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run directory."""
    path: str
    """Key of the path."""
    out: Path
    """Folder to write; must be empty or not exist."""
    formats: tuple[Format, ...] = ExportConfig().formats
    """As --export.formats of the stage."""
    images: int = ExportConfig().images
    """As --export.images of the stage."""
    data: str = ""
    """Root of the shards; empty for the one that the run names."""
    debug: bool = False
    """Show tracebacks of errors that have a sentence."""


@dataclass(frozen=True)
class Downstream:
    """An exported descendant, another data set, and how it is trained."""

    folder: Annotated[Path, tyro.conf.Positional]
    """An exported descendant."""
    data: str
    """Root of the shards: a folder, or an http(s)://, s3://, gs:// or hf:// address."""
    out: str = ""
    """Run directory, empty for runs/downstream; the new folder is OUT/export."""
    num_classes: int = 0
    """Classes; 0 for as many as the shards' manifest names."""
    train_split: str = "train"
    """Split to train on."""
    val_split: str = "validation"
    """Split to evaluate on and to check the new folder with."""
    seed: int = 0
    """Seeds the new head, order and augmentation."""
    threads: int = 8
    """Decoding threads per rank."""
    train: TrainConfig = TrainConfig(epochs=20.0, lr=1e-4, warmup_epochs=2.0, label_smoothing=0.1)
    """The loop."""
    augment: AugmentConfig = AugmentConfig()
    """Training augmentation."""
    engine: EngineConfig = EngineConfig()
    """Precision and device."""
    faults: FaultConfig = FaultConfig()
    """What stops training, and what does not."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Saving while it trains."""
    export: ExportConfig = ExportConfig()
    """Formats of the new folder."""
    resume: str = "auto"
    """As of a run: auto, latest, never or a path."""
    debug: bool = False
    """Show tracebacks of errors that have a sentence."""

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
            export=self.export,
            run_dir=self.out,
            resume=self.resume,
        )


def run_downstream(action: Downstream) -> None:
    """Does what the arguments ask for."""
    from lgp_dist.commands.downstream import finetune_descendant  # torch, timm and deepspeed, as below

    finetune_descendant(action.folder, action.config)


def _descend(action: DescendRun) -> None:
    from lgp_dist.commands.finished import (  # torch and timm, which `lgp --help` must not wait for
        choice_text,
        choose_of_run,
    )

    row = choose_of_run(action.run, action.budget, plot=action.plot)
    text = json.dumps(row, indent=2) if action.json else choice_text(action.run, row, plot=action.plot)
    sys.stdout.write(text + "\n")


def _export(action: ExportRun) -> None:
    from lgp_dist.commands.finished import export_of_run  # as above

    settings = ExportConfig(path=action.path, formats=action.formats, images=action.images)
    sys.stdout.write(export_of_run(action.run, action.out, settings, action.data) + "\n")


OF_A_RUN: dict[str, tuple[type, Callable[..., None]]] = {
    "descend": (DescendRun, _descend),
    "export": (ExportRun, _export),
}
"""Stage's command -> what it takes in place of a recipe, and what that calls."""


def of_a_run(arguments: Sequence[str]) -> bool:
    """Does what the arguments ask of a run directory; False where they name a recipe, or another command."""
    command, *rest = arguments or [""]
    if command not in OF_A_RUN or not rest or rest[0] in RECIPES or rest[0].startswith("-"):
        return False
    kind, call = OF_A_RUN[command]
    action = tyro.cli(kind, prog=f"lgp {command}", args=rest, registry=REGISTRY)
    guarded(lambda: call(action), action.debug, str(action.run))
    return True
