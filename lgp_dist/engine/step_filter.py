"""Decides before each optimizer step, the same on every rank, whether its numbers are good enough to apply it.

A step is bad if a loss or a gradient is not finite, or if its loss is far above those of the steps before (a spike).
All ranks decide from the same numbers, which one all-reduce of a small vector collects: the loss of each draw (each
rank's micro-step) and the squared norm of each skippable module's gradient. `optim.StepMask` then skips a bad step; the
data goes on as if it were taken.
"""

import logging
import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any, TypedDict

import torch
from torch import Tensor

from lgp_dist.config.run_config import FaultConfig
from lgp_dist.engine.workers import Workers
from lgp_dist.errors import UserError
from lgp_dist.protocols import StepContext, Task

log = logging.getLogger("lgp")

Describe = Callable[[int, int, int], str]
"""(step, micro-step, rank) to the shards and keys of that batch's samples, on any rank."""

REMEMBERED, FEWEST = 100, 20
"""A spike is compared with the median loss of the last REMEMBERED good steps, once there are FEWEST of them."""
NAMED = 3
"""Draws or modules that a message names."""
LARGEST = torch.finfo(torch.float32).max
"""Squared norm of gradients above which DeepSpeed's is infinite."""


class FilterState(TypedDict):
    """What later verdicts depend on, as JSON values."""

    good: list[float]
    """Losses of the last good steps."""
    skipped: int
    """Consecutive bad steps so far."""


class NotFinite(UserError):
    """More consecutive bad steps than `faults.skip_steps` allows. `step` is the last of them, which was not applied."""

    def __init__(self, sentence: str, step: int):
        super().__init__(sentence)
        self.step = step


@dataclass(frozen=True)
class StepVerdict:
    """Whether a step is applied."""

    reason: str = ""
    """Why it is skipped: loss, gradient, spike, or overflow of fp16's loss scale, which recovers; empty if applied."""
    overflow: bool = False
    """Whether a gradient was not finite. A loss scale then halves."""
    stop: NotFinite | None = field(default=None, compare=False)
    """To be raised after the step was skipped, when the engine is ready for another."""
    grad_norm: float = field(default=math.nan, compare=False)
    """Of the given gradients of all ranks; `Trainer.finish` makes it that of the whole gradient before clipping."""

    @property
    def skipped(self) -> bool:
        """Whether the step is not applied."""
        return bool(self.reason)

    @property
    def facts(self) -> dict[str, Any]:
        """For the step's line of metrics: `grad_norm` if it is finite, `skipped`, 0 or 1, and with 1 the `reason`."""
        norm = {"grad_norm": self.grad_norm} if math.isfinite(self.grad_norm) else {}
        return {**norm, "skipped": 1, "reason": self.reason} if self.reason else {**norm, "skipped": 0}


class StepFilter:
    """Judges the steps of one training run."""

    def __init__(
        self,
        task: Task,
        workers: Workers,
        accumulate: int,
        faults: FaultConfig = FaultConfig(),  # noqa: B008  frozen
        stage: str = "",
        describe: Describe = lambda step, micro, rank: "",
    ):
        self.task, self.workers, self.faults, self.stage, self.describe = task, workers, faults, stage, describe
        self.accumulate, self.modules = accumulate, ("", *task.structure.skippable_modules)
        self.places = {module: place for place, module in enumerate(self.modules)}
        self.good: deque[float] = deque(maxlen=REMEMBERED)
        self.skipped = 0

    def state_dict(self) -> FilterState:
        """Returns what later verdicts depend on."""
        return {"good": list(self.good), "skipped": self.skipped}

    def load_state_dict(self, state: FilterState) -> None:
        """Continues from a state."""
        self.good, self.skipped = deque(state["good"], REMEMBERED), state["skipped"]

    def judge(
        self, step: int, losses: Sequence[Tensor], gradients: Iterable[tuple[str, Tensor]], scaled: bool
    ) -> StepVerdict:
        """Returns the verdict on a step. Waits for the device.

        losses: this rank's, one per micro-step. gradients: reduced, or this rank's part of them, each with its
        skippable module ("" if it has none). scaled: whether fp16's loss scale may have made a gradient infinite.
        """
        table, squares = self._collect(losses, gradients)
        overflow = not sum(squares) <= LARGEST  # true for nan too
        reason, norm = self._reason(table, overflow, scaled), math.nan if overflow else math.sqrt(sum(squares))
        if reason in ("loss", "gradient", "spike"):
            return StepVerdict(reason, overflow, self._fault(step, self._explain(step, reason, table, squares)), norm)
        if not reason:
            self.good.append(fmean(table))
            self.skipped = 0
        return StepVerdict(reason, overflow, grad_norm=norm)

    def _collect(
        self, losses: Sequence[Tensor], gradients: Iterable[tuple[str, Tensor]]
    ) -> tuple[list[float], list[float]]:
        """Losses of all draws, rank by rank, and squared gradient norms of all modules, over all ranks."""
        modules, tensors = zip(*gradients, strict=True)
        device = tensors[0].device
        squares = torch.stack(torch._foreach_norm(tensors)).square()
        places = torch.tensor([self.places[module] for module in modules], device=device)
        totals = torch.zeros(len(self.modules), device=device).index_add_(0, places, squares).to(self.workers.device)
        table = torch.zeros(self.workers.world, self.accumulate, device=self.workers.device)
        table[self.workers.rank] = torch.stack([loss.float() for loss in losses])
        values = self.workers.sum(torch.cat([table.flatten(), totals])).tolist()
        return values[: table.numel()], values[table.numel() :]

    def _reason(self, table: list[float], overflow: bool, scaled: bool) -> str:
        if not all(map(math.isfinite, table)):
            return "loss"
        if overflow:
            return "overflow" if scaled else "gradient"
        limit = self.faults.spike
        return "spike" if limit and len(self.good) >= FEWEST and fmean(table) > limit * median(self.good) > 0 else ""

    def _fault(self, step: int, what: str) -> NotFinite | None:
        self.skipped += 1
        allowed = self.faults.skip_steps
        if self.skipped <= allowed:
            if self.workers.is_main:
                log.warning("%s: step %d skipped, %d of %d in a row: %s", self.stage, step, self.skipped, allowed, what)
            return None
        before = f", nor of the {allowed} before it" if allowed else ""
        return NotFinite(
            f"Nothing of step {step} of stage {self.stage} was applied{before}: {what}: lower {self.stage}.train.lr, "
            f"look at these samples, or raise --faults.skip-steps from {allowed}.",
            step,
        )

    def _explain(self, step: int, reason: str, table: list[float], squares: list[float]) -> str:
        """What is bad, and on which draws: those with the loss, or those that may have made the gradient."""
        draws = [
            StepContext(step, place % self.accumulate, place // self.accumulate, self.workers.world)
            for place in range(len(table))
        ]
        if reason == "loss":
            bad = [place for place, loss in enumerate(table) if not math.isfinite(loss)]
            what = f"the loss is {table[bad[0]]}"
        elif reason == "gradient":
            used = [self.task.used(draw) | {""} for draw in draws]
            modules = {
                module for module, square in zip(self.modules, squares, strict=True) if not math.isfinite(square)
            }
            bad = [place for place, mine in enumerate(used) if modules <= mine]
            bad = bad or [place for place, mine in enumerate(used) if modules & mine] or list(range(len(table)))
            what = f"the gradient of {_named(modules)} is not finite, with losses that are,"
        else:
            bad = [max(range(len(table)), key=table.__getitem__)]
            normal = f"{self.faults.spike:g} times the median {median(self.good):.6g} of {len(self.good)} good steps"
            what = f"the loss {fmean(table):.6g} is more than {normal}, with {table[bad[0]]:.6g}"
        join = " or " if reason == "gradient" else " and "
        shown = join.join(self._draw(draws[place]) for place in bad[:NAMED])
        return f"{what} on {shown}" + (f" and {len(bad) - NAMED} more" if len(bad) > NAMED else "")

    def _draw(self, draw: StepContext) -> str:
        words = [f"rank {draw.rank}"] + [f"micro-step {draw.micro_step}"] * (self.accumulate > 1)
        words += [f"{name} {value}" for name, value in self.task.labels(draw).items()]
        keys = self.describe(draw.step, draw.micro_step, draw.rank)
        return ", ".join(words) + (f" ({keys})" if keys else "")


def _named(modules: set[str]) -> str:
    """A few of the modules; the empty name stands for what every forward uses."""
    names = sorted(modules - {""}) or ["what every forward uses"]
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more modules" if len(names) > NAMED else "")
