"""Training of the pool, each rank on its own path (METHOD, section 5)."""

from typing import Any

import torch
from torch import Tensor, nn

from lgp_dist.config.run_config import FinetuneConfig
from lgp_dist.models.ancestry import Ancestry
from lgp_dist.models.pool import LearngenePool
from lgp_dist.paths.sampler import PathSampler
from lgp_dist.paths.space import AnyPath
from lgp_dist.protocols import Batch, ModuleStructure, StepContext
from lgp_dist.tasks.losses import cross_entropy, soft_cross_entropy


class FinetuneTask:
    """Cross-entropy to the labels and to the ancestry on the path that this rank draws."""

    def __init__(self, module: LearngenePool, ancestry: Ancestry | None, sampler: PathSampler, config: FinetuneConfig):
        self.module, self.ancestry, self.sampler, self.config = module, ancestry, sampler, config
        self.structure = ModuleStructure(module.ordered_modules, module.skippable_modules)
        self._modules = {path: module.modules_of(path) for path in module.space.paths}
        self._seen: tuple[Tensor | None, Tensor | None] = (None, None)

    def path(self, context: StepContext) -> AnyPath:
        """The path of one rank's micro-step."""
        return self.sampler.draw(context.step, context.micro_step, context.rank, context.world)

    def used(self, context: StepContext) -> frozenset[str]:
        """The skippable modules on the path of one rank's micro-step."""
        return self._modules[self.path(context)]

    def losses(self, module: nn.Module, batch: Batch, context: StepContext) -> dict[str, Tensor]:
        """loss, cls and, with an ancestry, pred."""
        logits = module(batch.images, self.path(context)).float()  # cast once: both losses' gradients add up in fp32
        parts = {"cls": cross_entropy(logits, batch.targets)}
        loss = self.config.label_weight * parts["cls"]
        if self.ancestry is not None:
            target = self._target(batch.images, context)
            if self.config.distil == "hard":
                parts["pred"] = cross_entropy(logits, target.argmax(-1))
            else:
                parts["pred"] = soft_cross_entropy(target, logits, self.config.tau, self.config.loss_scale)
            loss = loss + self.config.distil_weight * parts["pred"]
        return {"loss": loss, **{name: part.detach() for name, part in parts.items()}}

    def _target(self, images: Tensor, context: StepContext) -> Tensor:
        """The ancestry's logits [B, classes], computed in the first of the micro-steps that have the same images."""
        paths = self.config.paths_per_batch
        if paths == 1:
            return self.ancestry(images)[0]
        if context.micro_step % paths == 0 or self._seen[0] is not images:
            self._seen = (images, self.ancestry(images)[0])
        return self._seen[1]

    def labels(self, context: StepContext) -> dict[str, Any]:
        """The key of this rank's path."""
        return {"path": self.path(context).key}

    def to(self, device: torch.device) -> None:
        """Moves the ancestry."""
        if self.ancestry is not None:
            self.ancestry.to(device)
