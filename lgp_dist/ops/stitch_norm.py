"""The stitch layer and the statistics of the next block's norm in one kernel: y = x W^T + b, z = (y - mean) / std."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import triton_op

from lgp_dist.ops import device
from lgp_dist.ops.device import TILE, kernels, launch, tiles
from lgp_dist.ops.norm_residual import normalised


@triton_op("lgp::stitch_norm", mutates_args=())
def stitch_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [M, K], weight [N, K] of x's dtype and bias [N] to y [M, N] in x's dtype and, without gradient, z [M, N] in
    x's dtype, and mean and 1 / std of y [M]."""
    rows, (wide, narrow) = x.shape[0], weight.shape
    fits = tiles(narrow, wide)
    if fits is None or not device.runs(x):
        y = F.linear(x, weight, bias.to(x.dtype))
        z, mean, rstd = normalised(y, None, None, eps)
        return y, z.to(y.dtype), mean, rstd
    columns, chunk = fits
    y = x.new_empty(rows, wide)
    z = torch.empty_like(y)
    mean = torch.empty(rows, dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    launch(kernels.stitch_norm_forward, -(-rows // TILE))(
        x, weight, bias, y, z, mean, rstd, rows, eps, K=narrow, N=wide, BM=TILE, BN=columns, BK=chunk, **options(narrow)
    )
    return y, z, mean, rstd


def options(narrow: int) -> dict[str, int]:
    """Warps and stages of the kernel for x of this width: what fits into shared memory without spills."""
    return {"num_warps": 4, "num_stages": 3 if narrow <= 192 else 2}


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, _ = inputs
    ctx.save_for_backward(x, weight)
    ctx.bias_dtype = bias.dtype
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, *others: None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 4
    x, weight = ctx.saved_tensors
    dx = dy @ weight if ctx.needs_input_grad[0] else None
    dw = dy.t() @ x if ctx.needs_input_grad[1] else None
    dbias = dy.sum(0, dtype=torch.promote_types(dy.dtype, torch.float32)).to(ctx.bias_dtype)
    return dx, dw, dbias, None


stitch_norm.register_autograd(_backward, setup_context=_setup)
