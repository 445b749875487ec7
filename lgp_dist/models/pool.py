"""The learngene pool: rows of instances, joined by stitch layers.

A forward calls all units in one order, whatever the path: stem, blocks and stitch layers (`Space.unit_order`), head. A
unit that is not on the path returns its tokens unchanged. So ranks on different paths run the same sequence of modules,
which ZeRO-3 and DistributedDataParallel need. The path is an argument; the pool never draws one and keeps none.
"""

from collections.abc import Callable
from functools import partial
from itertools import takewhile

import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lgp_dist.config.run_config import Ops
from lgp_dist.models.fused import fused_block, stitch
from lgp_dist.models.stitch import StitchLayer
from lgp_dist.models.vit import build_vit, classify, embed, split_vit
from lgp_dist.ops.dispatch import resolved
from lgp_dist.paths.path import Path, Space

Tokens = Tensor | tuple[Tensor, ...]
"""[B, N, D]; after a fused stitch a tuple with what `fused.stitch` returns next to them, until a block takes it."""


def recomputed(function: Callable[..., Tokens], *arguments: Tensor | nn.Module) -> Tokens:
    """The function's result, whose activations are computed again in backward."""
    return checkpoint(function, *arguments, use_reentrant=False) if torch.is_grad_enabled() else function(*arguments)


class StemUnit(nn.Module):
    """Patch, class and position embeddings of all rows; those of the path's first row are used."""

    def __init__(self, stems: list[VisionTransformer]):
        super().__init__()
        self.rows, self.checkpointed = nn.ModuleList(stems), False

    def forward(self, images: Tensor, path: Path) -> Tensor:
        """[B, C, H, W] to [B, N, D of the first row]."""
        row = self.rows[path.first_row]
        return recomputed(embed, row, images) if self.checkpointed else embed(row, images)


class BlockUnit(nn.Module):
    """One instance."""

    def __init__(self, row: int, index: int, block: Block):
        super().__init__()
        self.row, self.index, self.block, self.checkpointed = row, index, block, False

    def runs(self, path: Path) -> bool:
        """Whether the path has this block."""
        return path.has_block(self.row, self.index)

    def forward(self, tokens: Tensor, path: Path, *rows: Tensor) -> Tokens:
        """[B, N, D] to the same shape; unchanged if the path does not run this block."""
        if not self.runs(path):
            return (tokens, *rows) if rows else tokens
        return recomputed(self.block, tokens, *rows) if self.checkpointed else self.block(tokens, *rows)


class StitchUnit(nn.Module):
    """One stitch layer."""

    def __init__(self, index: int, layer: StitchLayer):
        super().__init__()
        self.index, self.layer, self.checkpointed = index, layer, False
        self.fused: Callable[[Tensor], Tokens] | None = None

    def runs(self, path: Path) -> bool:
        """Whether the path uses this layer."""
        return self.index in path.stitches

    def forward(self, tokens: Tensor, path: Path, *rows: Tensor) -> Tokens:
        """[B, N, D of one row] to [B, N, D of the next]; unchanged if the path does not use this layer."""
        if not self.runs(path):
            return (tokens, *rows) if rows else tokens
        function = self.fused or self.layer
        return recomputed(function, tokens) if self.checkpointed else function(tokens)


class HeadUnit(nn.Module):
    """Final norms and classifiers of all rows; those of the path's last row are used."""

    def __init__(self, space: Space, heads: list[VisionTransformer]):
        super().__init__()
        self.space, self.rows = space, nn.ModuleList(heads)

    def forward(self, tokens: Tensor, path: Path) -> Tensor:
        """[B, N, D of the last row] to [B, classes]."""
        return classify(self.rows[path.last_row], tokens, self.space.has_norm(path))


class LearngenePool(nn.Module):
    """Rows, stitch layers and the order in which a forward calls them."""

    def __init__(self, space: Space, rows: list[VisionTransformer], stitch_rank: int = 0):
        """rows: timm ViTs from narrow to wide; the pool takes their tensors, and they cannot be used afterwards.

        stitch_rank: of `StitchLayer`.
        """
        super().__init__()
        self.space = space
        self.stem, self.units = StemUnit([]), nn.ModuleDict()
        stems, blocks, heads = zip(*map(split_vit, rows), strict=True)
        self.stem.rows.extend(stems)
        for unit in space.unit_order:
            if isinstance(unit, int):
                self.units[f"stitch{unit}"] = StitchUnit(unit, StitchLayer(*space.stitch_widths[unit], stitch_rank))
            else:
                row, index = unit
                self.units[f"row{row}_block{index}"] = BlockUnit(row, index, blocks[row][index])
        self.head = HeadUnit(space, list(heads))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether every unit but the head recomputes its activations in backward, under timm's name."""
        for unit in (self.stem, *self.units.values()):
            unit.checkpointed = enable

    def set_ops(self, ops: Ops) -> None:
        """Chooses how stitch layers and blocks are computed; a new pool has `reference`, timm's own forwards."""
        ops = resolved(ops, next(self.parameters()).device)
        for unit in self.units.values():
            if isinstance(unit, StitchUnit):
                eps = self.units["row0_block0"].block.norm1.eps
                unit.fused = None if ops == "reference" else partial(stitch, unit.layer, eps=eps, ops=ops)
            elif ops == "reference":
                vars(unit.block).pop("forward", None)
            else:
                unit.block.forward = partial(fused_block, unit.block, ops)

    @property
    def ordered_modules(self) -> tuple[str, ...]:
        """Names of the units, in the order in which every forward calls each of them once, whatever the path."""
        return ("stem", *(f"units.{name}" for name in self.units), "head")

    @property
    def skippable_modules(self) -> tuple[str, ...]:
        """Names of the submodules that a path runs as a whole or skips, in the order of the units."""
        rows, ends = range(len(self.space.widths)), ("",) if self.space.final_norm else (".norm", ".head")
        stems, heads = (f"stem.rows.{row}" for row in rows), (f"head.rows.{row}{end}" for row in rows for end in ends)
        return (*stems, *(f"units.{name}" for name in self.units), *heads)

    def modules_of(self, path: Path) -> frozenset[str]:
        """Those of `skippable_modules` that a path runs."""
        head = f"head.rows.{path.last_row}"
        runs = {
            f"stem.rows.{path.first_row}",
            *(f"units.{name}" for name, unit in self.units.items() if unit.runs(path)),
        }
        if self.space.final_norm:
            return frozenset(runs | {head})
        return frozenset(runs | {f"{head}.head"} | ({f"{head}.norm"} if self.space.has_norm(path) else set()))

    @property
    def fixed_weights(self) -> frozenset[str]:
        """Names of the parameters that training leaves as they are: weights of stitch layers with a rank."""
        layers = {name: unit.layer for name, unit in self.units.items() if isinstance(unit, StitchUnit)}
        return frozenset(f"units.{name}.layer.weight" for name, layer in layers.items() if layer.rank)

    def row_modules(self, row: int) -> tuple[str, ...]:
        """Those of `skippable_modules` that belong to one row; a stitch layer belongs to no row."""
        starts = (f"stem.rows.{row}", f"units.row{row}_", f"head.rows.{row}")
        return tuple(name for name in self.skippable_modules if name in starts or name.startswith(starts[1]))

    @classmethod
    def empty(cls, space: Space, heads: tuple[int, ...], stitch_rank: int = 0) -> "LearngenePool":
        """A pool with timm's random weights; heads: attention heads of each row. stitch_rank: of `StitchLayer`."""
        return cls(space, [row_vit(space, row, heads) for row in range(len(space.widths))], stitch_rank)

    def stitch(self, index: int) -> StitchLayer:
        """One of the stitch layers, by its index."""
        return self.units[f"stitch{index}"].layer

    def forward(self, images: Tensor, path: Path | str, features: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """[B, C, H, W] images along a path, or the one of a key, to [B, classes] logits.

        features: also return the tokens before the final norm, [B, N, D of the path's last row].
        """
        path = self.space.by_key(path) if isinstance(path, str) else path
        tokens, *rows = (self.stem(images, path),)
        for unit in self.units.values():
            out = unit(tokens, path, *rows)
            tokens, *rows = out if isinstance(out, tuple) else (out,)
        logits = self.head(tokens, path)
        return (logits, tokens) if features else logits

    def row_state(self, row: int) -> dict[str, Tensor]:
        """The state dict of one row, as a stock VisionTransformer loads it strictly."""
        state = dict(self.stem.rows[row].state_dict())
        for index in range(self.space.depths[row]):
            block = self.units[f"row{row}_block{index}"].block.state_dict()
            state.update({f"blocks.{index}.{name}": value for name, value in block.items()})
        return state | self.head.rows[row].state_dict()


class SharedForwards:
    """Forwards along several paths of the same images, one after the other, on a pool in eval mode without gradients.

    What a path has in common with the one before it is computed once: call them in the order of `route`.
    """

    def __init__(self, pool: LearngenePool):
        self.pool, self._images = pool, torch.empty(0)
        self._kept: list[tuple[int, Tensor]] = []
        """The route of the latest path, with what stem and units returned."""

    def route(self, path: Path) -> tuple[int, ...]:
        """The first row of a path and the numbers of the units that it runs."""
        return (path.first_row, *(number for number, unit in enumerate(self.pool.units.values()) if unit.runs(path)))

    def __call__(self, images: Tensor, path: Path) -> Tensor:
        """[B, C, H, W] images along a path to [B, classes] logits."""
        route, units = self.route(path), [*self.pool.units.values()]
        same = takewhile(lambda pair: pair[0] == pair[1][0], zip(route, self._kept, strict=False))
        common = len([*same]) if images is self._images else 0
        self._images, self._kept = images, self._kept[:common]
        for number in route[common:]:
            tokens = units[number](self._kept[-1][1], path) if self._kept else self.pool.stem(images, path)
            self._kept.append((number, tokens))
        return self.pool.head(self._kept[-1][1], path)


def row_vit(space: Space, row: int, heads: tuple[int, ...], drop_path: float = 0.0) -> VisionTransformer:
    """A timm ViT of one row's shape."""
    return space_vit(space, space.widths[row], space.depths[row], heads[row], drop_path)


def space_vit(space: Space, width: int, depth: int, heads: int, drop_path: float) -> VisionTransformer:
    """A timm ViT for a space's input and classes."""
    return build_vit(
        image_size=space.image_size,
        patch_size=space.patch_size,
        channels=space.channels,
        num_classes=space.num_classes,
        width=width,
        depth=depth,
        heads=heads,
        drop_path=drop_path,
        class_token=space.class_token,
    )
