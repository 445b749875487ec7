"""Where the time of an optimizer step goes: a clock at the places where the loop takes notes for its watchdog."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from lgp_dist.engine.comm_stats import CommStats
from lgp_dist.engine.watch.watchdog import Watchdog
from lgp_dist.protocols import Batch, StepContext, Task

PHASES = ("data", "forward", "backward", "exchange", "optimizer", "loop")
"""Parts of a step: waiting for a batch, forwards (the ancestry's too), backwards, operations between ranks with the
waits for each other, the optimizer's step, and all else that the loop does (audit, guard, clipping, metrics)."""
NOTES = {"data": "data", "forward": "forward", "backward": "backward", "step": "loop", "save": "loop"}
"""The loop's notes and the parts that they begin."""


class Clock(Watchdog):
    """Takes the loop's notes; while it is on, adds up the seconds between them, step by step.

    A GPU is waited for at every note, so what it does ahead is not seen: throughput is measured without.
    """

    def __init__(self, device: torch.device):
        super().__init__(Path(), 0, 1, 0.0)
        self.device, self.traffic = device, None
        self.steps: list[dict[str, float]] = []
        self._on, self._phase, self._since, self._sent = False, "data", 0.0, 0.0
        self._open = dict.fromkeys(PHASES, 0.0)
        self._counting: Any = None

    def note(self, step: int, phase: str, path: str | None = None) -> None:
        """As the watchdog's."""
        if self._on:
            self._to(NOTES[phase])

    def start(self) -> None:
        """Begins within a step's wait for data."""
        if self.traffic is not None:
            self._counting = self.traffic.counting()
            self._counting.__enter__()
        self._hooks = (
            register_optimizer_step_pre_hook(lambda *_: self._to("optimizer")),
            register_optimizer_step_post_hook(lambda *_: self._to("loop")),
        )
        self._on, self._phase, self._open = True, "data", dict.fromkeys(PHASES, 0.0)
        self._sent, self._since = 0.0, time.perf_counter()

    def stop(self) -> list[dict[str, float]]:
        """Seconds of every phase in each whole step since `start`."""
        self._on = False
        for hook in self._hooks:
            hook.remove()
        if self._counting is not None:
            self._counting.__exit__(None, None, None)
            self._counting = None
        steps, self.steps = self.steps, []
        return steps

    def _to(self, phase: str) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        now, sent = time.perf_counter(), self.traffic.seconds() if self.traffic else 0.0
        self._open[self._phase] += now - self._since - (sent - self._sent)
        self._open["exchange"] += sent - self._sent
        if phase == "data" and self._phase == "loop":
            self.steps.append(self._open)
            self._open = dict.fromkeys(PHASES, 0.0)
        self._phase, self._since, self._sent = phase, now, sent


class Shown:
    """A task that shows its wrapped module to `seen` before the first forward."""

    def __init__(self, task: Task, seen: Callable[[Any], None]):
        self.task, self.module, self.structure = task, task.module, task.structure
        self.used, self.labels, self.to = task.used, task.labels, task.to
        self._seen: Callable[[Any], None] | None = seen

    def losses(self, module: nn.Module, batch: Batch, context: StepContext) -> dict[str, Tensor]:
        """As the task's."""
        if self._seen is not None:
            self._seen(module)
            self._seen = None
        return self.task.losses(module, batch, context)


def watched(task: Task, clock: Clock, several: bool) -> Shown:
    """The task, whose exchanges the clock counts where there are several ranks."""

    def seen(module: Any) -> None:
        clock.traffic = CommStats(module) if several else None

    return Shown(task, seen)


def advice(row: dict[str, Any]) -> str:
    """The largest waste of a step and what to change, as one sentence. row: of `bench_train`.

    Waste is all of data, exchange, waiting, optimizer and loop; of forward and backward it is what they take beyond
    REACHABLE of the device's rate.
    """
    total = sum(row[f"{part}_ms"] for part in PHASES)
    rate = row["of_product"] if row["mfu"] is None else row["mfu"]
    waste = {name: row[f"{name}_ms"] for name in ("data", "transfer", "skew", "optimizer", "loop")}
    if rate is not None:
        waste["compute"] = row["forward_ms"] + row["backward_ms"] - rate * total / REACHABLE
    name = max(waste, key=lambda key: waste[key])
    return f"largest waste: {MEANS[name]}, {waste[name]:.2f} of {total:.2f} ms of a step; {_change(name, row)}."


REACHABLE = 0.45
"""Share of a device's rate that a ViT's step can be expected to reach."""
MEANS = {
    "data": "waiting for images",
    "transfer": "exchange between ranks",
    "skew": "ranks waiting for slower ones",
    "optimizer": "the optimizer's step",
    "loop": "the loop around the step",
    "compute": "forward and backward below the device's rate",
}


def _change(name: str, row: dict[str, Any]) -> str:
    if name == "data":
        return f"raise data.threads (now {row['threads']}), or use shards of smaller images"
    if name == "skew":
        if row["policy"] != "balanced":
            return f"set finetune.policy balanced (now {row['policy']})"
        return "measure finetune.costs with `lgp bench paths`, or raise finetune.train.accumulate to an even number"
    if name == "transfer":
        if row["engine"] == "zero3":
            return "use ZeRO stage 1 or 2 if memory allows"
        return "raise finetune.train.batch_size with accumulate, or set engine.reduction union under ZeRO-1 and ZeRO-2"
    if name == "optimizer":
        if row["ranks"] > 1 and row["engine"] in ("ddp", "zero0"):
            return "use ZeRO stage 1, which divides it between ranks"
        return "raise finetune.train.batch_size"
    if name == "loop":
        return "raise finetune.train.batch_size, which makes steps longer"
    return "set engine.compile inductor" if not row["compile"] else "raise finetune.train.batch_size"
