"""`lgp descend RUN`, `lgp export RUN` and `lgp finetune-descendant FOLDER`: what is done with a finished run."""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from lgp_dist.budget import Amount, Budget, parse_amount
from lgp_dist.cli.guard import guarded
from lgp_dist.config import ExportConfig, Format
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


def _descend(action: DescendRun) -> None:
    from lgp_dist.chosen import choice_text, choose_of_run  # torch and timm, which `lgp --help` must not wait for

    row = choose_of_run(action.run, action.budget, plot=action.plot)
    text = json.dumps(row, indent=2) if action.json else choice_text(action.run, row, plot=action.plot)
    sys.stdout.write(text + "\n")


def _export(action: ExportRun) -> None:
    from lgp_dist.chosen import export_of_run  # as above

    settings = ExportConfig(path=action.path, formats=action.formats, images=action.images)
    export_of_run(action.run, action.out, settings, action.data)
    sys.stdout.write(f"{action.out}: {action.path}, checked; README.md in it says how to load it\n")


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
