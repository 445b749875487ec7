"""The contract between data, tasks and engine."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Batch:
    """What the stream gives one rank for one micro-step."""

    images: Tensor
    """[B, C, H, W] float32, normalised."""
    targets: Tensor
    """[B] int64 labels, or [B, classes] float32 after mixup or smoothing."""
    weight: Tensor
    """[B] float32: 1, or 0 for a sample that only fills up an evaluation batch."""
    facts: Mapping[str, int] = field(default_factory=dict)
    """Counts about this batch on this rank; every training batch of a run has the same names."""

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device, copied without blocking where memory is pinned."""
        parts = (part.to(device, non_blocking=True) for part in (self.images, self.targets, self.weight))
        return Batch(*parts, self.facts)

    def repeated(self, times: int) -> Iterator["Batch"]:
        """This batch as often as that; its facts count once."""
        for turn in range(times):
            yield replace(self, facts={name: 0 for name in self.facts}) if turn else self


@dataclass(frozen=True)
class StepContext:
    """Where in the run a forward stands."""

    step: int
    """Optimizer steps taken so far."""
    micro_step: int
    """0 .. accumulate - 1."""
    rank: int
    """This process."""
    world: int
    """Number of processes."""


@dataclass(frozen=True)
class ModuleStructure:
    """Which submodules a forward calls in order, and which it may skip. Empty where every forward runs everything."""

    ordered_modules: tuple[str, ...] = ()
    """Names of submodules, called units, that every forward calls once, in this order; together they hold every
    parameter. A unit takes a tensor as its first argument and returns a tensor; a forward that does not need the unit
    gets its input back. A unit may return a tuple, whose further tensors carry no gradient: ZeRO-3 counts those that
    do."""
    skippable_modules: tuple[str, ...] = ()
    """Names of submodules, each a unit or within one, that a forward uses as a whole or skips."""


class Task(Protocol):
    """One forward including its loss; what the engine trains."""

    module: nn.Module
    """Everything that is trained, in one module with one forward: what a distributed wrapper sees. Like timm's models
    it has `set_grad_checkpointing(enable)`."""
    structure: ModuleStructure
    """Which submodules of `module` a forward calls in order, and which it may skip."""

    def used(self, context: StepContext) -> frozenset[str]:
        """The skippable modules that the forward of a rank's micro-step uses. Pure: every rank asks for every rank."""
        ...

    def losses(self, module: nn.Module, batch: Batch, context: StepContext) -> dict[str, Tensor]:
        """Named scalar losses; `loss` is minimised, the others are logged.

        module: `self.module`, wrapped or not.
        """
        ...

    def labels(self, context: StepContext) -> dict[str, Any]:
        """What to log beside the losses of this step, such as the path's key. Pure."""
        ...

    def to(self, device: torch.device) -> None:
        """Moves what is not trained (the ancestry) to a device."""
        ...
