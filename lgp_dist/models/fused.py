"""A stitch and timm's block on the fused operations. Weights stay where timm has them, under timm's names.

A stitch hands on its tokens with their standardised rows (mean 0, variance 1), and the block that it enters folds its
own norm's gamma and beta into its own QKV projection: neither reads the other's parameters.
"""

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.func import functional_call

from lgp_dist.config import Ops
from lgp_dist.ops import dispatch


def stitch(layer: nn.Linear, tokens: Tensor, eps: float, ops: Ops) -> tuple[Tensor, Tensor]:
    """[B, N, narrow] to tokens and their standardised rows, each [B, N, wide]. eps: of the norms that blocks have."""
    return dispatch.stitch_norm(tokens, layer.weight, layer.bias, None, None, eps, ops)


def fused_block(block: Block, ops: Ops, tokens: Tensor, standard: Tensor | None = None) -> Tensor:
    """timm's `Block.forward` of [B, N, D]. standard: the tokens' standardised rows, if a stitch handed them on."""
    if standard is None:
        attention = block.attn(block.norm1(tokens))
    else:
        attention = functional_call(block.attn, folded(block), standard)
    norm, branch = block.norm2, block.drop_path1(block.ls1(attention))
    tokens, rows = dispatch.norm_residual(branch, tokens, norm.weight, norm.bias, norm.eps, ops)
    return tokens + block.drop_path2(block.ls2(block.mlp(rows)))


def folded(block: Block) -> dict[str, Tensor]:
    """QKV's weight [3 D, D] and bias [3 D] for rows to which norm1's gamma and beta have not been applied."""
    norm, qkv = block.norm1, block.attn.qkv
    with torch.autocast(qkv.weight.device.type, enabled=False):
        return {"qkv.weight": qkv.weight * norm.weight, "qkv.bias": qkv.bias + (qkv.weight * norm.bias).sum(1)}
