"""The fused operations on tokens of any leading shape, under autocast; an argument chooses how they are computed."""

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
"""Names of GPUs, as torch has them, on which benchmarks/ shows every fused operation faster than torch.compile."""


def resolved(mode: Ops, device: torch.device) -> Ops:
    """The mode on a device: `auto` becomes fused or reference; other modes stay."""
    if mode != "auto":
        return mode
    return "fused" if device.type == "cuda" and torch.cuda.get_device_name(device) in FASTER else "reference"


def stitch_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, mode: Ops = "auto") -> tuple[Tensor, Tensor]:
    """`reference.stitch_norm` of x [..., K]: y and z [..., N]."""
    return entered(*stitch_rows(x, weight, bias, eps, mode))


def stitch_rows(x: Tensor, weight: Tensor, bias: Tensor, eps: float, mode: Ops = "auto") -> tuple[Tensor, ...]:
    """y [..., N] of `stitch_norm` and, without gradient, its standardised rows [..., N], their means and 1 / std [M].

    A user of the rows, perhaps in another module, gets them with their gradient from `entered`.
    """
    mode = resolved(mode, x.device)
    if mode != "fused":
        return _plain("stitch_rows", mode)(x, weight, bias, eps)
    dtype = autocast_dtype(x)
    with torch.autocast(x.device.type, enabled=False):  # everything inside is cast already
        rows = x.to(dtype).reshape(-1, x.shape[-1]).contiguous()
        y, z, mean, rstd = fused_stitch_norm(rows, weight.to(dtype).contiguous(), bias, eps)
    return y.view(*x.shape[:-1], -1), z.view(*x.shape[:-1], -1), mean, rstd


class Entered(torch.autograd.Function):
    """The identity on y and its standardised rows, whose backward returns one gradient for both.

    The rows z were computed from y elsewhere and without gradient. Their gradient belongs to y: it passes through the
    norm's backward here and is added to y's own.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, z: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
        """Returns y and z [..., N]. mean, rstd: [M]."""
        ctx.save_for_backward(y, mean, rstd)
        ctx.set_materialize_grads(False)
        return y.view_as(y), z.view_as(z)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dz: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        """The gradient of y from those of y and z, in one pass."""
        y, mean, rstd = ctx.saved_tensors
        if dz is None:
            return dy, None, None, None
        dy, dz, rows = (None if part is None else part.reshape(-1, y.shape[-1]).contiguous() for part in (dy, dz, y))
        return norm_backward(dy, dz, rows, None, mean, rstd)[0].view(y.shape), None, None, None


def entered(y: Tensor, z: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """y and its standardised rows z [..., N], both with gradient, from the results of `stitch_rows`."""
    return Entered.apply(y, z, mean, rstd)


def norm_residual(
    branch: Tensor, residual: Tensor, gamma: Tensor, beta: Tensor, eps: float, mode: Ops = "auto"
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
    """The dtype in which a product of x is computed: autocast's if it is on, else x's own."""
    kind = x.device.type
    cast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)  # the meta device has none
    return torch.get_autocast_dtype(kind) if cast else x.dtype


@cache
def _plain(name: str, mode: Ops) -> Callable[..., Any]:
    function = getattr(reference, name)
    return torch.compile(function, fullgraph=True, dynamic=False) if mode == "compiled" else function
