"""Residual add and LayerNorm in one pass, forward and backward: y = residual + branch, z = LN(y)."""

from typing import Any

import torch
from torch import Tensor
from torch.library import triton_op

from lgp_dist.ops import device
from lgp_dist.ops.device import PROGRAMS, kernels, launch

ROWS = 4
"""Rows of a tile."""
OPTIONS = {"num_warps": 8, "num_stages": 2}
"""Compiler options of both kernels."""


@triton_op("lgp::norm_residual", mutates_args=())
def norm_residual(
    branch: Tensor, residual: Tensor, gamma: Tensor, beta: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """branch, residual [M, N] to y [M, N] in the wider dtype, z [M, N] in branch's, mean and 1 / std of y [M]."""
    if not device.runs(branch):
        y = residual + branch
        z, mean, rstd = normalised(y, gamma, beta, eps)
        return y, z.to(branch.dtype), mean, rstd
    (rows, width), wide = branch.shape, torch.promote_types(branch.dtype, residual.dtype)
    y, z = torch.empty_like(branch, dtype=wide), torch.empty_like(branch)
    mean = torch.empty(rows, dtype=torch.float32, device=branch.device)
    rstd = torch.empty_like(mean)
    launch(kernels.norm_residual_forward, -(-rows // ROWS))(
        branch, residual, gamma, beta, y, z, mean, rstd, rows, eps,
        N=width, NP=1 << (width - 1).bit_length(), BM=ROWS, **OPTIONS,
    )  # fmt: skip
    return y, z, mean, rstd


def normalised(rows: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """LN(rows) [M, N], or standardised rows without gamma and beta, and mean and 1 / std [M]; float32 or wider."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    affine = (None if gamma is None else gamma.to(wide), None if beta is None else beta.to(wide))
    z, mean, rstd = torch.native_layer_norm(rows.to(wide), rows.shape[-1:], *affine, eps)
    return z, mean.reshape(-1), rstd.reshape(-1)


@triton_op("lgp::norm_backward", mutates_args=())
def norm_backward(
    dy: Tensor | None, dz: Tensor, y: Tensor, gamma: Tensor | None, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """From the gradients of y and z [M, N]: the gradient of y through both, [M, N], and those of gamma and beta [2, N]
    in float32 or wider, zero without gamma. The two are one tensor, since an operation's outputs may not alias."""
    if not device.runs(dz):
        return _norm_backward(dy, dz, y, gamma, mean, rstd)
    rows, width = y.shape
    programs = min(PROGRAMS, -(-rows // ROWS))
    dt = torch.empty_like(y)
    sums = torch.empty(2, programs, width, dtype=torch.float32, device=y.device)
    launch(kernels.norm_backward, programs)(
        dz if dy is None else dy, dz, y, mean if gamma is None else gamma, mean, rstd, dt, sums, rows, programs,
        N=width, NP=1 << (width - 1).bit_length(), BM=ROWS, HAS_DY=dy is not None, AFFINE=gamma is not None,
        **OPTIONS,
    )  # fmt: skip
    return dt, sums.sum(1)


def _norm_backward(
    dy: Tensor | None, dz: Tensor, y: Tensor, gamma: Tensor | None, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(y.dtype, torch.float32)
    scale = y.new_ones(y.shape[-1:], dtype=wide) if gamma is None else gamma.to(wide)
    affine = gamma is not None
    dt, *sums = torch.ops.aten.native_layer_norm_backward(
        dz.to(wide), y.to(wide), y.shape[-1:], mean[:, None], rstd[:, None], scale, scale, [True, affine, affine]
    )
    dt = dt if dy is None else dt + dy.to(wide)
    return dt.to(y.dtype), torch.stack(sums if affine else [torch.zeros_like(scale)] * 2)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    branch, residual, gamma, beta, _ = inputs
    y, _, mean, rstd = output
    ctx.save_for_backward(gamma, y, mean, rstd)
    ctx.dtypes = (branch.dtype, residual.dtype, gamma.dtype, beta.dtype)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, dz: Tensor | None, *statistics: None) -> tuple[Tensor | None, ...]:
    gamma, y, mean, rstd = ctx.saved_tensors
    if dz is not None:
        dt, sums = norm_backward(None if dy is None else dy.contiguous(), dz.contiguous(), y, gamma, mean, rstd)
    elif dy is not None:
        dt, sums = dy, torch.zeros(2, *gamma.shape, device=gamma.device)
    else:
        return (None,) * 5
    return *(part.to(dtype) for part, dtype in zip((dt, dt, *sums), ctx.dtypes, strict=True)), None


norm_residual.register_autograd(_backward, setup_context=_setup)
