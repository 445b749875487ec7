"""Cells of a study: an arm on one seed is an ordinary run, which takes over what an earlier one has made alike."""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lgp_dist.config.flat import STAGES
from lgp_dist.config.run_config import RunConfig
from lgp_dist.errors import UserError
from lgp_dist.files import replace_folder
from lgp_dist.run.artifacts import RunDirectory
from lgp_dist.study.questions import Arm, Question

WATCH_EVERY = 100
"""Optimizer steps between two measurements of all paths, where the recipe has none."""


@dataclass(frozen=True)
class Cell:
    """One run of a study."""

    arm: Arm
    seed: int
    config: RunConfig
    sources: dict[str, str] = field(default_factory=dict)
    """Content of its shards and files by setting, as `pipeline.sources` has it."""

    @property
    def name(self) -> str:
        """The cell in words."""
        return f"{self.arm.name}, seed {self.seed}"

    @property
    def folder(self) -> Path:
        """Its run directory."""
        return Path(self.config.run_dir)

    def depends_on(self, stage: str) -> dict[str, Any]:
        """All that the stage's artifact depends on."""
        return RunDirectory(self.folder, self.sources).depends_on(self.config, stage)

    def has(self, stage: str) -> bool:
        """Whether the stage's artifact lies there; the run itself judges it."""
        return (self.folder / stage / "artifact.json").is_file()


def cells_of(question: Question, base: RunConfig, seeds: Sequence[int], out: Path) -> list[Cell]:
    """All cells, one arm after the other. UserError where seeds come twice."""
    if not seeds or len(set(seeds)) != len(seeds):
        raise UserError(
            f"--seeds is {' '.join(map(str, seeds))}, but must name one seed or more, each once: change it."
        )
    if question.keeps_rows and not base.evaluate.before:
        raise UserError(
            f"evaluate.before is off, but study {question.name} compares the rows with what they were: leave it on."
        )
    found = []
    for arm in question.arms:
        for seed in seeds:
            config = arm.change(replace(base, seed=seed))
            watch = config.finetune.watch_every or WATCH_EVERY
            found.append(
                Cell(
                    arm,
                    seed,
                    replace(
                        config,
                        force=False,
                        run_dir=str(out / arm.name / f"seed{seed}"),
                        finetune=replace(config.finetune, watch_every=watch),
                        engine=replace(config.engine, threads=config.engine.threads or 1),
                    ),
                )
            )
    return found


def shared_stages(one: Cell, other: Cell) -> tuple[str, ...]:
    """Stages that two runs make alike: those before the first whose settings or files differ; none where one alone has
    an ancestry."""
    if one.config.needs_ancestry != other.config.needs_ancestry:
        return ()
    differ = (number for number, stage in enumerate(STAGES) if one.depends_on(stage) != other.depends_on(stage))
    return STAGES[: next(differ, len(STAGES))]


def leader_of(cell: Cell, cells: Sequence[Cell]) -> tuple[Cell | None, tuple[str, ...]]:
    """The earlier cell that makes the most of what this one needs, and those stages; None where none makes any."""
    best: tuple[Cell | None, tuple[str, ...]] = (None, ())
    for other in cells[: cells.index(cell)]:
        stages = shared_stages(cell, other)
        if len(stages) > len(best[1]):
            best = (other, stages)
    return best


def take_over(cell: Cell, leader: Cell, stages: Sequence[str]) -> None:
    """Links the leader's artifacts of these stages into the cell's folder, each whole or not at all.

    They are files that no run changes in place; where the file system has no links they are copied.
    """
    for stage in stages:
        if leader.has(stage) and not cell.has(stage):
            _copy_folder(leader.folder / stage, cell.folder / stage, copy_function=_link)


def adopt(cell: Cell, folders: Sequence[Path], ranks: int) -> None:
    """Takes over what a run in one of these folders has made as this cell would: the whole run, metrics too, if it was
    fine-tuned on as many ranks, or what comes before stage finetune.
    """
    if cell.folder.exists():
        return
    before = STAGES[: STAGES.index("finetune")]
    made = [(count_alike(RunDirectory(path, cell.sources), cell.config), path) for path in folders]
    count, path = max(made, key=lambda each: each[0], default=(0, cell.folder))
    if count == len(STAGES) and _ranks_of(path) == ranks:
        leave_out = shutil.ignore_patterns("checkpoints", "study.lock")
        _copy_folder(path, cell.folder, copy_function=_link_artifacts, ignore=leave_out)
    elif count:
        cell.folder.mkdir(parents=True)
        take_over(cell, replace(cell, config=replace(cell.config, run_dir=str(path))), before[:count])


def _ranks_of(path: Path) -> int:
    artifact = RunDirectory(path).find("finetune")
    return artifact.record["world"] if artifact else 0


def count_alike(run: RunDirectory, config: RunConfig) -> int:
    """How many stages, from the first on, a run has made as this configuration would."""
    for count, stage in enumerate(STAGES):
        try:
            if not run.is_current(stage, config):
                return count
        except UserError:
            return count
    return len(STAGES)


def _copy_folder(source: Path, target: Path, **options: Any) -> None:
    """`copytree`, whole or not at all."""
    replace_folder(target, lambda partial: shutil.copytree(source, partial, dirs_exist_ok=True, **options))


def _link_artifacts(source: str, target: str) -> str:
    """A link to an artifact's file, which never changes; a copy of any other, which may grow."""
    return _link(source, target) if (Path(source).parent / "artifact.json").is_file() else shutil.copy2(source, target)


def _link(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target
