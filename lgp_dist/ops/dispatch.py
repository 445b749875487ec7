"""Which way a fused operation is computed, by argument; autocast; tokens of any leading shape."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lgp_dist.config import Ops
from lgp_dist.ops import reference
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
    dtype = _autocast_dtype(x)
    with torch.autocast(x.device.type, enabled=False):  # nothing inside may be cast again
        rows = x.to(dtype).reshape(-1, x.shape[-1]).contiguous()
        y, z, _, _ = fused_stitch_norm(rows, weight.to(dtype).contiguous(), bias, gamma, beta, eps)
    return y.view(*x.shape[:-1], -1), z.view(*x.shape[:-1], -1)


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


def _autocast_dtype(x: Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


@cache
def _plain(name: str, mode: Ops) -> Callable[..., Any]:
    function = getattr(reference, name)
    return torch.compile(function, fullgraph=True, dynamic=False) if mode == "compiled" else function
