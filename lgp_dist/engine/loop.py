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
from lgp_dist.engine.setup import Workers
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
) -> dict[str, Any]:
    """Trains `task.module` in place; afterwards every rank holds the same weights, whole.

    watch: called with the wrapped module in eval mode every `watch_every` optimizer steps; what it measures is logged.
    check: called on every rank with finished lines of metrics, which hold batches' facts summed over ranks; may raise.
    Returns steps, seconds and images of the run.
    """
    steps = planned_steps(config, steps_per_epoch)
    task.module.to(workers.device).train()
    task.to(workers.device)
    optimizer = build_optimizer(task.module, config, decays, task.walk.parts)
    schedule = build_schedule(optimizer, config, steps, steps_per_epoch)
    trainer = Trainer(workers, task, optimizer, config, gradients, trackers, run_dir / "tracking" / stage)
    trainer.accelerator.init_trackers(stage, config=_plain(tracked_config or {}))
    meter = StepMeter(trainer, run_dir / "metrics.jsonl", stage, steps, config.batch_size, config.log_every, check)
    stream, began = batches(0, steps), time.monotonic()
    try:
        for step in range(steps):
            schedule.step_update(step)
            losses, counts, wait, start = [], Counter[str](), 0.0, time.monotonic()
            trainer.begin(step)
            for micro in range(config.accumulate):
                asked = time.monotonic()
                batch = next(stream).to(workers.device)
                wait += time.monotonic() - asked
                counts.update(batch.facts)
                with trainer.micro_step(step, micro) as context:
                    with workers.autocast():
                        parts = task.losses(trainer.module, batch, context)
                    trainer.backward(parts["loss"])
                losses.append({name: part.detach() for name, part in parts.items()})
            trainer.finish(step)
            spent = time.monotonic() - start
            due = watch is not None and watch_every and (step + 1) % watch_every == 0
            fixed = {"epoch": round(step / steps_per_epoch, 4), "lr": optimizer.param_groups[0]["lr"]}
            fixed |= trainer.measure(watch) if due else {}
            facts = partial(_facts, task, step, config.accumulate, workers.world, fixed)
            meter.add(step, losses, facts, counts, data_wait_s=wait, step_time_s=spent)
    finally:
        meter.close()
    trainer.close()
    if not all(bool(torch.isfinite(parameter).all()) for parameter in task.module.parameters()):
        raise UserError(f"The last step of stage {stage} made weights infinite: lower its train.lr.")
    return {"steps": steps, "seconds": round(time.monotonic() - began, 3), "images": steps * config.batch_size}


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
