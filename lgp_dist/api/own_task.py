"""Training of a network of one's own with this project's engine."""

import atexit
import contextlib
import logging
import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lgp_dist.config.flat import flatten
from lgp_dist.config.ranges import check_ranges
from lgp_dist.config.run_config import CheckpointConfig, EngineConfig, TrainConfig
from lgp_dist.engine.checkpoints.checkpoint_dir import CheckpointDir
from lgp_dist.engine.loop import RunSetup, TrainingPlan
from lgp_dist.engine.loop import train as train_plan
from lgp_dist.engine.saver import SaverConfig
from lgp_dist.engine.workers import Workers
from lgp_dist.errors import UserError, nearest
from lgp_dist.files import LOCK, locked
from lgp_dist.paths.stratified import draw_index
from lgp_dist.protocols import Batch, ModuleStructure, StepContext
from lgp_dist.run.facts import Training

log = logging.getLogger("lgp")


@dataclass
class OwnTask:
    """A network of one's own and its loss, which `train` trains. Ranks may train different parts of it in a step."""

    module: nn.Module
    """Everything that is trained."""
    loss: Callable[[nn.Module, Batch, StepContext], Tensor]
    """(module as the engine wraps it, batch, place) -> scalar loss."""
    order: tuple[str, ...] = ()
    """Names of the submodules that every forward calls once, in this order; together they hold all parameters. Each
    takes a tensor as its first argument and returns one; where a forward does not need it, it returns its input. Empty
    where every forward runs everything."""
    skippable: tuple[str, ...] = ()
    """Names of those that a forward may skip."""
    uses: Callable[[StepContext], Collection[str]] = lambda context: ()
    """Place -> the skippable ones that its forward uses. Pure: every rank asks it for all ranks."""
    structure: ModuleStructure = field(init=False)
    """order and skippable, for the engine."""

    def __post_init__(self) -> None:
        self.structure, known = ModuleStructure(self.order, self.skippable), dict(self.module.named_modules())
        for name in (*self.order, *self.skippable):
            if name not in known:
                raise UserError(
                    f"The module has no submodule {name!r}: {nearest(name, known, 'name one that it has')}."
                )
        within = tuple(f"{part}." for part in self.order)
        for name in self.skippable:
            if not f"{name}.".startswith(within):
                raise UserError(f"skippable names {name!r}, which no submodule of order holds: add the one that does.")
        if twice := [name for name in self.order if self.order.count(name) > 1]:
            raise UserError(f"order names {twice[0]!r} twice, but a forward calls each submodule once.")
        for name, _ in self.module.named_parameters() if self.order else ():
            if not name.startswith(within):
                raise UserError(f"Parameter {name} is in no submodule of order: add the one that holds it.")

    def used(self, context: StepContext) -> frozenset[str]:
        """For the engine; UserError where `uses` names what is not skippable."""
        found = frozenset(self.uses(context))
        if wrong := sorted(found - {*self.skippable}):
            raise UserError(f"uses returns {wrong[0]!r}, which skippable does not name: add it there, or correct it.")
        return found

    def losses(self, module: nn.Module, batch: Batch, context: StepContext) -> dict[str, Tensor]:
        """For the engine."""
        return {"loss": self.loss(module, batch, context)}

    def labels(self, context: StepContext) -> dict[str, Any]:
        """Metrics name what each rank used."""
        return {"path": "+".join(sorted(self.uses(context)))} if self.skippable else {}

    def to(self, device: torch.device) -> None:
        """Does nothing: there is only the module."""


def _seed(place: StepContext) -> int:
    return draw_index(2**63, "torch", place.step, place.micro_step, place.rank)


def train(
    task: OwnTask,
    batches: Callable[[StepContext], Batch],
    steps: int,
    out: str | Path,
    config: TrainConfig = TrainConfig(warmup_epochs=0.0),  # noqa: B008  frozen
    engine: EngineConfig = EngineConfig(precision="fp32"),  # noqa: B008  frozen
    checkpoint_every: int = 0,
) -> Training:
    """Trains `task.module` in place, on all ranks of the launch; afterwards every rank holds the same whole weights.

    batches: place -> the images of its micro-step, equally many everywhere. Pure: it is asked for a place again. out:
    folder of metrics.jsonl and of checkpoints. config: optimizer, learning rate and micro-steps; `steps` and `batches`
    take the place of epochs and batch_size. An epoch is the whole training, of which warmup_epochs is a share.
    checkpoint_every: optimizer steps between two checkpoints; 0 for none. With checkpoints, a call goes on from the
    newest one in `out`, also at another number of ranks or under another engine, and a signal such as SIGTERM raises
    lgp_dist.errors.Preempted after a save. torch's seed is set for each micro-step. Without a launcher it is one
    process. UserError where an argument is wrong, `out` is in use or its checkpoints have other settings.
    """
    check_ranges(config, "config.")
    check_ranges(engine, "engine.")
    for name, value, least in (("steps", steps, 1), ("checkpoint_every", checkpoint_every, 0)):
        if type(value) is not int or value < least:
            raise UserError(f"{name} is {value!r}, but must be a whole number from {least} on.")
    out, is_main = Path(out), os.environ.get("RANK", "0") == "0"
    with locked(out / LOCK, "out") if is_main else contextlib.nullcontext():
        workers = Workers.start(engine)
        atexit.register(workers.close)  # not before: another training of this process joins the same group
        rank, world = workers.rank, workers.world
        images = len(batches(StepContext(0, 0, rank, world)).images)
        settings = {"steps": steps, **flatten(config, with_runtime_only=False, prefix="config.")}
        config = replace(config, epochs=1.0, max_steps=0, batch_size=images * world * config.accumulate)

        def stream(start: int, count: int) -> Iterator[Batch]:
            for step in range(start, start + count):
                for micro in range(config.accumulate):
                    yield batches(StepContext(step, micro, rank, world))

        saves, saver = CheckpointConfig(checkpoint_every), None
        if checkpoint_every:
            folder = out / "checkpoints"
            saver = SaverConfig(folder, saves, 0, settings, {}, lambda step: {}, lambda state, step: None)
            if is_main and (there := CheckpointDir(folder).steps()):
                log.warning("The training goes on from step %d in %s; another out begins again.", max(there), folder)
        setup = RunSetup("train", stream, steps, out, saver=saver, seeds=_seed)
        facts = train_plan(TrainingPlan(task, config), setup, workers)
        workers.barrier()
    return facts
