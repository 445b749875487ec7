"""Training of auxiliary models: distilled from one forward of the ancestry (docs/method.md), or by labels alone."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lgp_dist.config.run_config import DistilConfig, RunConfig
from lgp_dist.models.ancestry import Ancestry
from lgp_dist.models.auxiliary import AuxiliaryRows, AuxiliaryViT
from lgp_dist.models.build import prepare_ancestry
from lgp_dist.protocols import Batch, ModuleStructure, StepContext
from lgp_dist.tasks.losses import cross_entropy, mean_squared_error, soft_cross_entropy


def distil_task(config: RunConfig, rows: Iterable[AuxiliaryViT], ancestry: Ancestry | None) -> "DistilTask":
    """The task of stage distil: the rows that it trains and, if it distils one, the ancestry, now prepared."""
    trained = [row for row in rows if config.model.rows[row.number].trains]
    teacher = None
    if ancestry is not None and any(row.distilled for row in trained):
        teacher = prepare_ancestry(ancestry, config, "distil")
    return DistilTask(AuxiliaryRows(trained), teacher, config.distil)


class DistilTask:
    """For each row L = alpha CE + (1 - alpha) (L_att + L_blk + L_pred) (the paper's equations 6 and 8), plus the error
    of V; for a row that is not distilled CE alone."""

    def __init__(self, module: AuxiliaryRows, ancestry: Ancestry | None, config: DistilConfig):
        """ancestry: None if no row is distilled."""
        self.module, self.ancestry, self.config = module, ancestry, config
        self.rows = [row for row in module.rows if isinstance(row, AuxiliaryViT)]
        self.structure = ModuleStructure()
        self.blocks = frozenset(level.ancestry for row in self.rows for level in row.levels)

    def used(self, context: StepContext) -> frozenset[str]:
        """No skippable modules: every forward runs everything."""
        return frozenset()

    def losses(self, module: nn.Module, batch: Batch, context: StepContext) -> dict[str, Tensor]:
        """loss, the sum over rows; of each row r its terms row{r}/cls and, if it is distilled, pred, and with levels
        block, attention and inverse."""
        ancestry_logits, blocks, attentions = None, {}, {}
        if self.ancestry is not None:
            ancestry_logits, blocks, attentions = self.ancestry(batch.images, self.blocks)
        named: dict[str, Tensor] = {}
        total = batch.images.new_zeros(())
        for row, output in zip(self.rows, module(batch.images, blocks, attentions), strict=True):
            if self.ancestry is not None and row.distilled:
                parts = row_losses(output, ancestry_logits, batch.targets, self.config)
            else:
                parts = dict.fromkeys(("loss", "cls"), cross_entropy(output["logits"], batch.targets))
            total, name = total + parts.pop("loss"), f"row{row.number}"
            named.update({f"{name}/{key}": part.detach() for key, part in parts.items() if torch.is_tensor(part)})
        return {"loss": total, **named}

    def labels(self, context: StepContext) -> dict[str, Any]:
        """No labels."""
        return {}

    def to(self, device: torch.device) -> None:
        """Moves the ancestry."""
        if self.ancestry is not None:
            self.ancestry.to(device)


def row_losses(
    output: dict[str, Any], ancestry_logits: Tensor | None, targets: Tensor, config: DistilConfig
) -> dict[str, Tensor | float]:
    """One row's loss and its terms.

    output: of `AuxiliaryViT.forward`. ancestry_logits: [B, classes]; None leaves L_pred out. targets: [B], or
    [B, classes].
    """
    logits = output["logits"].float()  # cast once, so that the gradients of both losses add up in float32
    pred: Tensor | float = 0.0
    if ancestry_logits is not None:
        pred = soft_cross_entropy(ancestry_logits, logits, config.tau, config.loss_scale)
    parts = {
        "cls": cross_entropy(logits, targets),
        "pred": pred,
        "block": mean_squared_error(output["block"]),
        "attention": mean_squared_error(output["attention"]),
        "inverse": mean_squared_error(output["inverse"]),
    }
    distilled = parts["attention"] + parts["block"] + parts["pred"]
    loss = config.alpha * parts["cls"] + (1 - config.alpha) * distilled + config.inverse_weight * parts["inverse"]
    return {"loss": loss, **parts}
