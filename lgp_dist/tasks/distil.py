"""Distillation of all auxiliary models from one forward of the ancestry (METHOD, section 2)."""

from typing import Any

import torch
from torch import Tensor, nn

from lgp_dist.config import DistilConfig
from lgp_dist.models.ancestry import Ancestry
from lgp_dist.models.auxiliary import AuxiliaryRows
from lgp_dist.protocols import Batch, StepContext, Walk
from lgp_dist.tasks.losses import cross_entropy, mean_squared_error, soft_cross_entropy


class DistilTask:
    """L = alpha CE + (1 - alpha) (L_att + L_blk + L_pred) for each row, plus the error of V."""

    def __init__(self, module: AuxiliaryRows, ancestry: Ancestry, config: DistilConfig):
        self.module, self.ancestry, self.config = module, ancestry, config
        self.walk = Walk()
        self.blocks = frozenset(level.ancestry for row in module.rows for level in row.levels)

    def used(self, context: StepContext) -> frozenset[str]:
        """Nothing: there are no parts, every forward runs everything."""
        return frozenset()

    def losses(self, module: nn.Module, batch: Batch, context: StepContext) -> dict[str, Tensor]:
        """loss (sum over rows) and, per row r, row{r}/cls, pred and, where it has levels, block, attention, inverse."""
        ancestry_logits, blocks, attentions = self.ancestry(batch.images, self.blocks)
        named: dict[str, Tensor] = {}
        total = batch.images.new_zeros(())
        for row, output in enumerate(module(batch.images, blocks, attentions)):
            parts = row_losses(output, ancestry_logits, batch.targets, self.config)
            total = total + parts.pop("loss")
            named.update({f"row{row}/{name}": part.detach() for name, part in parts.items() if torch.is_tensor(part)})
        return {"loss": total, **named}

    def labels(self, context: StepContext) -> dict[str, Any]:
        """Nothing beside the losses."""
        return {}

    def to(self, device: torch.device) -> None:
        """Moves the ancestry."""
        self.ancestry.to(device)


def row_losses(
    output: dict[str, Any], ancestry_logits: Tensor, targets: Tensor, config: DistilConfig
) -> dict[str, Tensor | float]:
    """One row's loss and its named parts.

    output: what `AuxiliaryViT.forward` gives. ancestry_logits: [B, classes]. targets: [B] or [B, classes].
    """
    logits = output["logits"].float()  # once, so that both losses' gradients add up in float32
    parts = {
        "cls": cross_entropy(logits, targets),
        "pred": soft_cross_entropy(ancestry_logits, logits, config.tau, config.loss_scale),
        "block": mean_squared_error(output["block"]),
        "attention": mean_squared_error(output["attention"]),
        "inverse": mean_squared_error(output["inverse"]),
    }
    distilled = parts["attention"] + parts["block"] + parts["pred"]
    loss = config.alpha * parts["cls"] + (1 - config.alpha) * distilled + config.inverse_weight * parts["inverse"]
    return {"loss": loss, **parts}
