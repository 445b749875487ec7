"""What a run says while it trains: a line of metrics per step, one progress bar, the log."""

import logging
import math
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from lgp_dist.engine.trackers import Tracking
from lgp_dist.engine.trainer import Trainer
from lgp_dist.run.metrics import MetricsFile

log = logging.getLogger("lgp")


class StepMeter:
    """Collects steps without waiting for the device, and writes them every few steps.

    Losses are means over ranks and micro-steps; images/s and counts are of all ranks; times are of this rank.
    """

    def __init__(
        self,
        trainer: Trainer,
        metrics: Path,
        stage: str,
        steps: int,
        check: Callable[[list[dict[str, Any]]], None],
        first: int,
    ):
        """steps: of the whole run. first: the one to begin with."""
        self.check, self.counts = check, list[Mapping[str, int]]()
        self.totals: dict[str, int] = {}
        self.trainer, self.every = trainer, max(1, trainer.train.log_every)
        self.images_per_step = trainer.train.batch_size
        self.main = trainer.workers.is_main
        self.file = MetricsFile(metrics, stage, first) if self.main else None
        self.tracking = Tracking(trainer.accelerator)
        self.losses: list[dict[str, Tensor]] = []
        self.lines: list[dict[str, Any]] = []
        self.first, self.steps, self.began = first, steps, time.monotonic()
        terminal = sys.stderr.isatty()
        quiet = not (self.main and terminal)
        self.bar = tqdm(total=steps, initial=first, desc=stage, unit="step", disable=quiet, dynamic_ncols=True)
        self.plain = self.main and not terminal
        self.stage = stage

    def add(
        self,
        step: int,
        losses: list[dict[str, Tensor]],
        facts: Callable[[], dict[str, Any]],
        counts: Mapping[str, int],
        times: Mapping[str, float],
    ) -> None:
        """Takes one optimizer step: losses of its micro-steps, facts of its line, counts of this rank, seconds."""
        self.counts.append(dict(counts))
        self.losses.append({name: torch.stack([part[name] for part in losses]).mean() for name in losses[0]})
        speed = self.images_per_step / max(times["step_time_s"], 1e-9)
        rounded = {name: round(value, 6) for name, value in times.items()}
        self.lines.append({"step": step, **facts(), "images_per_s": round(speed, 2), **rounded})
        self.bar.update(1)
        if len(self.lines) >= self.every or step + 1 == self.steps:
            self.flush()

    def flush(self) -> None:
        """Averages losses over ranks, writes and shows them; one that is not finite is written as null."""
        if not self.lines:
            return
        names = list(self.losses[0])
        values = torch.stack([torch.stack([part[name].float() for name in names]) for part in self.losses])
        values = self.trainer.workers.sum(values.detach()) / self.trainer.workers.world
        for line, row in zip(self.lines, values.tolist(), strict=True):
            line.update(zip(names, (value if math.isfinite(value) else None for value in row), strict=True))
        self._count()
        if self.main:
            first, problem = not self.file.lost, self.file.append(self.lines)
            if problem and first:
                log.warning("%s cannot be written (%s): the run goes on and counts lost lines", self.file.path, problem)
            self._show()
        done, self.losses, self.lines, self.counts = self.lines, [], [], []
        self.check(done)

    def _count(self) -> None:
        """Sums counts over ranks into the lines."""
        names = sorted(self.counts[0])
        if not names:
            return
        rows = torch.tensor([[part[name] for name in names] for part in self.counts], dtype=torch.float64)
        for line, row in zip(self.lines, self.trainer.workers.sum(rows).tolist(), strict=True):
            line.update(zip(names, map(int, row), strict=True))
        for name in names:
            self.totals[name] = self.totals.get(name, 0) + sum(line[name] for line in self.lines)

    def _show(self) -> None:
        last, count = self.lines[-1], len(self.lines)
        times = {name: sum(line[name] for line in self.lines) for name in ("step_time_s", "data_wait_s")}
        speed = self.images_per_step * count / times["step_time_s"]
        wait = times["data_wait_s"] / times["step_time_s"]
        losses = [line["loss"] for line in self.lines if line["loss"] is not None]
        shown = {
            "loss": f"{sum(losses) / len(losses):.3f}" if losses else "not finite",
            "img/s": f"{speed:.0f}",
            "data wait": f"{wait:.0%}",
            **{name.replace("_", " "): str(total) for name, total in self.totals.items() if total},
        }
        self.bar.set_postfix(shown)
        if self.plain:
            done, to_do = last["step"] + 1 - self.first, self.steps - last["step"] - 1
            left = (time.monotonic() - self.began) / done * to_do
            parts = "  ".join(f"{name} {value}" for name, value in shown.items())
            log.info("%s  step %d/%d  %s  left %ds", self.stage, last["step"] + 1, self.steps, parts, left)
        self.tracking.add(self.lines)

    def close(self) -> None:
        """Ends the bar, and says what was lost."""
        self.bar.close()
        lost = {str(self.file.path): self.file.lost, "A tracker": self.tracking.lost} if self.main else {}
        for place, count in lost.items():
            if count:
                log.warning("%s: %s has lost %d lines", self.stage, place, count)
