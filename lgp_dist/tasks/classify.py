"""Plain supervised training: how an ancestry is made where none can be loaded."""

from typing import Any

import torch
from torch import Tensor, nn

from lgp_dist.protocols import Batch, ModuleStructure, StepContext
from lgp_dist.tasks.losses import cross_entropy


class ClassifyTask:
    """Cross-entropy of one model."""

    def __init__(self, module: nn.Module):
        self.module, self.structure = module, ModuleStructure()

    def used(self, context: StepContext) -> frozenset[str]:
        """No skippable modules: every forward runs everything."""
        return frozenset()

    def losses(self, module: nn.Module, batch: Batch, context: StepContext) -> dict[str, Tensor]:
        """loss and cls, which are the same."""
        loss = cross_entropy(module(batch.images), batch.targets)
        return {"loss": loss, "cls": loss.detach()}

    def labels(self, context: StepContext) -> dict[str, Any]:
        """Nothing beside the losses."""
        return {}

    def to(self, device: torch.device) -> None:
        """Nothing beside the module."""
