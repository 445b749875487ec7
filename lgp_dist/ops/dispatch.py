"""Which way a fused operation is computed, by argument; autocast; tokens of any leading shape."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lgp_dist.config.run_config import Ops
from lgp_dist.ops import reference
from lgp_dist.ops.norm_residual import norm_backward
from lgp_dist.ops.norm_residual import norm_residual as fused_norm_residual
from lgp_dist.ops.stitch_norm import stitch_norm as fused_stitch_norm

FASTER: frozenset[str] = frozenset()
"""Cards, by the name that torch gives them, on which benchmarks/ shows every fused operation ahead of torch.compile."""


def resolved(mode: Ops, device: torch.device) -> Ops:
    """What `auto` means on a device; other modes are themselves."""
    if mode != "auto":
        return mode
    return "fused" if device.type == "cuda" and torch.cuda.get_device_name(device) in FASTER else "reference"


def stitch_norm(
    x: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, mode: Ops = "auto"
) -> tuple[Tensor, Tensor]:
    """`reference.stitch_norm` of x [..., K]: y and z [..., N]."""
    mode = resolved(mode, x.device)
    if mode != "fused":
        return _plain("stitch_norm", mode)(x, weight, bias, gamma, beta, eps)
    return _fused_stitch(x, weight, bias, gamma, beta, eps)[:2]


def _fused_stitch(x: Tensor, weight: Tensor, bias: Tensor, *norm: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = autocast_dtype(x)
    with torch.autocast(x.device.type, enabled=False):  # nothing inside may be cast again
        rows = x.to(dtype).reshape(-1, x.shape[-1]).contiguous()
        y, z, mean, rstd = fused_stitch_norm(rows, weight.to(dtype).contiguous(), bias, *norm)
    return y.view(*x.shape[:-1], -1), z.view(*x.shape[:-1], -1), mean, rstd


def stitch_rows(x: Tensor, weight: Tensor, bias: Tensor, eps: float, mode: Ops = "auto") -> tuple[Tensor, ...]:
    """y [..., N] of `stitch_norm`, and without gradient its rows standardised [..., N], their means and 1 / std [M].

    What y is used for as rows takes them from `entered`, perhaps in another module.
    """
    mode = resolved(mode, x.device)
    if mode != "fused":
        return _plain("stitch_rows", mode)(x, weight, bias, eps)
    y, *rows = _fused_stitch(x, weight, bias, None, None, eps)
    return y, *(part.detach() for part in rows)


class Entered(torch.autograd.Function):
    """The identity on y and its standardised rows, which computes the gradient of both as one."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, z: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
        """y and z: [..., N], passed through. mean, rstd: [M]."""
        ctx.save_for_backward(y, mean, rstd)
        ctx.set_materialize_grads(False)
        return y.view_as(y), z.view_as(z)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dz: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        """The gradient of y, in one pass."""
        y, mean, rstd = ctx.saved_tensors
        if dz is None:
            return dy, None, None, None
        dy, dz, rows = (None if part is None else part.reshape(-1, y.shape[-1]).contiguous() for part in (dy, dz, y))
        return norm_backward(dy, dz, rows, None, mean, rstd)[0].view(y.shape), None, None, None


def entered(y: Tensor, z: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """y and its standardised rows z [..., N], both with gradient, of what `stitch_rows` gave."""
    return Entered.apply(y, z, mean, rstd)


def norm_residual(
    branch: Tensor, residual: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, mode: Ops = "auto"
) -> tuple[Tensor, Tensor]:
    """`reference.norm_residual` of tokens [..., N]: y and z [..., N]."""
    mode = resolved(mode, branch.device)
    if mode != "fused":
        return _plain("norm_residual", mode)(branch, residual, gamma, beta, eps)
    with torch.autocast(branch.device.type, enabled=False):
        rows = [tokens.reshape(-1, tokens.shape[-1]).contiguous() for tokens in (branch, residual)]
        y, z, _, _ = fused_norm_residual(*rows, gamma, beta, eps)
    return y.view(branch.shape), z.view(branch.shape)


def autocast_dtype(x: Tensor) -> torch.dtype:
    """What a product of x is computed in: autocast's dtype where one surrounds it, else its own."""
    kind = x.device.type
    cast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)  # the meta device has none
    return torch.get_autocast_dtype(kind) if cast else x.dtype


@cache
def _plain(name: str, mode: Ops) -> Callable[..., Any]:
    function = getattr(reference, name)
    return torch.compile(function, fullgraph=True, dynamic=False) if mode == "compiled" else function
