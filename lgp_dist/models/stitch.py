"""The stitch layer, and the formulas of its initialisations.

Row convention throughout: a matrix [source, target] maps tokens as `tokens @ matrix + bias`. Only this file transposes
it into torch's layout.
"""

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import trunc_normal_
from torch import Tensor, nn

Affine = tuple[Tensor, Tensor]
"""Matrix [source, target] and bias [target]."""


class _Fixed(torch.autograd.Function):
    """A weight whose gradient is zero, so that engines see one like any other and no optimizer moves it."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        """The weight."""
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """Zeros."""
        return torch.zeros_like(gradient)


class StitchLayer(nn.Linear):
    """A linear layer from the tokens of one row, [B, N, source], to those of another, [B, N, target].

    With a rank r, training moves its weight by a low-rank update (SN-Net v2, arXiv 2307.00154): weight + up down / r,
    of which `weight` stays as it starts. down [r, source] starts random and up [target, r] at zero.
    """

    def __init__(self, source: int, target: int, rank: int = 0):
        super().__init__(source, target)
        trunc_normal_(self.weight, std=0.02)
        nn.init.zeros_(self.bias)
        self.rank = rank
        if rank:
            self.down, self.up = nn.Parameter(torch.empty(rank, source)), nn.Parameter(torch.zeros(target, rank))
            nn.init.kaiming_uniform_(self.down, a=5**0.5)

    @property
    def matrix(self) -> Tensor:
        """What tokens are multiplied by, [target, source]: the weight, with its update."""
        if not self.rank:
            return self.weight
        with torch.autocast(self.weight.device.type, enabled=False):
            return torch.addmm(_Fixed.apply(self.weight), self.up, self.down, alpha=1 / self.rank)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, N, source] to [B, N, target]."""
        return F.linear(tokens, self.matrix, self.bias)

    @torch.no_grad()
    def start_from(self, affine: Affine) -> None:
        """Sets its weights to a matrix [source, target] and a bias [target], without an update."""
        matrix, bias = affine
        self.weight.copy_(matrix.T)
        self.bias.copy_(bias)

    def merged(self) -> dict[str, Tensor]:
        """The state dict of the same layer without a rank."""
        return {"weight": self.matrix.detach(), "bias": self.bias.detach()}


def from_transpose(transformations: list[nn.Linear]) -> Affine:
    """The paper's initialisation: the mean of the W [wide, narrow] of all levels, transposed; bias zero."""
    mean = torch.stack([linear.weight for linear in transformations]).mean(0)
    return mean, mean.new_zeros(mean.shape[1])


def from_pinv(transformation: nn.Linear, mean: Tensor) -> Affine:
    """The pseudo-inverse of a transformation `h @ W + b`, with bias mu - (mu W + b) W+.

    W loses dimensions, so it maps many h to the same tokens. W+ alone returns the shortest of them; with this bias the
    result is the one nearest to mu, the ancestry's mean token. This inverts what distillation taught only for
    `target_norm: none`: with `layer`, targets differ from `h @ W + b` by a scale and a shift for each token.

    transformation: W and b as a Linear from wide to narrow. mean: mu [wide]. Computed in float64.
    """
    matrix, bias, mean = transformation.weight.T.double(), transformation.bias.double(), mean.double()
    inverse = torch.linalg.pinv(matrix)
    return inverse.float(), (mean - (bias + mean @ matrix) @ inverse).float()


class LeastSquares:
    """Ridge regression from one row's tokens to another's, fed batch by batch; sums are kept in float64.

    With X the former, extended by a column of ones for the bias, and Y the latter, the solution of
    (X^T X + penalty) S = X^T Y needs only two sums over tokens.
    """

    def __init__(self, source: int, target: int):
        self.gram = torch.zeros(source + 1, source + 1, dtype=torch.float64)
        self.cross = torch.zeros(source + 1, target, dtype=torch.float64)

    def add(self, tokens: Tensor, targets: Tensor) -> None:
        """Adds tokens [..., source] and their targets [..., target]."""
        flat = rearrange(tokens, "... d -> (...) d").double()
        flat = torch.cat([flat, flat.new_ones(len(flat), 1)], dim=1)
        self.gram += flat.T @ flat
        self.cross += flat.T @ rearrange(targets, "... d -> (...) d").double()

    def solve(self, ridge: float) -> Affine:
        """Matrix and bias; the ridge is relative to the mean diagonal of X^T X and leaves out the bias."""
        penalty = torch.eye(len(self.gram), dtype=torch.float64) * (ridge * self.gram.diagonal()[:-1].mean())
        penalty[-1, -1] = 0.0
        solution = torch.linalg.solve(self.gram + penalty, self.cross)
        return solution[:-1].float(), solution[-1].float()


def mean_affine(parts: list[Affine]) -> Affine:
    """The mean of several solutions that share one layer."""
    matrices, biases = zip(*parts, strict=True)
    return torch.stack(matrices).mean(0), torch.stack(biases).mean(0)
