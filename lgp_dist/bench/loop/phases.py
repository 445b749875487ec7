"""Where the time of an optimizer step goes: a clock that reads what the loop notes for its watchdog."""

import contextlib
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from lgp_dist.engine.comm_stats import CommStats
from lgp_dist.engine.watch.watchdog import Watchdog
from lgp_dist.protocols import Batch, StepContext, Task

PHASES = ("data", "forward", "backward", "exchange", "optimizer", "loop")
"""Parts of a step: waiting for a batch, forwards (the ancestry's too), backwards, collectives with the waits for other
ranks, the optimizer's step, and everything else in the loop (divergence check, step filter, clipping, metrics)."""
NOTES = {"data": "data", "forward": "forward", "backward": "backward", "step": "loop", "save": "loop"}
"""What the loop notes, and the part that begins there."""


class Clock(Watchdog):
    """Receives the loop's notes; while it is on, adds up the seconds between them, step by step.

    It waits for the GPU at every note, which leaves no overlap: throughput is measured without a clock.
    """

    def __init__(self, device: torch.device):
        super().__init__(Path(), 0, 1, 0.0)
        self.device, self.traffic = device, None
        self.steps: list[dict[str, float]] = []
        self._on, self._phase, self._since, self._sent = False, "data", 0.0, 0.0
        self._open = dict.fromkeys(PHASES, 0.0)
        self._running = contextlib.ExitStack()

    def note(self, step: int, phase: str, path: str | None = None) -> None:
        """Begins a phase, as the loop says it."""
        if self._on:
            self._to(NOTES[phase])

    def start(self) -> None:
        """Begins while a step waits for data."""
        if self.traffic is not None:
            self._running.enter_context(self.traffic.counting())
        self._running.callback(register_optimizer_step_pre_hook(lambda *_: self._to("optimizer")).remove)
        self._running.callback(register_optimizer_step_post_hook(lambda *_: self._to("loop")).remove)
        self._on, self._phase, self._open = True, "data", dict.fromkeys(PHASES, 0.0)
        self._sent, self._since = 0.0, time.perf_counter()

    def stop(self) -> list[dict[str, float]]:
        """Seconds of every phase in each whole step since `start`."""
        self._on = False
        self._running.close()
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


def watch_exchange(task: Task, clock: Clock) -> None:
    """Lets the clock count the collectives of a task's module, from its first forward on, where the engine has it."""
    losses = task.losses

    def watched(module: Any, batch: Batch, context: StepContext) -> dict[str, Tensor]:
        clock.traffic = clock.traffic or CommStats(module)
        return losses(module, batch, context)

    task.losses = watched  # type: ignore[method-assign]


def advice(row: dict[str, Any]) -> str:
    """The largest waste of a step and what to change, as one sentence. row: of `bench_train`.

    All of data, exchange, waiting, optimizer and loop is waste; of forward and backward, the time beyond that of a step
    at REACHABLE of the device's rate.
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
