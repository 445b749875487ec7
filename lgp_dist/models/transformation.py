"""Transformations: trained linear maps between the ancestry's width and an auxiliary model's, for each level."""

from dataclasses import dataclass

import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from lgp_dist.config.run_config import Levels
from lgp_dist.errors import UserError


@dataclass(frozen=True)
class Level:
    """A pair of blocks, counted from 0, whose outputs are matched."""

    ancestry: int
    auxiliary: int


def levels_of(policy: Levels, ancestry_depth: int, auxiliary_depth: int) -> tuple[Level, ...]:
    """The levels of a policy: none, the last block, or the last block of each third (`dense`).

    With 12 and 6 blocks, dense pairs blocks 4, 8 and 12 of the ancestry with 2, 4 and 6 of the auxiliary model, counted
    from 1. UserError where there are too few blocks.
    """
    count = {"none": 0, "last": 1, "dense": 3}[policy]
    if min(ancestry_depth, auxiliary_depth) < count:
        raise UserError(
            f"levels {policy} needs {count} blocks, but the ancestry has {ancestry_depth} and the row "
            f"{auxiliary_depth}: choose levels last, or more blocks."
        )
    return tuple(
        Level(round(ancestry_depth * i / count) - 1, round(auxiliary_depth * i / count) - 1)
        for i in range(1, count + 1)
    )


def normalised(tokens: Tensor, norm: str) -> Tensor:
    """[B, N, D] tokens, each normalised to mean 0 and variance 1 (`layer`), or unchanged (`none`)."""
    return F.layer_norm(tokens, tokens.shape[-1:]) if norm == "layer" else tokens


class TransformationBank(nn.Module):
    """For each level: W and M from the ancestry's width to the auxiliary's, and V back; identities if widths are equal.

    Row convention: `tokens @ W + b`. W and M are those of the paper's equations 4 and 5. V is trained for the stitch
    layer, which maps from narrow to wide: W's transpose does so only if W has orthonormal columns.
    """

    def __init__(self, ancestry_width: int, auxiliary_width: int, levels: int, *, inverse: bool):
        super().__init__()
        same = ancestry_width == auxiliary_width

        def maps(source: int, target: int) -> nn.ModuleList:
            return nn.ModuleList(nn.Identity() if same else nn.Linear(source, target) for _ in range(levels))

        self.block = maps(ancestry_width, auxiliary_width)
        self.attention = maps(ancestry_width, auxiliary_width)
        self.inverse = maps(auxiliary_width, ancestry_width) if inverse and not same else nn.ModuleList()
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=module.in_features**-0.5)
                nn.init.zeros_(module.bias)


Taps = tuple[dict[int, Tensor], dict[int, Tensor]]
"""Block outputs and attention outputs, [B, N, D] by block index."""


def forward_pairs(
    bank: TransformationBank, levels: tuple[Level, ...], target_norm: str, ancestry: Taps, auxiliary: Taps
) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """(target, prediction) pairs of each level, [B, N, D] each, to be compared by mean squared error.

    block (equation 4): LN(B_anc W) and B_aux. attention (equation 5): LN(A_anc M) and A_aux. inverse: LN(B_anc) and
    B_aux V. Without LN, W and M could shrink the loss to zero by shrinking the target; target_norm `none` leaves it
    out, as the paper's formulas do.
    """
    pairs: dict[str, list[tuple[Tensor, Tensor]]] = {"block": [], "attention": [], "inverse": []}
    for index, level in enumerate(levels):
        block, attention = ancestry[0][level.ancestry], ancestry[1][level.ancestry]
        ours, our_attention = auxiliary[0][level.auxiliary], auxiliary[1][level.auxiliary]
        pairs["block"].append((normalised(bank.block[index](block), target_norm), ours))
        pairs["attention"].append((normalised(bank.attention[index](attention), target_norm), our_attention))
        if len(bank.inverse):
            pairs["inverse"].append((normalised(block, target_norm), bank.inverse[index](ours)))
    return pairs
