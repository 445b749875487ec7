"""A finished run, opened: what it was made with. Needs no torch, so that the command line can open it first."""

import json
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lgp_dist.config.flat import flatten, stage_settings, unflatten
from lgp_dist.config.run_config import ExportConfig, RunConfig
from lgp_dist.errors import UserError, nearest
from lgp_dist.recipes import RECIPES
from lgp_dist.run.artifacts import Artifact, RunDirectory, is_complete
from lgp_dist.run.checks import check_config


@dataclass(frozen=True)
class FinishedRun:
    """A run directory in which every path is evaluated."""

    root: Path
    evaluated: Artifact
    """Its stage evaluate, all files whole."""
    config: RunConfig
    """The settings of this evaluation, and for those that no stage depends on the run's latest."""
    sources: dict[str, str]
    """Fingerprints of shards and weights that the run read, by setting."""

    @property
    def directory(self) -> RunDirectory:
        """The run directory, with what its artifacts are made with."""
        return RunDirectory(self.root, stage_settings(self.config) | self.sources, self.config.recipe)

    @staticmethod
    def open(root: Path, **changed: Any) -> "FinishedRun":
        """Reads a run directory; changed: parts of the configuration. UserError where it is no evaluated run or a value
        is out of range."""
        check_run(root, RECIPES)
        evaluated = RunDirectory(root).find("evaluate")
        assert evaluated is not None
        evaluated.check_files()
        made = evaluated.record["config"]
        settings = flatten(unflatten(made), with_runtime_only=False).keys() & made.keys()
        sources = {name: value for name, value in made.items() if name not in settings}
        config = unflatten(_latest(root / "config.json") | {name: made[name] for name in settings})
        config = replace(config, run_dir=str(root), force=False, **changed)
        check_config(config)
        return FinishedRun(root, evaluated, config, sources)


def exporting(root: Path, out: Path, settings: ExportConfig, data: str = "") -> FinishedRun:
    """A run that is to write the path of `settings` to a folder, from any device. UserError where the folder is there.

    data: another root of the shards.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is there already: choose another --out, or remove it.")
    run = FinishedRun.open(root, export=settings)
    config = replace(run.config, engine=replace(run.config.engine, device="auto"))
    if data:
        config = replace(config, data=replace(config.data, root=data))
    return replace(run, config=config)


def check_run(root: Path, others: Collection[str] = ()) -> None:
    """UserError where a folder holds no evaluated run, with the nearest that does; others: names it may stand for."""
    if is_complete(root, "evaluate"):
        return
    if root.is_dir():
        raise UserError(f"{root} holds no evaluated run: name a run directory in which `lgp evaluate` is complete.")
    runs = [str(found.parents[1]) for found in sorted(root.parent.glob("*/evaluate/artifact.json"))]
    what = "is neither a recipe nor the directory of a run" if others else "is no run directory"
    advice = nearest(str(root), [*others, *runs], "name a folder in which `lgp evaluate` is complete")
    raise UserError(f"{root} {what}: {advice}.")


def _latest(path: Path) -> dict[str, Any]:
    """Settings of a run's latest start."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): put back what the run wrote.") from None
