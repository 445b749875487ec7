"""Decides before each optimizer step, the same on every rank, whether it is applied: not where numbers went bad.

Bad is a loss or a gradient that is not finite, or a loss far above those of the steps before it. What every rank needs
for the decision travels in one all-reduce of a small vector: each draw's loss in a place of its own, and the squared
norm of each skippable module's gradient. `optim.StepMask` then skips the step; the data goes on as if it were taken.
"""

import logging
import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor

from lgp_dist.config.run_config import FaultConfig
from lgp_dist.engine.workers import Workers
from lgp_dist.errors import UserError
from lgp_dist.protocols import StepContext, Task

log = logging.getLogger("lgp")

Describe = Callable[[int, int, int], str]
"""(step, micro-step, rank) to shards and keys of that batch's samples, on any rank."""

REMEMBERED, FEWEST, NAMED = 100, 20, 3
"""Good steps whose median a spike is compared with; how many it takes; draws or modules that a sentence names."""
LARGEST = torch.finfo(torch.float32).max
"""Squared norm of gradients above which DeepSpeed's is infinite."""


class NotFinite(UserError):
    """A bad step after as many on end as may be left out; nothing of it was applied. `step` is its number."""

    def __init__(self, sentence: str, step: int):
        super().__init__(sentence)
        self.step = step


@dataclass(frozen=True)
class StepVerdict:
    """What becomes of a step."""

    reason: str = ""
    """Why it is left out: loss, gradient, spike, or overflow, which fp16's loss scale makes and mends; empty if not."""
    overflow: bool = False
    """Whether a gradient was not finite, in which case a loss scale halves."""
    stop: NotFinite | None = field(default=None, compare=False)
    """To be raised when the step has been left out, so that the engine is ready for another."""

    @property
    def skipped(self) -> bool:
        """Whether the step is not applied."""
        return bool(self.reason)

    @property
    def facts(self) -> dict[str, Any]:
        """For the step's line of metrics: `skipped`, 0 or 1, and with 1 the `reason`."""
        return {"skipped": 1, "reason": self.reason} if self.reason else {"skipped": 0}


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
        """Losses of the last good steps."""
        self.skipped = 0
        """Bad steps on end."""

    def state_dict(self) -> dict[str, Any]:
        """What the next verdict depends on, as JSON can hold it."""
        return {"good": list(self.good), "skipped": self.skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from there."""
        self.good, self.skipped = deque(state["good"], REMEMBERED), state["skipped"]

    def judge(
        self, step: int, losses: Sequence[Tensor], gradients: Iterable[tuple[str, Tensor]], scaled: bool
    ) -> StepVerdict:
        """The verdict on a step; waits for the device.

        losses: this rank's, one per micro-step. gradients: as reduced, or this rank's share of them, each with its
        module. scaled: whether a loss scale above 1 may be why a gradient is not finite.
        """
        table, squares = self._collect(losses, gradients)
        overflow = not sum(squares) <= LARGEST  # with nan too
        reason = self._reason(table, overflow, scaled)
        if reason in ("loss", "gradient", "spike"):
            return StepVerdict(reason, overflow, self._fault(step, self._explain(step, reason, table, squares)))
        if not reason:
            self.good.append(fmean(table))
            self.skipped = 0
        return StepVerdict(reason, overflow)

    def _collect(
        self, losses: Sequence[Tensor], gradients: Iterable[tuple[str, Tensor]]
    ) -> tuple[list[float], list[float]]:
        """Losses of all draws, those of a rank together, and squared norms of all modules, from all ranks."""
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
                log.warning("%s: step %d left out, %d of %d on end: %s", self.stage, step, self.skipped, allowed, what)
            return None
        before = f", nor of the {allowed} before it" if allowed else ""
        return NotFinite(
            f"Nothing of step {step} of stage {self.stage} was applied{before}: {what}: lower {self.stage}.train.lr, "
            f"look at these samples, or raise --faults.skip-steps from {allowed}.",
            step,
        )

    def _explain(self, step: int, reason: str, table: list[float], squares: list[float]) -> str:
        draws = [divmod(place, self.accumulate) for place in range(len(table))]
        used = [self.task.used(self._context(step, *draw)) | {""} for draw in draws]
        if reason == "loss":
            bad = [place for place, loss in enumerate(table) if not math.isfinite(loss)]
            what = f"the loss is {table[bad[0]]}"
        elif reason == "gradient":
            bad_modules = {
                module for module, square in zip(self.modules, squares, strict=True) if not math.isfinite(square)
            }
            bad = [place for place, mine in enumerate(used) if bad_modules <= mine]
            bad = bad or [place for place, mine in enumerate(used) if bad_modules & mine] or list(range(len(table)))
            what = f"the gradient of {_named(bad_modules)} is not finite, with losses that are,"
        else:
            bad = [max(range(len(table)), key=table.__getitem__)]
            normal = f"{self.faults.spike:g} times the median {median(self.good):.6g} of {len(self.good)} good steps"
            what = f"the loss {fmean(table):.6g} is more than {normal}, with {table[bad[0]]:.6g}"
        join = " or " if reason == "gradient" else " and "
        shown = join.join(self._draw(step, *draws[place]) for place in bad[:NAMED])
        return f"{what} on {shown}" + (f" and {len(bad) - NAMED} more" if len(bad) > NAMED else "")

    def _draw(self, step: int, rank: int, micro: int) -> str:
        words = [f"rank {rank}"] + [f"micro-step {micro}"] * (self.accumulate > 1)
        words += [f"{name} {value}" for name, value in self.task.labels(self._context(step, rank, micro)).items()]
        keys = self.describe(step, micro, rank)
        return ", ".join(words) + (f" ({keys})" if keys else "")

    def _context(self, step: int, rank: int, micro: int) -> StepContext:
        return StepContext(step, micro, rank, self.workers.world)


def _named(modules: set[str]) -> str:
    """A few of the modules; the empty name stands for what every forward uses."""
    names = sorted(modules - {""}) or ["what every forward uses"]
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more modules" if len(names) > NAMED else "")
