"""What goes wrong in which step of a trial, and what must be said of it."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from exact_trials import ENGINES, Engine, Trial

from lgp_dist.config.run_config import Precision

Kind = Literal["nan", "inf", "gradient", "part", "path", "spike"]
"""A loss that is nan or infinite; a finite loss with a gradient that is nan everywhere, or infinite in one part; a path
whose loss is nan whenever it is drawn; a loss a thousand times too large."""
KINDS: tuple[Kind, ...] = ("nan", "inf", "gradient", "part", "path")
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")


@dataclass(frozen=True)
class Case:
    """A trial with faults in the last micro-step of some steps."""

    trial: Trial
    faults: tuple[tuple[int, Kind, int], ...]
    """(step, what, on which rank)."""
    skip_steps: int = 0
    spike: float = 0.0

    @property
    def world(self) -> int:
        """Processes."""
        return self.trial.world

    @property
    def engine(self) -> Engine:
        """Of the trial."""
        return self.trial.engine

    @property
    def name(self) -> str:
        """The case in a few words."""
        return f"{self.trial.name}, {self.faults}"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @staticmethod
    def from_dict(fields: dict[str, Any]) -> "Case":
        """The opposite of `as_dict`."""
        faults = tuple((step, kind, rank) for step, kind, rank in fields["faults"])
        return Case(**{**fields, "trial": Trial(**fields["trial"]), "faults": faults})

    def draw(self, step: int, rank: int) -> tuple[str, frozenset[str]]:
        """Key and parts of the path of a rank's last micro-step."""
        pool, _, sampler = self.trial.build()
        path = sampler.draw(step, self.trial.accumulate - 1, rank, self.trial.world)
        return path.key, pool.modules_of(path)

    @property
    def haunted(self) -> frozenset[str]:
        """Keys of the paths with a fault of kind `path`."""
        return frozenset(self.draw(step, rank)[0] for step, kind, rank in self.faults if kind == "path")


def skips(every: bool) -> list[Case]:
    """Every kind of fault in one run that goes on, from the first step to the last but one."""
    faults = ((0, "nan", 1), (2, "inf", 0), (3, "gradient", 1), (5, "part", 0), (6, "nan", 0))
    trials = [
        Trial(engine, 2, precision, 2, 0.5, steps=8)
        for place, engine in enumerate(ENGINES)
        for precision in PRECISIONS[:: 1 if every else -2 if place % 2 else 2]
    ]
    offloaded, united = ("zero1", "zero2", "zero3")[0 if every else 1 :], ("zero1", "zero2")[: 2 if every else 1]
    trials += [Trial(engine, 2, accumulate=2, offload=True, steps=8) for engine in offloaded]
    trials += [Trial(engine, 2, accumulate=2, reduction="union", steps=8) for engine in united]
    return [Case(trial, faults, skip_steps=2) for trial in trials]


def spikes(every: bool) -> list[Case]:
    """Finite losses and gradients, but one far too large."""
    return [
        Case(Trial(engine, 2, steps=24), ((22, "spike", 1),), skip_steps=1, spike=5.0)
        for engine in (ENGINES if every else ("zero2", "ddp"))
    ]


def stops(every: bool) -> list[Case]:
    """One fault each, and no step may be left out; not `every`: kinds, precisions and ranks in turn."""
    return [
        Case(Trial(engine, 2, precision, steps=3, seed=seed), ((1, kind, rank),))
        for place, engine in enumerate(ENGINES)
        for seed, kind in enumerate(KINDS)
        for precision in PRECISIONS
        for rank in (0, 1)
        if every or (precision, rank, 0) == (PRECISIONS[(place + seed // 2) % 2], seed // 2 % 2, (place + seed) % 2)
    ]
