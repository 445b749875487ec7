"""The contract between data, tasks and engine."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Batch:
    """One rank's data for one micro-step."""

    images: Tensor
    """[B, C, H, W] float32, normalised."""
    targets: Tensor
    """[B] int64 labels, or [B, classes] float32 after mixup or smoothing."""
    weight: Tensor
    """[B] float32: 1, or 0 for a sample that only fills an evaluation batch."""
    facts: Mapping[str, int] = field(default_factory=dict)
    """Counts about this batch on this rank, such as bad samples. Every training batch of a run has the same names."""

    def to(self, device: torch.device) -> "Batch":
        """Returns the batch on a device, copied without blocking if its memory is pinned."""
        tensors = (self.images, self.targets, self.weight)
        images, targets, weight = (tensor.to(device, non_blocking=True) for tensor in tensors)
        return Batch(images, targets, weight, self.facts)

    def repeated(self, times: int) -> Iterator["Batch"]:
        """Yields the batch this many times; its facts count once."""
        for turn in range(times):
            yield replace(self, facts={name: 0 for name in self.facts}) if turn else self


@dataclass(frozen=True)
class StepContext:
    """The place of a forward in the run."""

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
    """A forward with its loss: what the engine trains."""

    module: nn.Module
    """Everything that is trained, in one module with one forward, which a distributed wrapper can wrap. To
    recompute activations it needs `set_grad_checkpointing(enable)`, as timm's models have it."""
    structure: ModuleStructure
    """Which submodules of `module` a forward calls in order, and which it may skip."""

    def used(self, context: StepContext) -> frozenset[str]:
        """Returns the skippable modules that a forward uses. Pure: every rank asks for all ranks and micro-steps."""
        ...

    def losses(self, module: nn.Module, batch: Batch, context: StepContext) -> dict[str, Tensor]:
        """Returns named scalar losses: `loss` is minimised, the others are logged.

        module: `self.module`, wrapped or not.
        """
        ...

    def labels(self, context: StepContext) -> dict[str, Any]:
        """Returns what to log next to the losses of this step, such as the path's key. Pure."""
        ...

    def to(self, device: torch.device) -> None:
        """Moves what is not trained, such as the ancestry, to a device."""
        ...
