"""Auxiliary models: the smaller ViTs that are distilled from the ancestry, each with its transformations."""

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from lgp_dist.config.run_config import DistilConfig, RowConfig
from lgp_dist.models.pool import row_vit
from lgp_dist.models.transformation import Level, TransformationBank, forward_pairs, levels_of
from lgp_dist.models.vit import forward_with_taps
from lgp_dist.paths.stitched import PathSpace


class AuxiliaryViT(nn.Module):
    """A student and its transformations: one module with one forward, since both are trained."""

    def __init__(
        self,
        vit: VisionTransformer,
        bank: TransformationBank,
        levels: tuple[Level, ...],
        target_norm: str,
        number: int = 0,
        distilled: bool = True,
    ):
        """number: the row's in its pool. distilled: whether the ancestry teaches it; otherwise labels alone do."""
        super().__init__()
        self.vit, self.bank = vit, bank
        self.levels, self.target_norm = levels, target_norm
        self.number, self.distilled = number, distilled

    def forward(
        self, images: Tensor, ancestry_blocks: dict[int, Tensor], ancestry_attentions: dict[int, Tensor]
    ) -> dict[str, Tensor | list[tuple[Tensor, Tensor]]]:
        """Logits [B, classes] and, per level, (target, prediction) pairs of [B, N, D] for block, attention, inverse.

        images: [B, C, H, W]. ancestry_*: outputs [B, N, D_ancestry] by the ancestry's block index.
        """
        logits, blocks, attentions = forward_with_taps(self.vit, images, {level.auxiliary for level in self.levels})
        pairs = forward_pairs(
            self.bank, self.levels, self.target_norm, (ancestry_blocks, ancestry_attentions), (blocks, attentions)
        )
        return {"logits": logits, **pairs}


class AuxiliaryRows(nn.Module):
    """Rows that are trained in one run and share the ancestry's forward."""

    def __init__(self, rows: list[AuxiliaryViT]):
        super().__init__()
        self.rows = nn.ModuleList(rows)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether blocks without a target recompute their activations in backward."""
        for row in self.rows:
            row.vit.set_grad_checkpointing(enable)

    def forward(
        self, images: Tensor, ancestry_blocks: dict[int, Tensor], ancestry_attentions: dict[int, Tensor]
    ) -> list[dict[str, Tensor | list[tuple[Tensor, Tensor]]]]:
        """`AuxiliaryViT.forward` of every row, narrow to wide."""
        return [row(images, ancestry_blocks, ancestry_attentions) for row in self.rows]


def build_rows(
    space: PathSpace,
    rows: tuple[RowConfig, ...],
    distil: DistilConfig,
    ancestry_depth: int = 0,
    ancestry_width: int = 0,
) -> list[AuxiliaryViT]:
    """The auxiliary models of all rows with random weights, narrow to wide.

    ancestry_*: depth and width of a plain ViT; rows with levels need them.
    """
    built = []
    for index, row in enumerate(rows):
        vit = row_vit(space, index, tuple(each.heads for each in rows), row.drop_path)
        levels = levels_of(row.levels, ancestry_depth, space.depths[index])
        bank = TransformationBank(ancestry_width, row.width, len(levels), inverse=distil.inverse_weight > 0)
        built.append(AuxiliaryViT(vit, bank, levels, distil.target_norm, index, row.source == "distil"))
    return built
