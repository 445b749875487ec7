"""The stitch layer with the norm of the block behind it, in one kernel: y = x W^T + b, z = LN(y)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import triton_op

from lgp_dist.ops import device
from lgp_dist.ops.device import TILE, kernels, launch, tiles
from lgp_dist.ops.norm_residual import backward_sums, normalised


@triton_op("lgp::stitch_norm", mutates_args=())
def stitch_norm(
    x: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [M, K], weight [N, K] of x's dtype and bias [N] to y and z [M, N] in x's dtype, mean and 1 / std of y [M]."""
    rows, (wide, narrow) = x.shape[0], weight.shape
    fits = tiles(narrow, wide)
    if fits is None or not device.runs(x):
        y = F.linear(x, weight, bias.to(x.dtype))
        z, mean, rstd = normalised(y, gamma, beta, eps)
        return y, z.to(y.dtype), mean, rstd
    columns, chunk = fits
    y = x.new_empty(rows, wide)
    z = torch.empty_like(y)
    mean = torch.empty(rows, dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    affine = (bias, bias) if gamma is None else (gamma, beta)  # not read by the kernel
    launch(kernels.stitch_norm_forward, -(-rows // TILE))(
        x, weight, bias, *affine, y, z, mean, rstd, rows, eps,
        K=narrow, N=wide, BM=TILE, BN=columns, BK=chunk, AFFINE=gamma is not None, **options(narrow),
    )  # fmt: skip
    return y, z, mean, rstd


def options(narrow: int) -> dict[str, int]:
    """Warps and stages of the kernel for x of this width: what fits into shared memory without spills."""
    return {"num_warps": 4, "num_stages": 3 if narrow <= 192 else 2}


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, gamma, beta, _ = inputs
    y, _, mean, rstd = output
    ctx.save_for_backward(x, weight, gamma, y, mean, rstd)
    ctx.dtypes = (bias.dtype, None if gamma is None else (gamma.dtype, beta.dtype))
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, dz: Tensor | None, *statistics: None) -> tuple[Tensor | None, ...]:
    x, weight, gamma, y, mean, rstd = ctx.saved_tensors
    found = backward_sums(dy, dz, y, gamma, mean, rstd)
    if found is None:
        return (None,) * 6
    (dt, sums), (bias, affine) = found, ctx.dtypes
    dx = dt @ weight if ctx.needs_input_grad[0] else None
    dw = dt.t() @ x if ctx.needs_input_grad[1] else None
    dgamma, dbeta = (None, None) if affine is None else (sums[0].to(affine[0]), sums[1].to(affine[1]))
    return dx, dw, sums[2].to(bias), dgamma, dbeta, None


stitch_norm.register_autograd(_backward, setup_context=_setup)
