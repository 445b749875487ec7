"""When a stage is saved, and from where it resumes."""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from lgp_dist.config.run_config import CheckpointConfig
from lgp_dist.engine.checkpointer import Checkpointer
from lgp_dist.engine.checkpoints.checkpoint_dir import CheckpointDir
from lgp_dist.engine.checkpoints.manifest import TrainState, check_settings
from lgp_dist.engine.step_filter import FilterState, NotFinite
from lgp_dist.engine.trainer import Trainer
from lgp_dist.engine.watch.signals import Preemption
from lgp_dist.errors import Preempted

log = logging.getLogger("lgp")


@dataclass(frozen=True)
class SaverConfig:
    """How a stage is saved and resumed."""

    folder: Path
    """Of its checkpoints, on a file system that all ranks share."""
    checkpoint: CheckpointConfig
    seed: int
    """The recipe's."""
    settings: Mapping[str, Any]
    """What the stage depends on, by dotted key. A checkpoint with other settings is refused."""
    versions: Mapping[str, str]
    """Noted in every checkpoint."""
    data_state: Callable[[int], Mapping[str, Any]]
    """Returns the state of the training stream after this many steps."""
    data_restore: Callable[[Mapping[str, Any], int], None]
    """Makes the stream continue from a state, at a step."""
    resume: str = "auto"
    """auto, latest, never or a path."""
    allow: tuple[str, ...] = ()
    """Settings that may differ."""


class Saver:
    """The checkpoints of one stage: whether one is due, and what it holds besides weights and optimizer state."""

    def __init__(self, config: SaverConfig, trainer: Trainer, stage: str, steps: int, preemption: Preemption):
        self.config, self.trainer, self.preemption = config, trainer, preemption
        workers = trainer.workers
        self.rolled = 0
        """How often the stage went back to a checkpoint."""
        self.checkpointer = Checkpointer(CheckpointDir(config.folder), workers, trainer.fragments(), config.checkpoint)
        self.state = TrainState(
            stage=stage,
            step=0,
            steps=steps,
            seed=config.seed,
            data={},
            config=config.settings,
            world=workers.world,
            engine=workers.launch.engine_name,
            versions=config.versions,
        )

    def restore(self, resume: str = "") -> int:
        """Loads the checkpoint that `resume`, or else the recipe, asks for. Returns the step to begin with.

        Raises UserError if it does not exist or does not fit.
        """
        mine, resume = self.state, resume or self.config.resume
        found = self.checkpointer.restore(
            resume, mine.stage, lambda state: check_settings(state, mine, self.config.allow)
        )
        if found is None:
            why = "--resume never" if resume == "never" else f"no checkpoint in {self.config.folder}"
            log.info("%s: begins at step 0 of %d (%s)", mine.stage, mine.steps, why)
            return 0
        self.config.data_restore(found.data, found.step)
        if found.guard:
            self.trainer.step_filter.load_state_dict(cast(FilterState, found.guard))
        if self.trainer.scaler is not None and found.loss_scale is not None:
            self.trainer.scaler.value, self.trainer.scaler.good = found.loss_scale, found.good_steps
        self.state = replace(mine, best=found.best)
        log.info("%s: resumes from step %d of %d", mine.stage, found.step, mine.steps)
        if (found.world, found.engine) != (mine.world, mine.engine):
            was, now = (f"{state.world} rank(s) of {state.engine}" for state in (found, mine))
            log.info("%s: was saved by %s, resumes with %s", mine.stage, was, now)
        return found.step

    def roll_back(self, problem: NotFinite) -> int:
        """Loads the newest checkpoint again, for another try. Returns its step.

        The data continues after the bad step, so that the cause does not recur; each step keeps its paths. Raises
        NotFinite, which says how to reproduce the step, if faults.rollback allows no further try.
        """
        self.checkpointer.wait()
        checkpoints, allowed = self.checkpointer.checkpoint_dir, self.trainer.step_filter.faults.rollback
        newest = int(self.trainer.workers.highest([max(checkpoints.steps(), default=0)])[0])
        if self.rolled >= allowed or not newest:
            start = f" with --resume {checkpoints.final(newest)}" if newest else ""
            raise NotFinite(f"{problem} The same command{start} reproduces this step.", problem.step) from problem
        self.rolled += 1
        if self.trainer.workers.is_main:
            log.warning("%s Going back to the last checkpoint, %d of %d times.", problem, self.rolled, allowed)
        after = self.config.data_state(problem.step + 1)
        step = self.restore("latest")
        self.config.data_restore(after, step)
        return step

    def step_done(self, step: int, facts: Mapping[str, Any], flush: Callable[[], None]) -> None:
        """Settles the save in progress, and begins one that is due. Raises Preempted once it is safe to leave.

        step: number of steps done. facts: of the step, with accuracies of paths as top1/KEY if they were measured.
        flush: writes all metrics to their file.
        """
        saves, best = self.checkpointer, self.state.best
        asked, worst = self.trainer.workers.highest([self.preemption.asked, saves.status])
        saves.settle(int(worst))
        top1 = [value for name, value in facts.items() if name.startswith("top1/")]
        score = sum(top1) / len(top1) if top1 else None
        better = score is not None and (best is None or score > best)
        last, every = step == self.state.steps, self.config.checkpoint.every
        if better:
            self.state = replace(self.state, best=score)
        if asked or not last and (better or every and step % every == 0):
            flush()
            self._save(step, score)
        if asked:
            saves.wait()
            raise Preempted(self.state.stage, step, saved=step in saves.checkpoint_dir.steps())

    def _save(self, step: int, score: float | None) -> None:
        scaler = self.trainer.scaler
        self.checkpointer.save(
            replace(
                self.state,
                step=step,
                data=self.config.data_state(step),
                score=score,
                guard=self.trainer.step_filter.state_dict(),
                loss_scale=scaler.value if scaler else None,
                good_steps=scaler.good if scaler else 0,
                created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            )
        )

    def close(self) -> None:
        """Waits for the save in progress."""
        self.checkpointer.wait()
