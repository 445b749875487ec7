"""What a training run reports: a line of metrics per step, a progress bar, the log, trackers."""

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lgp_dist.engine.progress import new_bar
from lgp_dist.engine.tracking import Tracking
from lgp_dist.engine.trainer import Trainer
from lgp_dist.run.metrics import MetricsFile

log = logging.getLogger("lgp")


class StepResult(NamedTuple):
    """What one rank knows about an optimizer step."""

    losses: list[dict[str, Tensor]]
    """Of each micro-step."""
    counts: Counter[str]
    """Facts of its batches."""
    facts: dict[str, Any]
    """What the step filter says about it."""
    data_wait_s: float
    step_time_s: float


class StepMeter:
    """Collects steps without waiting for the device, and reports the first at once, then every few steps.

    Losses are means over ranks and micro-steps; images/s and counts are sums over ranks; times are this rank's.
    """

    def __init__(
        self,
        trainer: Trainer,
        metrics: Path,
        tracking: Tracking,
        stage: str,
        steps: int,
        check: Callable[[list[dict[str, Any]]], None],
        first: int,
    ):
        """steps: of the whole run. first: the step to begin with. check: called with the lines of every report."""
        self.trainer, self.stage, self.steps, self.first, self.check = trainer, stage, steps, first, check
        self.tracking, self.workers, self.every = tracking, trainer.workers, max(1, trainer.train.log_every)
        self.file = MetricsFile(metrics, stage, first) if self.workers.is_main else None
        self.losses: list[dict[str, Tensor]] = []
        self.counts: list[Mapping[str, int]] = []
        self.lines: list[dict[str, Any]] = []
        self.totals = Counter[str]()
        self.began = time.monotonic()
        self.bar = new_bar(self.workers.is_main, total=steps, initial=first, desc=stage, unit="step")

    def add(self, step: int, result: StepResult, facts: Mapping[str, Any]) -> None:
        """Takes an optimizer step. facts: more for its line."""
        self.counts.append(dict(result.counts))
        losses = result.losses
        self.losses.append({name: torch.stack([micro[name] for micro in losses]).mean() for name in losses[0]})
        speed = round(self.trainer.train.batch_size / max(result.step_time_s, 1e-9), 2)
        times = {"data_wait_s": round(result.data_wait_s, 6), "step_time_s": round(result.step_time_s, 6)}
        self.lines.append({"step": step, **result.facts, **facts, "images_per_s": speed, **times})
        self.bar.update(1)
        if len(self.lines) >= self.every or step + 1 == self.steps or step == self.first:
            self.flush()  # the first at once: a person sees that it trains, and how fast

    def flush(self) -> None:
        """Averages losses over ranks, writes and shows the lines. A loss that is not finite is written as null."""
        if not self.lines:
            return
        names = list(self.losses[0])
        values = torch.stack([torch.stack([part[name].float() for name in names]) for part in self.losses])
        means = self.workers.sum(values.detach()) / self.workers.world
        for line, row in zip(self.lines, means.tolist(), strict=True):
            line.update(zip(names, (value if math.isfinite(value) else None for value in row), strict=True))
        if counted := sorted(self.counts[0]):
            rows = torch.tensor([[part[name] for name in counted] for part in self.counts], dtype=torch.float64)
            for line, row in zip(self.lines, self.workers.sum(rows).tolist(), strict=True):
                line.update(zip(counted, map(int, row), strict=True))
                self.totals.update({name: line[name] for name in counted})
        if self.file is not None:
            first, problem = not self.file.lost, self.file.append(self.lines)
            if problem and first:
                log.warning("%s cannot be written (%s): the run continues, lines are lost", self.file.path, problem)
            self._show()
            self.tracking.add(self.stage, self.lines)
        done, self.losses, self.lines, self.counts = self.lines, [], [], []
        self.check(done)

    def _show(self) -> None:
        seconds, wait = (sum(line[name] for line in self.lines) for name in ("step_time_s", "data_wait_s"))
        losses = [line["loss"] for line in self.lines if line["loss"] is not None]
        shown = {
            "loss": f"{sum(losses) / len(losses):.3f}" if losses else "not finite",
            "img/s": f"{self.trainer.train.batch_size * len(self.lines) / seconds:.0f}",
            "data wait": f"{wait / seconds:.0%}",
            **{name.replace("_", " "): str(total) for name, total in self.totals.items() if total},
        }
        self.bar.set_postfix(shown)
        if self.bar.disable:
            done = self.lines[-1]["step"] + 1
            left = (time.monotonic() - self.began) / (done - self.first) * (self.steps - done)
            text = "  ".join(f"{name} {value}" for name, value in shown.items())
            log.info("%s  step %d/%d  %s  left %ds", self.stage, done, self.steps, text, left)

    def close(self) -> None:
        """Ends the bar, and logs how many lines were lost."""
        self.bar.close()
        if self.file is not None and self.file.lost:
            log.warning("%s: %s has lost %d lines", self.stage, self.file.path, self.file.lost)
