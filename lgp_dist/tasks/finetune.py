"""Training of the pool, each rank on its own path (docs/method.md)."""

from typing import Any

import torch
from torch import Tensor, nn

from lgp_dist.config.run_config import FinetuneConfig, RunConfig
from lgp_dist.models.ancestry import Ancestry
from lgp_dist.models.pool import LearngenePool
from lgp_dist.models.transformation import normalised
from lgp_dist.paths.path import Path
from lgp_dist.paths.sampler import PathSampler
from lgp_dist.protocols import Batch, ModuleStructure, StepContext
from lgp_dist.tasks.losses import cross_entropy, soft_cross_entropy

Outputs = tuple[Tensor, Tensor | None]
"""Logits [B, classes] and, with `finetune.feature_weight`, tokens before the final norm [B, N, D]."""
Teacher = tuple[Tensor | None, Tensor | None]
"""The same of a teacher, whose logits are None if it has no head."""


def finetune_task(
    config: RunConfig, pool: LearngenePool, ancestry: Ancestry | None, sampler: PathSampler
) -> "FinetuneTask":
    """The task of stage finetune. ancestry: prepared; None if it does not teach."""
    return FinetuneTask(pool, ancestry, sampler, config.finetune, config.distil.target_norm)


class FinetuneTask:
    """Cross-entropy to the labels and to a teacher's logits on the path that this rank draws (equations 7 and 3).

    The teacher is the ancestry. With `finetune.lead_weight`, it teaches the lead path alone, which teaches the other
    paths of its group: the micro-steps that take the same images on one rank. Under policy `in_turn` each path of a
    group teaches the next.
    """

    def __init__(
        self,
        module: LearngenePool,
        ancestry: Ancestry | None,
        sampler: PathSampler,
        config: FinetuneConfig,
        target_norm: str = "layer",
    ):
        """target_norm: `distil.target_norm`, for the ancestry's last block."""
        self.module, self.ancestry, self.sampler = module, ancestry, sampler
        self.config, self.target_norm = config, target_norm
        self.structure = ModuleStructure(module.ordered_modules, module.skippable_modules)
        self._modules = {path: module.modules_of(path) for path in module.space.paths}
        self._taught: tuple[Tensor, Teacher] | None = None
        self._lead: Teacher | None = None

    def path(self, context: StepContext) -> Path:
        """The path of one rank's micro-step."""
        return self.sampler.draw(context.step, context.micro_step, context.rank, context.world)

    def used(self, context: StepContext) -> frozenset[str]:
        """The skippable modules on the path of one rank's micro-step."""
        return self._modules[self.path(context)]

    def losses(self, module: nn.Module, batch: Batch, context: StepContext) -> dict[str, Tensor]:
        """loss and its terms: cls; with a teacher pred, and with `finetune.feature_weight` feature; the last two are 0
        on paths that it does not teach."""
        config, path = self.config, self.path(context)
        follows = config.lead_weight > 0 and self._position(context) > 0
        logits, tokens = self._outputs(module, batch.images, path)
        parts = {"cls": cross_entropy(logits, batch.targets)}
        loss = config.label_weight * parts["cls"]
        if self.ancestry is not None or config.lead_weight:
            teacher = self._lead if follows else self._ancestry_outputs(batch.images, context)
            parts["pred"] = self._pred(logits, teacher)
            loss = loss + (config.lead_weight if follows else config.distil_weight) * parts["pred"]
            if tokens is not None:
                parts["feature"] = self._feature(tokens, teacher)
                loss = loss + config.feature_weight * parts["feature"]
        if config.lead_weight and (not follows or config.policy == "in_turn"):
            self._lead = logits.detach(), None if tokens is None else tokens.detach()
        return {"loss": loss, **{name: part.detach() for name, part in parts.items()}}

    def _position(self, context: StepContext) -> int:
        """Place of a micro-step in its group."""
        return context.micro_step % self.config.paths_per_batch

    def _outputs(self, module: nn.Module, images: Tensor, path: Path) -> Outputs:
        """The path's outputs in float32, cast once, so that the gradients of both losses add up in float32."""
        if not self.config.feature_weight:
            return module(images, path).float(), None
        logits, tokens = module(images, path, True)
        return logits.float(), tokens.float()

    def _pred(self, logits: Tensor, teacher: Teacher | None) -> Tensor:
        """Cross-entropy to a teacher's logits; 0 without a teacher, or if it has none."""
        if teacher is None or teacher[0] is None:
            return logits.new_zeros(())
        if self.config.distil == "hard":
            return cross_entropy(logits, teacher[0].argmax(-1))
        return soft_cross_entropy(teacher[0], logits, self.config.tau, self.config.loss_scale)

    def _feature(self, tokens: Tensor, teacher: Teacher | None) -> Tensor:
        """Mean squared error to a teacher's tokens; 0 without any of the same shape."""
        target = teacher[1] if teacher else None
        if target is None or target.shape != tokens.shape:
            target = tokens.detach()  # ZeRO-3 waits for a gradient of each output: this one is zero
        return nn.functional.mse_loss(tokens, target)

    def _ancestry_outputs(self, images: Tensor, context: StepContext) -> Teacher | None:
        """The ancestry's outputs, computed in the first micro-step of a group; the features are its last block's."""
        if self.ancestry is None:
            return None
        if self._taught is None or self._position(context) == 0 or self._taught[0] is not images:
            last = (self.ancestry.depth - 1,) if self.config.feature_weight else ()
            logits, blocks, _ = self.ancestry(images, last)
            features = normalised(blocks[last[0]].float(), self.target_norm) if last else None
            self._taught = (images, (logits, features))
        return self._taught[1]

    def labels(self, context: StepContext) -> dict[str, Any]:
        """The key of this rank's path."""
        return {"path": self.path(context).key}

    def to(self, device: torch.device) -> None:
        """Moves the ancestry."""
        if self.ancestry is not None:
            self.ancestry.to(device)
