"""Models of several depths that grow from one stage-shared auxiliary net (SWS): which there are and what each costs.

The auxiliary net has stages of so many layers each; the layers of a stage share one set of weights, its learngene
layer. A model of any depth is made of whole learngene layers in the order of their stages. Pure Python.
"""

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property

from lgp_dist.config.run_config import RunConfig
from lgp_dist.errors import UserError
from lgp_dist.paths.stitched import (
    NORM_FLOPS,
    PathCost,
    Segment,
    block_flops,
    block_params,
    by_key,
    check_patches,
    chosen,
)


def layers_per_stage(stages: tuple[int, ...], depth: int) -> tuple[int, ...]:
    """How many of a model's layers come from each stage.

    Layers are dealt to the stages in turn, early ones first, and a stage that has as many as in the auxiliary net sits
    out until all have; then it begins again. So every stage has a layer where depth allows it, a depth more adds one
    layer, and the auxiliary net's own depth gives its own layers: 12 layers of (3, 3, 4, 3, 3) are (3, 3, 2, 2, 2).
    """
    whole, rest = divmod(depth, sum(stages))
    counts = [whole * layers for layers in stages]
    while rest:
        for stage, layers in enumerate(stages):
            if rest and counts[stage] < (whole + 1) * layers:
                counts[stage] += 1
                rest -= 1
    return tuple(counts)


def layer_sources(stages: tuple[int, ...], depth: int) -> tuple[int, ...]:
    """The learngene layer that each layer of a model is copied from: 0,0,0,1,1,1,2,2,3,3,4,4 for 12 of 3-3-4-3-3."""
    return tuple(stage for stage, count in enumerate(layers_per_stage(stages, depth)) for _ in range(count))


@dataclass(frozen=True, order=True)
class DepthPath:
    """One model of the pool: a row of its own depth, which no other shares weights with. To be used as a `Path` is."""

    row: int
    depth: int

    @property
    def key(self) -> str:
        """Printable name, unique in a pool: d12."""
        return f"d{self.depth}"

    @property
    def stitch(self) -> None:
        """It crosses no stitch layer."""
        return None

    @property
    def segments(self) -> tuple[Segment, ...]:
        """All blocks of its row."""
        return (Segment(self.row, 0, self.depth),)

    @property
    def first_row(self) -> int:
        """The row that embeds."""
        return self.row

    @property
    def last_row(self) -> int:
        """The row whose norm and head give the logits."""
        return self.row

    def has_block(self, row: int, block: int) -> bool:
        """Whether the path runs this block."""
        return row == self.row and block < self.depth


@dataclass(frozen=True)
class DepthSpace:
    """The models that grow from one auxiliary net: plain ViTs of one width without class token."""

    width: int
    """Of every block."""
    stages: tuple[int, ...]
    """Layers of the auxiliary net's stages."""
    depths: tuple[int, ...]
    """Blocks of each model, from few to many."""
    image_size: int = 224
    """Pixels."""
    patch_size: int = 16
    """Pixels."""
    channels: int = 3
    """Of an image."""
    num_classes: int = 1000
    """Of the head."""

    def __post_init__(self) -> None:
        if not self.stages or min(self.stages) < 1:
            raise UserError(f"model.stages is {list(self.stages)}, but every stage needs a layer: give 1 or more each.")
        if not self.depths or list(self.depths) != sorted(set(self.depths)) or self.depths[0] < len(self.stages):
            raise UserError(
                f"model.depths is {list(self.depths)}, but must rise from {len(self.stages)}, one layer for each of "
                "model.stages, or more: change one of them."
            )
        check_patches(self.image_size, self.patch_size)

    @classmethod
    def from_config(cls, config: RunConfig) -> "DepthSpace":
        """The models of a run; UserError where settings of the auxiliary net do not fit each other."""
        data, model = config.data, config.model
        if len(model.rows) != 1:
            raise UserError(
                f"model.stages shares layers within one auxiliary net, but model.rows has {len(model.rows)}: keep one "
                "row, or leave model.stages empty."
            )
        if model.depth != sum(model.stages):
            raise UserError(
                f"model.depth is {model.depth}, but model.stages {list(model.stages)} adds up to {sum(model.stages)} "
                "layers: change one of them."
            )
        if not model.final_norm:
            raise UserError("model.final_norm is off, which is for stitched paths: leave it on with model.stages.")
        row = model.rows[0]
        if row.levels != "none" or row.source in ("hub", "file", "tail"):
            raise UserError(
                f"model.rows.0 has levels {row.levels} and source {row.source}, but a net of model.stages learns from "
                "logits or labels: set levels none and source distil, labels or random."
            )
        return cls(
            row.width, model.stages, model.depths, data.image_size, model.patch_size, data.channels, data.num_classes
        )

    @property
    def widths(self) -> tuple[int, ...]:
        """Of each model."""
        return (self.width,) * len(self.depths)

    @property
    def class_token(self) -> bool:
        """There is none: the mean of all tokens goes through the last norm to the head."""
        return False

    @property
    def final_norm(self) -> bool:
        """No model is without."""
        return True

    def has_norm(self, path: DepthPath) -> bool:
        """Whether the path applies the final norm."""
        return self.final_norm

    @property
    def stitch_widths(self) -> tuple[tuple[int, int], ...]:
        """No model carries tokens into another."""
        return ()

    @property
    def stitches_per_pair(self) -> int:
        """Stitch layers between two models."""
        return 0

    @cached_property
    def paths(self) -> tuple[DepthPath, ...]:
        """One for each depth."""
        return tuple(DepthPath(row, depth) for row, depth in enumerate(self.depths))

    def by_key(self, key: str) -> DepthPath:
        """The path of that key; UserError where there is none."""
        return by_key(self.paths, key)

    def chosen(self, keys: Collection[str]) -> tuple[DepthPath, ...]:
        """The paths of these keys from few blocks to many, all where there are none; UserError where one is missing."""
        return chosen(self.paths, keys)

    @property
    def tokens(self) -> int:
        """Patches."""
        return (self.image_size // self.patch_size) ** 2

    def _params(self, blocks: int) -> int:
        width = self.width
        around = (self.channels * self.patch_size**2 + 1 + self.tokens + 2) * width + (width + 1) * self.num_classes
        return around + blocks * block_params(width)

    def cost(self, path: DepthPath) -> PathCost:
        """Parameters and FLOPs of one model."""
        params, width = self._params(path.depth), self.width
        flops = self.tokens * self.channels * self.patch_size**2 * width
        flops += path.depth * block_flops(width, self.tokens)
        return PathCost(params, params, flops + NORM_FLOPS * width + width * self.num_classes)

    @property
    def stored_params(self) -> int:
        """What is stored to make models of all depths: one layer of each stage, and what stands around them."""
        return self._params(len(self.stages))

    def describe(self, path: DepthPath) -> dict[str, str | int | None]:
        """The fields of paths.json that need no training."""
        cost = self.cost(path)
        return {
            "key": path.key,
            "low": path.depth,
            "high": 0,
            "low_row": 0,
            "high_row": None,
            "stitch": None,
            "params": cost.params,
            "params_paper": cost.params_paper,
            "flops": cost.flops,
        }
