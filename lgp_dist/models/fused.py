"""A stitch and timm's block on fused operations; weights stay in timm's modules, under timm's names.

A stitch layer and the norm of the next block are one operation, but two units of the pool, and under ZeRO-3 a unit
cannot read another's parameters. The stitch therefore returns its tokens with their standardised rows (mean 0, variance
1), and the block folds its norm's gamma and beta into its QKV projection. Only the tokens carry a gradient.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.models.vision_transformer import Attention, Block
from torch import Tensor

from lgp_dist.config.run_config import Ops
from lgp_dist.models.stitch import StitchLayer
from lgp_dist.ops import dispatch


def stitch(layer: StitchLayer, tokens: Tensor, eps: float, ops: Ops) -> tuple[Tensor, ...]:
    """[B, N, source] to tokens [B, N, target] and, without gradient, their standardised rows of the same shape, and the
    rows' means and 1 / std [B N]. eps: of the blocks' norms."""
    return dispatch.stitch_rows(tokens, layer.matrix, layer.bias, eps, ops)


def fused_block(block: Block, ops: Ops, tokens: Tensor, *rows: Tensor) -> Tensor:
    """timm's `Block.forward` of [B, N, D]. rows: what `stitch` returned next to the tokens, if it comes before."""
    if rows:
        tokens, standard = dispatch.entered(tokens, *rows)
        attention = attend(block.attn, F.linear(standard, *folded(block)))
    else:
        attention = block.attn(block.norm1(tokens))
    norm, branch = block.norm2, block.drop_path1(block.ls1(attention))
    tokens, normed = dispatch.norm_residual(branch, tokens, norm.weight, norm.bias, norm.eps, ops)
    return tokens + block.drop_path2(block.ls2(block.mlp(normed)))


def folded(block: Block) -> tuple[Tensor, Tensor]:
    """QKV's weight [3 D, D] and bias [3 D] for standardised rows z, from (z gamma + beta) W^T + b."""
    norm, qkv = block.norm1, block.attn.qkv
    with torch.autocast(qkv.weight.device.type, enabled=False):
        return qkv.weight * norm.weight, qkv.bias + (qkv.weight * norm.bias).sum(1)


def attend(attention: Attention, qkv: Tensor) -> Tensor:
    """timm's `Attention.forward`, as `build_vit` sets it, after its QKV projection: [B, N, 3 D] to [B, N, D].

    timm's takes no other weights, and swapping them in for a call would change the order of a module's parameters on
    one rank alone.
    """
    query, key, value = rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=attention.num_heads)
    mixed = F.scaled_dot_product_attention(query, key, value)
    return attention.proj(rearrange(mixed, "b h n d -> b n (h d)"))
