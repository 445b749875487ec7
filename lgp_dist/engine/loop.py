"""The one training loop."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from lgp_dist.config import TrainConfig
from lgp_dist.engine.gradients import fill_missing
from lgp_dist.engine.meters import StepMeter
from lgp_dist.engine.optim import Decays, build_optimizer, build_schedule, decays_matrix, planned_steps
from lgp_dist.engine.setup import Trainer, Workers
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
) -> dict[str, Any]:
    """Trains `task.module` in place; afterwards every rank holds the same weights.

    Returns steps, seconds and images of the run.
    """
    steps = planned_steps(config, steps_per_epoch)
    per_rank = config.batch_size // (workers.world * config.accumulate)
    trainer = Trainer(workers, config, per_rank, trackers, run_dir / "tracking" / stage)
    trainer.accelerator.init_trackers(stage, config=_plain(tracked_config or {}))
    task.module.to(workers.device).train()
    task.to(workers.device)
    optimizer = build_optimizer(task.module, config, decays)
    schedule = build_schedule(optimizer, config, steps, steps_per_epoch)
    module, wrapped_optimizer = trainer.prepare(task.module, optimizer)
    meter = StepMeter(trainer, run_dir / "metrics.jsonl", stage, steps, config.batch_size, config.log_every)
    stream, began = batches(0, steps), time.monotonic()
    try:
        for step in range(steps):
            schedule.step_update(step)
            losses, wait, start = [], 0.0, time.monotonic()
            for micro in range(config.accumulate):
                asked = time.monotonic()
                batch = next(stream).to(workers.device)
                wait += time.monotonic() - asked
                context = StepContext(step, micro, workers.rank, workers.world)
                with trainer.accelerator.accumulate(module):
                    with workers.autocast():
                        parts = task.losses(module, batch, context)
                    fill_missing(task.module)
                    trainer.backward(parts["loss"])
                    trainer.step(module, wrapped_optimizer)
                losses.append({name: part.detach() for name, part in parts.items()})
            facts = _facts(task, step, config, workers.world, steps_per_epoch, optimizer.param_groups[0]["lr"])
            meter.add(step, losses, facts, data_wait_s=wait, step_time_s=time.monotonic() - start)
    finally:
        meter.close()
    trainer.close()
    if not all(bool(torch.isfinite(parameter).all()) for parameter in task.module.parameters()):
        raise UserError(f"The last step of stage {stage} made weights infinite: lower its train.lr.")
    return {"steps": steps, "seconds": round(time.monotonic() - began, 3), "images": steps * config.batch_size}


def _facts(
    task: Task, step: int, config: TrainConfig, world: int, steps_per_epoch: float, lr: float
) -> Callable[[], dict[str, Any]]:
    """What a line of metrics says beside losses and times: epoch, rate, and the labels of all ranks and micro-steps."""

    def facts() -> dict[str, Any]:
        labels: dict[str, list[Any]] = {}
        for rank in range(world):
            for micro in range(config.accumulate):
                for name, value in task.labels(StepContext(step, micro, rank, world)).items():
                    labels.setdefault(name, []).append(value)
        return {"epoch": round(step / steps_per_epoch, 4), "lr": lr, **labels}

    return facts


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """Values that every tracker accepts: numbers and strings."""
    return {name: value if isinstance(value, (int, float, str, bool)) else str(value) for name, value in config.items()}
