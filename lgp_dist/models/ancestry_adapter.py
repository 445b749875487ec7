"""Fits a pretrained model to a run: images as it expects them, and its tokens as the rows have theirs.

Any model of timm whose blocks work on one grid of tokens can be compared with the rows: plain ViTs, and those with
registers, a distilled token or none, layer scale, RoPE, SwiGLU, and any kind of pooling.
"""

from collections.abc import Collection, Sequence
from contextlib import ExitStack

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

Taps = dict[int, Tensor]
"""Outputs [B, N, D] by block, from 0."""


class ImageAdapter(nn.Module):
    """Images [B, C, S, S] of the run as the ancestry expects them, [B, C, T, T]: resized, with its mean and std."""

    def __init__(
        self, size: int, ours: tuple[Sequence[float], Sequence[float]], theirs: tuple[Sequence[float], Sequence[float]]
    ):
        """size: T. ours, theirs: mean and std by channel; for another number of channels, theirs are averaged."""
        super().__init__()
        self.size = size
        mean, std = (torch.tensor(part, dtype=torch.float64) for part in ours)
        their_mean, their_std = (
            part if len(part) == len(mean) else part.mean().expand(len(mean))
            for part in (torch.tensor(values, dtype=torch.float64) for values in theirs)
        )
        self.renormalises = not (torch.equal(mean, their_mean) and torch.equal(std, their_std))
        values = " and ".join(f"{name} {part.tolist()}" for name, part in (("mean", their_mean), ("std", their_std)))
        self.normalisation = f" of {values}" if self.renormalises else ""
        for name, value in (("scale", std / their_std), ("shift", (mean - their_mean) / their_std)):
            self.register_buffer(name, value.float().view(-1, 1, 1), persistent=False)

    def is_identity(self, size: int) -> bool:
        """Whether images of this side stay as they are."""
        return size == self.size and not self.renormalises

    def describe(self) -> str:
        """Size, mean and std, for the log."""
        return f"{self.size} pixels" + self.normalisation

    def forward(self, images: Tensor) -> Tensor:
        """Bicubic with antialiasing, as the weights of timm are mostly evaluated."""
        if images.shape[-1] != self.size:
            images = F.interpolate(images, (self.size, self.size), mode="bicubic", antialias=True)
        return torch.addcmul(self.shift, images, self.scale) if self.renormalises else images


def has_token_blocks(model: nn.Module) -> bool:
    """Whether timm's model is a sequence of blocks with attention over one square grid of tokens."""
    embed, blocks = getattr(model, "patch_embed", None), getattr(model, "blocks", None)
    grid = getattr(embed, "grid_size", None)
    return (
        isinstance(blocks, nn.Sequential | nn.ModuleList)
        and hasattr(model, "num_prefix_tokens")
        and grid is not None
        and grid[0] == grid[1]
        and all(hasattr(block, "attn") for block in blocks)
    )


class TokenAdapter:
    """Tokens of a model's block, [B, P + n, D], as the rows have theirs, [B, 1 + N, D]: class token, then the grid.

    Registers and a distilled token are left out, a missing class token is the mean of the grid, and another grid is
    resampled.
    """

    def __init__(self, model: nn.Module, grid: int):
        """grid: tokens along a side of the rows' grid."""
        self.prefix, self.grid = model.num_prefix_tokens, grid
        self.has_class = getattr(model, "cls_token", None) is not None
        self.theirs = model.patch_embed.grid_size[0]
        self.is_identity = self.prefix == 1 and self.has_class and self.theirs == grid

    def describe(self) -> str:
        """Its own tokens, for the log."""
        others = self.prefix - self.has_class
        first = ["a class token"] * self.has_class + [f"{others} other{'s' * (others > 1)}"] * (others > 0)
        return ", ".join([*first, f"{self.theirs} x {self.theirs} patches"])

    def __call__(self, tokens: Tensor) -> Tensor:
        """[B, 1 + N, D]."""
        patches = tokens[:, self.prefix :]
        first = tokens[:, :1] if self.has_class else patches.mean(1, keepdim=True)
        if self.theirs != self.grid:
            maps = rearrange(patches, "b (h w) d -> b d h w", h=self.theirs)
            maps = F.interpolate(maps, (self.grid, self.grid), mode="bilinear", antialias=True)
            patches = rearrange(maps, "b d h w -> b (h w) d")
        return torch.cat([first, patches], 1)


def tap(model: nn.Module, images: Tensor, blocks: Collection[int]) -> tuple[Tensor, Taps, Taps]:
    """The model's output for images [B, C, H, W] (logits, or pooled features of one without a classifier), and the
    outputs of the named blocks and of their attention, with all tokens."""
    attentions: Taps = {}
    with ExitStack() as hooks:
        for index in blocks:

            def keep(*call: Tensor, index: int = index) -> None:
                attentions[index] = call[-1]

            handle = model.blocks[index].attn.register_forward_hook(keep)
            hooks.callback(handle.remove)
        features, parts = model.forward_intermediates(
            images, indices=sorted(blocks), return_prefix_tokens=True, output_fmt="NLC"
        )
    whole = (torch.cat([part[1], part[0]], 1) if isinstance(part, tuple) else part for part in parts)
    return model.forward_head(features), dict(zip(sorted(blocks), whole, strict=True)), attentions


def fit_classifier(features: Tensor, labels: Tensor, classes: int, decay: float = 1e-4) -> tuple[Tensor, Tensor]:
    """Weight [classes, D] and bias [classes] of logistic regression on features [n, D] with labels [n].

    Features are standardised for the fit. decay: of the squared weights, per image. L-BFGS in float64.
    """
    features = features.double()
    mean, std = features.mean(0), features.std(0).clamp_min(1e-6)
    inputs = (features - mean) / std
    weight = torch.zeros(classes, features.shape[1], dtype=torch.float64, device=features.device, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, device=features.device, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=200, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        value = F.cross_entropy(F.linear(inputs, weight, bias), labels) + decay * weight.square().sum()
        value.backward()
        return value

    solver.step(loss)
    scaled = weight.detach() / std
    return scaled.float(), (bias.detach() - scaled @ mean).float()
