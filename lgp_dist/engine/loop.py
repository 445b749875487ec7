"""The one training loop."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lgp_dist.config import GradientConfig, TrainConfig
from lgp_dist.engine.meters import StepMeter
from lgp_dist.engine.optim import Decays, build_optimizer, build_schedule, decays_matrix, planned_steps
from lgp_dist.engine.saving import Saver, Saving
from lgp_dist.engine.setup import Workers
from lgp_dist.engine.signals import Preemption
from lgp_dist.engine.trainer import Trainer, Watch
from lgp_dist.errors import UserError
from lgp_dist.protocols import Batch, StepContext, Task

Batches = Callable[[int, int], Iterator[Batch]]
"""(first optimizer step, number of steps) to this rank's batches, micro-step by micro-step."""


def train(
    task: Task,
    batches: Batches,
    config: TrainConfig,
    workers: Workers,
    *,
    stage: str,
    steps_per_epoch: float,
    run_dir: Path,
    trackers: tuple[str, ...] = (),
    tracked_config: dict[str, Any] | None = None,
    decays: Decays = decays_matrix,
    gradients: GradientConfig = GradientConfig(),  # noqa: B008  frozen
    watch: Watch | None = None,
    watch_every: int = 0,
    check: Callable[[list[dict[str, Any]]], None] = lambda lines: None,
    saving: Saving | None = None,
    seeds: Callable[[StepContext], int] | None = None,
) -> dict[str, Any]:
    """Trains `task.module` in place; afterwards every rank holds the same weights, whole.

    watch: called with the wrapped module in eval mode every `watch_every` optimizer steps; what it measures is logged.
    check: called on every rank with finished lines of metrics, which hold batches' facts summed over ranks; may raise.
    saving: how the stage is saved and resumed; None for not at all. seeds: of torch, for each micro-step, so that what
    is random in a forward is a function of the step.
    Returns steps of the whole run, and seconds and images of this part of it. Raises Preempted once it has saved for a
    signal.
    """
    steps = planned_steps(config, steps_per_epoch)
    task.module.to(workers.device).train()
    task.to(workers.device)
    optimizer = build_optimizer(task.module, config, decays, task.walk.parts)
    schedule = build_schedule(optimizer, config, steps, steps_per_epoch)
    trainer = Trainer(workers, task, optimizer, config, gradients, trackers, run_dir / "tracking" / stage)
    trainer.accelerator.init_trackers(stage, config=_plain(tracked_config or {}))
    metrics, began = run_dir / "metrics.jsonl", time.monotonic()
    with Preemption() as preemption:
        saver = Saver(saving, trainer, stage, steps, preemption) if saving else None
        first = saver.restore() if saver else 0
        meter = StepMeter(trainer, metrics, stage, steps, config.batch_size, config.log_every, check, first)
        stream = batches(first, steps - first)
        try:
            for step in range(first, steps):
                schedule.step_update(step)
                losses, counts, wait, spent = _step(trainer, stream, step, seeds)
                measured = trainer.measure(watch) if watch and watch_every and (step + 1) % watch_every == 0 else {}
                fixed = {"epoch": round(step / steps_per_epoch, 4), "lr": optimizer.param_groups[0]["lr"]} | measured
                facts = partial(_facts, task, step, config.accumulate, workers.world, fixed)
                meter.add(step, losses, facts, counts, data_wait_s=wait, step_time_s=spent)
                if saver:
                    saver.step_done(step + 1, measured, meter.flush)
        finally:
            meter.close()
        if saver:
            saver.close()
    trainer.close()
    _check_weights(task, stage)
    seconds, images = round(time.monotonic() - began, 3), (steps - first) * config.batch_size
    return {"steps": steps, "seconds": seconds, "images": images}


def _check_weights(task: Task, stage: str) -> None:
    if not all(bool(torch.isfinite(parameter).all()) for parameter in task.module.parameters()):
        raise UserError(f"The last step of stage {stage} made weights infinite: lower its train.lr.")


def _step(
    trainer: Trainer, stream: Iterator[Batch], step: int, seeds: Callable[[StepContext], int] | None
) -> tuple[list[dict[str, torch.Tensor]], Counter[str], float, float]:
    """One optimizer step: losses of its micro-steps, counts of its batches, seconds of waiting for them and in all."""
    task, workers = trainer.task, trainer.workers
    losses, counts, wait, start = [], Counter[str](), 0.0, time.monotonic()
    trainer.begin(step)
    for micro in range(trainer.train.accumulate):
        asked = time.monotonic()
        batch = next(stream).to(workers.device)
        wait += time.monotonic() - asked
        counts.update(batch.facts)
        with trainer.micro_step(step, micro) as context:
            if seeds:
                torch.manual_seed(seeds(context))
            with workers.autocast():
                parts = task.losses(trainer.module, batch, context)
            trainer.backward(parts["loss"])
        losses.append({name: part.detach() for name, part in parts.items()})
    trainer.finish(step)
    return losses, counts, wait, time.monotonic() - start


def _facts(task: Task, step: int, accumulate: int, world: int, fixed: dict[str, Any]) -> dict[str, Any]:
    """What a line of metrics says beside losses and times: what is given, and labels of all ranks and micro-steps."""
    labels: dict[str, list[Any]] = {}
    for rank in range(world):
        for micro in range(accumulate):
            for name, value in task.labels(StepContext(step, micro, rank, world)).items():
                labels.setdefault(name, []).append(value)
    return {**fixed, "world": world, "accumulate": accumulate, **labels}


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """Values that every tracker accepts: numbers and strings."""
    return {name: value if isinstance(value, (int, float, str, bool)) else str(value) for name, value in config.items()}
