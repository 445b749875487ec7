"""Models of several depths from one auxiliary net with stage-wise weight sharing (SWS, arXiv 2404.16897).

The auxiliary net has stages of several layers; the layers of a stage share one set of weights, its learngene layer. A
model of any depth is made of copies of whole learngene layers in the order of their stages. Models share no weights.
"""

from dataclasses import dataclass
from functools import cached_property

from lgp_dist.config.run_config import RunConfig
from lgp_dist.errors import UserError
from lgp_dist.paths.path import Path, PlainSpace, Segment


def layers_per_stage(stages: tuple[int, ...], depth: int) -> tuple[int, ...]:
    """How many of a model's layers come from each stage: 12 layers of (3, 3, 4, 3, 3) are (3, 3, 2, 2, 2)."""
    # Layers are given to the stages in turn, early stages first. A stage that has as many as in the auxiliary net waits
    # until all have; then it starts again. So every stage has a layer if the depth allows it, one more layer of depth
    # changes one stage, and the auxiliary net's own depth gives its own layers.
    whole, rest = divmod(depth, sum(stages))
    counts = [whole * layers for layers in stages]
    while rest:
        for stage, layers in enumerate(stages):
            if rest and counts[stage] < (whole + 1) * layers:
                counts[stage] += 1
                rest -= 1
    return tuple(counts)


def layer_sources(stages: tuple[int, ...], depth: int) -> tuple[int, ...]:
    """The learngene layer that each layer of a model copies: 0,0,0,1,1,1,2,2,3,3,4,4 for 12 layers of 3-3-4-3-3."""
    return tuple(stage for stage, count in enumerate(layers_per_stage(stages, depth)) for _ in range(count))


@dataclass(frozen=True)
class DepthSpace(PlainSpace):
    """The models of one auxiliary net: plain ViTs of one width without class token, each a row of its own."""

    width: int
    """Of every block."""
    stages: tuple[int, ...]
    """Layers of the auxiliary net's stages."""
    depths: tuple[int, ...]
    """Blocks of each model, in increasing order."""
    image_size: int = 224
    patch_size: int = 16
    channels: int = 3
    num_classes: int = 1000

    class_token = False

    def __post_init__(self) -> None:
        if not self.stages or min(self.stages) < 1:
            raise UserError(f"model.stages is {list(self.stages)}, but every stage needs a layer: give 1 or more each.")
        if not self.depths or list(self.depths) != sorted(set(self.depths)) or self.depths[0] < len(self.stages):
            raise UserError(
                f"model.depths is {list(self.depths)}, but must rise from {len(self.stages)}, one layer for each of "
                "model.stages, or more: change one of them."
            )
        self._check_patches()

    @classmethod
    def from_config(cls, config: RunConfig) -> "DepthSpace":
        """The models of a run; UserError if settings of the auxiliary net contradict each other."""
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
        image = (data.image_size, model.patch_size, data.channels, data.num_classes)
        return cls(row.width, model.stages, model.depths, *image)

    @cached_property
    def widths(self) -> tuple[int, ...]:
        """Of each model."""
        return (self.width,) * len(self.depths)

    @cached_property
    def paths(self) -> tuple[Path, ...]:
        """One for each depth, with keys such as d12."""
        return tuple(Path((Segment(row, 0, depth),), name=f"d{depth}") for row, depth in enumerate(self.depths))

    @cached_property
    def auxiliary(self) -> Path:
        """The auxiliary net, which is not one of `paths`."""
        return Path((Segment(0, 0, sum(self.stages)),))

    @cached_property
    def stored_params(self) -> int:
        """One layer of each stage, with embeddings, norm and head: they make models of all depths."""
        return self.cost(Path((Segment(0, 0, len(self.stages)),))).params
