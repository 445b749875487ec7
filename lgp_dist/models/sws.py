"""Stage-wise weight sharing (SWS, arXiv 2404.16897): an auxiliary net whose stages share weights, and its expansion.

The auxiliary net has one block for each stage, its learngene layer, and runs it once for each of the stage's layers. A
model of any depth copies learngene layers in the order of their stages (`depths.layers_per_stage`), and everything
around the blocks; from then on it owns its weights.
"""

import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from lgp_dist.config.run_config import DistilConfig, RowConfig
from lgp_dist.errors import UserError
from lgp_dist.models.auxiliary import AuxiliaryRows, AuxiliaryViT
from lgp_dist.models.pool import LearngenePool, row_vit, space_vit
from lgp_dist.models.transformation import TransformationBank
from lgp_dist.paths.depths import DepthSpace, layer_sources


class Stage(nn.Module):
    """The layers of one stage: one block, run several times."""

    def __init__(self, block: Block, layers: int):
        super().__init__()
        self.block, self.layers = block, layers

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, N, D] to the same shape."""
        for _ in range(self.layers):
            torch.clear_autocast_cache()  # each layer casts the weights itself, so that gradients add up in fp32
            tokens = self.block(tokens)
        return tokens


def stage_vit(space: DepthSpace, heads: int, drop_path: float = 0.0) -> VisionTransformer:
    """The auxiliary net with random weights: a plain ViT without class token, whose blocks are stages.

    drop_path: largest stochastic-depth rate; it grows from stage to stage, and is equal for the layers of a stage.
    """
    vit = space_vit(space, space.width, len(space.stages), heads, drop_path)
    vit.blocks = nn.Sequential(*(Stage(*pair) for pair in zip(vit.blocks, space.stages, strict=True)))
    return vit


def auxiliary_net(space: DepthSpace, row: RowConfig, distil: DistilConfig) -> AuxiliaryRows:
    """The auxiliary net as the one row that stage distil trains."""
    vit = stage_vit(space, row.heads, row.drop_path)
    bank = TransformationBank(space.width, space.width, 0, inverse=False)
    return AuxiliaryRows([AuxiliaryViT(vit, bank, (), distil.target_norm, distilled=row.source == "distil")])


@torch.no_grad()
def expand(space: DepthSpace, auxiliary: VisionTransformer, heads: tuple[int, ...]) -> LearngenePool:
    """A pool of models of all depths with copies of the auxiliary net's weights.

    heads: of each model. UserError where they differ from the auxiliary net's: copied qkv weights would load anyway,
    and be split into other heads.
    """
    learnt = auxiliary.blocks[0].block.attn.num_heads
    for path, count in zip(space.paths, heads, strict=True):
        if count != learnt:
            raise UserError(
                f"{path.key} has {count} attention heads, but the auxiliary net learnt its layers with {learnt}, and "
                f"copied weights would be split into other heads: set model.rows.0.heads to {learnt}."
            )
    rows = []
    for path in space.paths:
        vit = row_vit(space, path.first_row, heads)
        around = {name: value for name, value in auxiliary.state_dict().items() if not name.startswith("blocks.")}
        sources = layer_sources(space.stages, path.blocks)
        blocks = {
            f"blocks.{layer}.{name}": value
            for layer, stage in enumerate(sources)
            for name, value in auxiliary.blocks[stage].block.state_dict().items()
        }
        vit.load_state_dict(around | blocks, strict=True)
        rows.append(vit)
    return LearngenePool(space, rows)
