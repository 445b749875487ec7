"""The one training loop."""

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lgp_dist.config.run_config import GradientConfig, TrainConfig
from lgp_dist.engine.meters import StepMeter, StepResult
from lgp_dist.engine.optim import Decays, build_optimizer, build_schedule, decays_matrix, planned_steps, rate_of
from lgp_dist.engine.saver import Saver, SaverConfig
from lgp_dist.engine.step_filter import NotFinite, StepFilter
from lgp_dist.engine.tracking import Tracking
from lgp_dist.engine.trainer import Trainer, Watch
from lgp_dist.engine.watch.signals import Preemption
from lgp_dist.engine.workers import Workers
from lgp_dist.errors import UserError
from lgp_dist.protocols import Batch, StepContext, Task
from lgp_dist.run.facts import Training

Batches = Callable[[int, int], Iterator[Batch]]
"""(first optimizer step, number of steps) to this rank's batches, micro-step by micro-step."""
Seeds = Callable[[StepContext], int]
"""torch's seed for each micro-step, so that randomness in the forward depends only on the step."""


@dataclass(frozen=True)
class TrainingPlan:
    """What a stage trains, and how."""

    task: Task
    config: TrainConfig
    gradients: GradientConfig = GradientConfig()
    decays: Decays = decays_matrix
    rates: Mapping[str, float] = field(default_factory=dict)
    """Learning rate factors by skippable module; 1 for others."""
    watch: Watch | None = None
    """Measures the wrapped module in eval mode; the results are logged."""
    watch_every: int = 0
    """Optimizer steps between two measurements; 0 for none."""


@dataclass(frozen=True)
class RunSetup:
    """The run that a training is part of: its data, files and checkpoints."""

    stage: str
    batches: Batches
    steps_per_epoch: float
    run_dir: Path
    """Metrics are written here."""
    tracking: Tracking = field(default_factory=Tracking)
    check: Callable[[list[dict[str, Any]]], None] = lambda lines: None
    """Called on every rank with finished lines of metrics, with batch facts summed over ranks; may raise."""
    step_filter: StepFilter | None = None
    """Of this task and stage. Without one, the run stops at the first step that is not finite."""
    saver: SaverConfig | None = None
    """How the stage is saved and resumed; None to do neither."""
    seeds: Seeds | None = None


def train(plan: TrainingPlan, setup: RunSetup, workers: Workers) -> Training:
    """Trains `plan.task.module` in place; afterwards every rank holds the same whole weights.

    Raises Preempted once it has saved for a signal.
    """
    task, config, stage = plan.task, plan.config, setup.stage
    steps, began = planned_steps(config, setup.steps_per_epoch), time.monotonic()
    workers.watchdog.phase("start")
    with contextlib.ExitStack() as stack:
        task.to(workers.device)
        module, skippable = task.module.to(workers.device).train(), task.structure.skippable_modules
        optimizer = build_optimizer(module, config, plan.decays, skippable, plan.rates)
        schedule = build_schedule(optimizer, config, steps, setup.steps_per_epoch)
        step_filter = setup.step_filter or StepFilter(task, workers, config.accumulate, stage=stage)
        trainer = Trainer(workers, task, optimizer, config, plan.gradients, step_filter)
        saver = Saver(setup.saver, trainer, stage, steps, stack.enter_context(Preemption())) if setup.saver else None
        metrics = setup.run_dir / "metrics.jsonl"
        meter = partial(StepMeter, trainer, metrics, setup.tracking, stage, steps, setup.check)

        def one_step(step: int, stream: Iterator[Batch], meter: StepMeter) -> None:
            schedule.step_update(step)
            result = take_step(trainer, stream, step, setup.seeds)
            facts = {"epoch": round(step / setup.steps_per_epoch, 4), "lr": rate_of(optimizer)}
            if plan.watch and plan.watch_every and (step + 1) % plan.watch_every == 0:
                workers.watchdog.phase("measure")
                facts |= trainer.measure(plan.watch)
            labels = _labels(task, step, config.accumulate, workers.world)
            meter.add(step, result, facts | labels)
            if saver:
                workers.watchdog.note(step, "save")
                saver.step_done(step + 1, facts, meter.flush)

        first = _steps(one_step, setup.batches, meter, saver, steps)
        workers.watchdog.phase("end of training")
        averages = trainer.averaged_weights() if config.ema else {}
        trainer.close()
        task.module.load_state_dict(averages, strict=False)
    if not all(bool(torch.isfinite(parameter).all()) for parameter in task.module.parameters()):
        raise UserError(f"The last step of stage {stage} made weights infinite: lower its train.lr.")
    images, seconds = (steps - first) * config.batch_size, round(time.monotonic() - began, 3)
    return {"steps": steps, "seconds": seconds, "images": images}


def _steps(
    one_step: Callable[[int, Iterator[Batch], StepMeter], None],
    batches: Batches,
    new_meter: Callable[[int], StepMeter],
    saver: Saver | None,
    steps: int,
) -> int:
    """Runs the remaining steps; goes back to a checkpoint when the step filter asks for it. Returns the first step."""
    first = step = saver.restore() if saver else 0
    while True:
        meter, stream = new_meter(step), batches(step, steps - step)
        try:
            while step < steps:
                one_step(step, stream, meter)
                step += 1
            if saver:
                saver.close()
            return first
        except NotFinite as problem:
            meter.flush()
            if saver is None:
                raise
            step = saver.roll_back(problem)
        finally:
            meter.close()


def take_step(trainer: Trainer, stream: Iterator[Batch], step: int, seeds: Seeds | None = None) -> StepResult:
    """One optimizer step on the next batches of a stream."""
    losses, counts, wait, start = [], Counter[str](), 0.0, time.monotonic()
    watchdog = trainer.workers.watchdog
    trainer.begin(step)
    for micro in range(trainer.train.accumulate):
        asked, path = time.monotonic(), str(trainer.task.labels(trainer.context(step, micro)).get("path", ""))
        watchdog.note(step, "data", path)
        batch = next(stream).to(trainer.workers.device)
        wait += time.monotonic() - asked
        counts.update(batch.facts)
        with trainer.micro_step(step, micro) as context:
            if seeds:
                torch.manual_seed(seeds(context))
            watchdog.note(step, "forward", path)
            with trainer.workers.autocast():
                parts = trainer.task.losses(trainer.module, batch, context)
            watchdog.note(step, "backward", path)
            trainer.backward(parts["loss"])
        losses.append({name: part.detach() for name, part in parts.items()})
    watchdog.note(step, "step", path)
    verdict = trainer.finish(step)
    return StepResult(losses, counts, verdict.facts, wait, time.monotonic() - start)


def _labels(task: Task, step: int, accumulate: int, world: int) -> dict[str, Any]:
    """What a line of metrics says about all ranks and micro-steps: their number, and the task's labels of each."""
    labels: dict[str, list[Any]] = {}
    for rank in range(world):
        for micro in range(accumulate):
            for name, value in task.labels(StepContext(step, micro, rank, world)).items():
                labels.setdefault(name, []).append(value)
    return {"world": world, "accumulate": accumulate, **labels}
