"""Paths of a pool of rows and stitch layers.

For two adjacent rows of depth L, a window slides over block indices (i, i + 1). Every ordered pair (j, k) in the window
that no earlier window had is a path: it leaves the narrow row after block j and enters the wide row at block k. Pairs
that are new in one window share one stitch layer (unless `stitch_sharing` is path). Each row alone is a path too.
"""

from dataclasses import dataclass
from functools import cached_property

from lgp_dist.config.ranges import check_value
from lgp_dist.config.run_config import RunConfig, StitchSharing
from lgp_dist.errors import UserError
from lgp_dist.paths.path import Path, PathFields, Segment, Space


@dataclass(frozen=True)
class PathSpace(Space):
    """All paths of a pool of rows of equal depth."""

    widths: tuple[int, ...]
    """Embedding width of each row, narrow to wide."""
    depth: int
    """Blocks of every row."""
    image_size: int = 224
    patch_size: int = 16
    channels: int = 3
    num_classes: int = 1000
    final_norm: bool = True
    """Whether stitched paths apply the final norm of their last row; rows alone always do."""
    stitch_sharing: StitchSharing = "window"
    """Whether the paths of a window share a stitch layer, or each path has its own."""

    class_token = True

    def __post_init__(self) -> None:
        check_value("model.depth", self.depth)
        if not self.widths or list(self.widths) != sorted(set(self.widths)):
            raise UserError(
                f"model.rows has widths {list(self.widths)}, but rows go from narrow to wide, each wider than the one "
                "before: reorder or change them."
            )
        self._check_patches()

    @classmethod
    def from_config(cls, config: RunConfig) -> "PathSpace":
        """The paths of a run; UserError if its model does not have rows and stitch layers."""
        data, model = config.data, config.model
        if model.stages or model.widths:
            raise UserError(
                f"Recipe {config.recipe} has model.{'stages' if model.stages else 'widths'}, so its models have no "
                "stitch layers, which this needs: choose a recipe of a pool, such as tiny."
            )
        if model.depths:
            raise UserError("model.depths is set, but model.stages is empty: set both, or neither.")
        widths = tuple(row.width for row in model.rows)
        image = (data.image_size, model.patch_size, data.channels, data.num_classes)
        return cls(widths, model.depth, *image, model.final_norm, model.stitch_sharing)

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """Blocks of each row."""
        return (self.depth,) * len(self.widths)

    @cached_property
    def stitches_per_pair(self) -> int:
        """Stitch layers between two adjacent rows: one for each window, or for each of the pairs (j, k)."""
        return self.depth - 1 if self.stitch_sharing == "window" else 3 * self.depth - 2

    @cached_property
    def stitch_widths(self) -> tuple[tuple[int, int], ...]:
        """(narrow, wide) width of every stitch layer, in order."""
        pairs = zip(self.widths, self.widths[1:], strict=False)
        return tuple(pair for pair in pairs for _ in range(self.stitches_per_pair))

    @cached_property
    def paths(self) -> tuple[Path, ...]:
        """Rows alone first, then the stitched paths of each pair in the order of their windows.

        This is SN-Net's order: a path's place is its `cfg_id`.
        """
        found = [Path((Segment(row, 0, self.depth),)) for row in range(len(self.widths))]
        for low in range(len(self.widths) - 1):
            seen: set[tuple[int, int]] = set()
            for window in range(self.depth - 1):
                for j in (window, window + 1):
                    for k in (window, window + 1):
                        if (j, k) not in seen:
                            seen.add((j, k))
                            ends = (Segment(low, 0, j + 1), Segment(low + 1, k, self.depth))
                            layer = window if self.stitch_sharing == "window" else len(seen) - 1
                            found.append(Path(ends, low * self.stitches_per_pair + layer))
        return tuple(found)

    @cached_property
    def stored_params(self) -> int:
        """All rows and all stitch layers."""
        rows = sum(self.cost(path).params for path in self.paths if path.stitch is None)
        return rows + sum((narrow + 1) * wide for narrow, wide in self.stitch_widths)

    def _rows_of(self, path: Path) -> tuple[int, int, int | None, int | None]:
        low, high = path.segments[0], path.segments[-1]
        if path.stitch is not None:
            return low.stop - low.start, high.stop - high.start, low.row, high.row
        if low.row == len(self.widths) - 1:
            return 0, path.blocks, None, low.row
        return path.blocks, 0, low.row, None

    def describe(self, path: Path) -> PathFields:
        """The fields of paths.json that need no training."""
        return {**super().describe(path), "cfg_id": self.paths.index(path)}
