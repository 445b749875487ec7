"""The definitions of the fused operations in plain torch, in any floating dtype."""

import torch
import torch.nn.functional as F
from torch import Tensor


def stitch_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y [..., N] = x [..., K] @ weight [N, K].T + bias [N], and its rows with mean 0 and variance 1, z [..., N]."""
    y = F.linear(x, weight, bias)
    return y, F.layer_norm(y, y.shape[-1:], eps=eps)


def stitch_rows(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y of `stitch_norm` and, without gradient, its standardised rows, and its means and 1 / std [M]."""
    y = F.linear(x, weight, bias)
    wide = y.detach().to(torch.promote_types(y.dtype, torch.float32))
    z, mean, rstd = torch.native_layer_norm(wide, y.shape[-1:], None, None, eps)
    return y, z.to(y.dtype), mean.reshape(-1), rstd.reshape(-1)


def norm_residual(branch: Tensor, residual: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y [..., N] = residual + branch, and z = LN(y) [..., N] in the branch's dtype. gamma, beta: [N]."""
    y = residual + branch
    return y, F.layer_norm(y, y.shape[-1:], gamma, beta, eps).to(branch.dtype)
