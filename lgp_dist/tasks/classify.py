"""Supervised training of one model: of the ancestry if its source is `train`, and of descendants on other data."""

from typing import Any

import torch
from torch import Tensor, nn

from lgp_dist.protocols import Batch, ModuleStructure, StepContext
from lgp_dist.tasks.losses import cross_entropy


class ClassifyTask:
    """Cross-entropy of one model to the labels."""

    def __init__(self, module: nn.Module):
        self.module, self.structure = module, ModuleStructure()

    def used(self, context: StepContext) -> frozenset[str]:
        """No skippable modules: every forward runs everything."""
        return frozenset()

    def losses(self, module: nn.Module, batch: Batch, context: StepContext) -> dict[str, Tensor]:
        """loss and cls, which are equal."""
        loss = cross_entropy(module(batch.images), batch.targets)
        return {"loss": loss, "cls": loss.detach()}

    def labels(self, context: StepContext) -> dict[str, Any]:
        """No labels."""
        return {}

    def to(self, device: torch.device) -> None:
        """Does nothing: there is only the module."""
