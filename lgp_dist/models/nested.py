"""Nested widths: one ViT whose first channels, heads and hidden units are models of their own."""

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.func import functional_call

from lgp_dist.config.run_config import Ops
from lgp_dist.models.pool import LearngenePool, recomputed, row_vit
from lgp_dist.paths.nested import NestedSpace
from lgp_dist.paths.path import Path


def narrowed(whole: nn.Module, narrow: nn.Module) -> dict[str, Tensor]:
    """The first entries of every tensor of a module, in the shapes of the same module of a narrower model."""
    shapes, found = {name: tensor.shape for name, tensor in narrow.named_parameters()}, {}
    for name, tensor in whole.named_parameters():
        # Query, key and value lie one after the other in one tensor: each gives its first channels.
        parts = 3 if ".qkv." in name else 1
        size = (shapes[name][0] // parts, *shapes[name][1:])
        pieces = [part[tuple(slice(length) for length in size)] for part in tensor.chunk(parts)]
        found[name] = pieces[0] if parts == 1 else torch.cat(pieces)
    return found


class NestedUnit(nn.Module):
    """A unit of a one-row pool. Each model runs it with the first channels of its weights."""

    def __init__(self, unit: nn.Module, narrow: tuple[nn.Module, ...], row: Path):
        """narrow: the same unit of each model, without weights (device meta). row: the only path of their pools."""
        super().__init__()
        self.unit, self.row, self.checkpointed = unit, row, False
        self._narrow = narrow  # a tuple, so that they are not submodules

    def forward(self, inputs: Tensor, path: Path) -> Tensor:
        """[B, C, H, W] or [B, N, D of the path] to what the unit returns at the path's width."""
        return recomputed(self._run, inputs, path) if self.checkpointed else self._run(inputs, path)

    def _run(self, inputs: Tensor, path: Path) -> Tensor:
        narrow = self._narrow[path.first_row]
        return functional_call(narrow, narrowed(self.unit, narrow), (inputs, self.row))


class NestedPool(LearngenePool):
    """Models of several widths nested in one ViT. A forward calls stem, blocks and head with a slice of each tensor."""

    def __init__(self, space: NestedSpace, whole: VisionTransformer):
        """whole: the ViT, whose tensors the pool takes; it cannot be used afterwards."""
        super().__init__(space.whole, [whole])
        (row,) = self.space.paths
        self.space = space
        with torch.device("meta"):
            narrow = [LearngenePool.empty(space.alone(w), (h,)) for w, h in zip(space.widths, space.heads, strict=True)]
        for name in self.ordered_modules:
            unit = NestedUnit(self.get_submodule(name), tuple(pool.get_submodule(name) for pool in narrow), row)
            self.set_submodule(name, unit)

    @classmethod
    def empty(cls, space: NestedSpace, heads: tuple[int, ...]) -> "NestedPool":
        """A pool with timm's random weights; heads: attention heads of each model."""
        return cls(space, row_vit(space, len(space.widths) - 1, heads))

    @property
    def skippable_modules(self) -> tuple[str, ...]:
        """Nothing: every model runs a part of every unit."""
        return ()

    def modules_of(self, path: Path) -> frozenset[str]:
        """Nothing, as `skippable_modules`."""
        return frozenset()

    def row_modules(self, row: int) -> tuple[str, ...]:
        """Nothing: models share all modules."""
        return ()

    def set_ops(self, ops: Ops) -> None:
        """Refused by `run.checks` but for `reference`: fused operations do not take slices."""

    def row_state(self, row: int) -> dict[str, Tensor]:
        """The state dict of one model, as a stock VisionTransformer loads it strictly."""
        alone = LearngenePool.empty(self.space.alone(self.space.widths[row]), (self.space.heads[row],))
        for name in self.ordered_modules:
            unit = alone.get_submodule(name)
            unit.load_state_dict(narrowed(self.get_submodule(name).unit, unit), strict=True)
        return alone.row_state(0)
