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
    branch: Tensor, residual: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float
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
    affine = (mean, mean) if gamma is None else (gamma, beta)  # not read by the kernel
    launch(kernels.norm_residual_forward, -(-rows // ROWS))(
        branch, residual, *affine, y, z, mean, rstd, rows, eps,
        N=width, NP=1 << (width - 1).bit_length(), BM=ROWS, AFFINE=gamma is not None, **OPTIONS,
    )  # fmt: skip
    return y, z, mean, rstd


def normalised(rows: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """LN(rows) [M, N], mean and 1 / std [M], in float32 or wider."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    affine = (None if gamma is None else gamma.to(wide), None if beta is None else beta.to(wide))
    z, mean, rstd = torch.native_layer_norm(rows.to(wide), rows.shape[-1:], *affine, eps)
    return z, mean.reshape(-1), rstd.reshape(-1)


@triton_op("lgp::norm_backward", mutates_args=())
def norm_backward(
    dy: Tensor | None, dz: Tensor, y: Tensor, gamma: Tensor | None, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """From the gradients of y and z [M, N]: the gradient of y through both, [M, N], and, in float32 or wider, the sums
    [3, N] for gamma, beta (both zero without gamma) and a bias added to y. The sums are one tensor, since an
    operation's outputs may not alias each other."""
    if not device.runs(dz):
        return _norm_backward(dy, dz, y, gamma, mean, rstd)
    rows, width = y.shape
    programs = min(PROGRAMS, -(-rows // ROWS))
    dt = torch.empty_like(y)
    sums = torch.empty(3, programs, width, dtype=torch.float32, device=y.device)
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
    dt, dgamma, dbeta = torch.ops.aten.native_layer_norm_backward(
        dz.to(wide),
        y.to(wide),
        y.shape[-1:],
        mean[:, None],
        rstd[:, None],
        scale,
        scale,
        [True, gamma is not None, True],
    )
    dt = dt if dy is None else dt + dy.to(wide)
    zero = torch.zeros_like(dbeta)
    sums = (zero, zero) if gamma is None else (dgamma, dbeta)
    return dt.to(y.dtype), torch.stack((*sums, dt.sum(0)))


def backward_sums(
    dy: Tensor | None, dz: Tensor | None, y: Tensor, gamma: Tensor | None, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor] | None:
    """`norm_backward` where one of the gradients may be missing; None where both are."""
    if dz is None and dy is None:
        return None
    if dz is None:
        wide = torch.promote_types(y.dtype, torch.float32)
        sums = torch.stack((torch.zeros_like(mean[:1].expand(y.shape[1])),) * 2 + (dy.sum(0, dtype=wide),))
        return dy.to(y.dtype), sums
    return norm_backward(None if dy is None else dy.contiguous(), dz.contiguous(), y, gamma, mean, rstd)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    branch, residual, gamma, beta, _ = inputs
    y, _, mean, rstd = output
    ctx.save_for_backward(gamma, y, mean, rstd)
    ctx.dtypes = (branch.dtype, residual.dtype, None if gamma is None else (gamma.dtype, beta.dtype))
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, dz: Tensor | None, *statistics: None) -> tuple[Tensor | None, ...]:
    gamma, y, mean, rstd = ctx.saved_tensors
    found = backward_sums(dy, dz, y, gamma, mean, rstd)
    if found is None:
        return (None,) * 5
    (dt, sums), (branch, residual, affine) = found, ctx.dtypes
    dgamma, dbeta = (None, None) if affine is None else (sums[0].to(affine[0]), sums[1].to(affine[1]))
    return dt.to(branch), dt.to(residual), dgamma, dbeta, None


norm_residual.register_autograd(_backward, setup_context=_setup)
