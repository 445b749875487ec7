"""Models of several widths nested in one ViT (MatFormer, arXiv 2310.07707; Scala, arXiv 2412.04786).

A narrower model is the first channels, attention heads and hidden units of the whole one, in all blocks.
"""

from dataclasses import dataclass
from functools import cached_property

from lgp_dist.config.run_config import RunConfig
from lgp_dist.errors import UserError
from lgp_dist.paths.path import Path, PlainSpace, Segment
from lgp_dist.paths.stitched import PathSpace


@dataclass(frozen=True)
class NestedSpace(PlainSpace):
    """The models of one ViT: plain ViTs of one depth and one width of attention heads, which share their weights."""

    widths: tuple[int, ...]
    """Of the models, narrow to wide; the last is the whole ViT."""
    depth: int
    """Blocks of every model."""
    head_width: int
    """Channels of an attention head."""
    image_size: int = 224
    patch_size: int = 16
    channels: int = 3
    num_classes: int = 1000

    class_token = True

    def __post_init__(self) -> None:
        if list(self.widths) != sorted(set(self.widths)) or any(width % self.head_width for width in self.widths):
            raise UserError(
                f"model.widths is {list(self.widths)}, but must rise, in multiples of the row's head width "
                f"{self.head_width}: change model.widths or model.rows.0.heads."
            )
        self._check_patches()

    @classmethod
    def from_config(cls, config: RunConfig) -> "NestedSpace":
        """The models of a run; UserError if settings contradict each other."""
        data, model = config.data, config.model
        if model.stages or model.depths or not model.final_norm or len(model.rows) != 1:
            raise UserError(
                "model.widths makes models of one ViT: keep one of model.rows, leave model.stages and model.depths "
                "empty, and model.final_norm on."
            )
        row = model.rows[0]
        if model.widths[-1] != row.width:
            raise UserError(
                f"model.widths ends with {model.widths[-1]}, but model.rows.0.width is {row.width}, which is the whole "
                "model's: make them equal."
            )
        image = (data.image_size, model.patch_size, data.channels, data.num_classes)
        return cls(model.widths, model.depth, row.width // row.heads, *image)

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """Blocks of each model."""
        return (self.depth,) * len(self.widths)

    @cached_property
    def paths(self) -> tuple[Path, ...]:
        """One for each width, with keys such as w384."""
        return tuple(Path((Segment(i, 0, self.depth),), name=f"w{width}") for i, width in enumerate(self.widths))

    @property
    def heads(self) -> tuple[int, ...]:
        """Attention heads of each model."""
        return tuple(width // self.head_width for width in self.widths)

    @property
    def whole(self) -> PathSpace:
        """The pool whose only row is the whole ViT."""
        return self.alone(self.widths[-1])

    def alone(self, width: int) -> PathSpace:
        """The pool of one row that has this width."""
        return PathSpace((width,), self.depth, self.image_size, self.patch_size, self.channels, self.num_classes)

    @cached_property
    def stored_params(self) -> int:
        """Those of the whole ViT."""
        return self.cost(self.paths[-1]).params
