"""The stitch layer, and the formulas of its initialisations.

Row convention throughout: a matrix [narrow, wide] maps tokens as `tokens @ matrix + bias`. Only this file transposes it
into torch's layout.
"""

import torch
from einops import rearrange
from timm.layers import trunc_normal_
from torch import Tensor, nn

Affine = tuple[Tensor, Tensor]
"""Matrix [narrow, wide] and bias [wide]."""


class StitchLayer(nn.Linear):
    """A linear layer from the tokens of one row, [B, N, narrow], to those of the next, [B, N, wide]."""

    def __init__(self, narrow: int, wide: int):
        super().__init__(narrow, wide)
        trunc_normal_(self.weight, std=0.02)
        nn.init.zeros_(self.bias)

    @torch.no_grad()
    def start_from(self, affine: Affine) -> None:
        """Sets its weights to a matrix [narrow, wide] and a bias [wide]."""
        matrix, bias = affine
        self.weight.copy_(matrix.T)
        self.bias.copy_(bias)


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
    """Ridge regression from narrow to wide tokens, fed batch by batch; sums are kept in float64.

    With X the narrow tokens, extended by a column of ones for the bias, and Y the wide ones, the solution of
    (X^T X + penalty) S = X^T Y needs only two sums over tokens.
    """

    def __init__(self, narrow: int, wide: int):
        self.gram = torch.zeros(narrow + 1, narrow + 1, dtype=torch.float64)
        self.cross = torch.zeros(narrow + 1, wide, dtype=torch.float64)

    def add(self, source: Tensor, target: Tensor) -> None:
        """Adds tokens [..., narrow] and their targets [..., wide]."""
        flat = rearrange(source, "... d -> (...) d").double()
        flat = torch.cat([flat, flat.new_ones(len(flat), 1)], dim=1)
        self.gram += flat.T @ flat
        self.cross += flat.T @ rearrange(target, "... d -> (...) d").double()

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
