"""Paths of a pool of rows and stitch layers.

For two adjacent rows of depth L, a window slides over block indices (i, i + 1). Every ordered pair (j, k) in the window
that no earlier window had is a path: it leaves the narrow row after block j and enters the wide row at block k. Pairs
that are new in one window share one stitch layer (unless `stitch_sharing` is path). Each row alone is a path too. Where
the wide row has r times as many blocks, k counts groups of r blocks.

A two-way pool (SN-Net v2, arXiv 2307.00154) has two rows and a stitch layer for each position and direction: at
position i from block i of the narrow row to group i + 1 of the wide one, and from the last block of group i to block
i + 1 of the narrow row. Its paths use one of them, or one of each direction at rising positions.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from lgp_dist.config.ranges import check_value
from lgp_dist.config.run_config import RunConfig, StitchSharing
from lgp_dist.errors import UserError
from lgp_dist.paths.path import Path, PathFields, Segment, Space


@dataclass(frozen=True)
class PathSpace(Space):
    """All paths of a pool of rows."""

    widths: tuple[int, ...]
    """Embedding width of each row, narrow to wide."""
    depth: int
    """Blocks of every row, but where `row_depths` says otherwise."""
    image_size: int = 224
    patch_size: int = 16
    channels: int = 3
    num_classes: int = 1000
    final_norm: bool = True
    """Whether stitched paths apply the final norm of their last row; rows alone always do."""
    stitch_sharing: StitchSharing = "window"
    """Whether the paths of a window share a stitch layer, or each path has its own."""
    row_depths: tuple[int, ...] = ()
    """Blocks of each row, if they are not equal."""
    two_way: bool = False
    """Whether stitch layers lead in both directions."""

    class_token = True

    def __post_init__(self) -> None:
        check_value("model.depth", self.depth)
        if not self.widths or list(self.widths) != sorted(set(self.widths)):
            raise UserError(
                f"model.rows has widths {list(self.widths)}, but rows go from narrow to wide, each wider than the one "
                "before: reorder or change them."
            )
        for row, depth in enumerate(self.depths):
            if depth < 2:
                raise UserError(f"model.rows.{row}.depth is {depth}, but a row has 2 blocks or more: change it.")
            before = self.depths[max(0, row - 1)]
            if depth % before:
                raise UserError(
                    f"model.rows.{row} has {depth} blocks, but must have a multiple of the {before} of row {row - 1}: "
                    f"set model.rows.{row}.depth to {-(-depth // before) * before}, or change that row's."
                )
        if self.two_way and len(self.widths) != 2:
            raise UserError(f"model.two_way joins two rows, but model.rows has {len(self.widths)}: turn it off.")
        if self.two_way and self.stitch_sharing == "path":
            raise UserError("model.two_way has a stitch layer for each position: set model.stitch_sharing to window.")
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
        depths = tuple(row.depth or model.depth for row in model.rows)
        image = (data.image_size, model.patch_size, data.channels, data.num_classes)
        own = () if set(depths) == {model.depth} else depths
        return cls(widths, model.depth, *image, model.final_norm, model.stitch_sharing, own, model.two_way)

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """Blocks of each row."""
        return self.row_depths or (self.depth,) * len(self.widths)

    def _stitches_of(self, low: int) -> int:
        """Stitch layers between a row and the next: one for each window, or for each of the pairs (j, k)."""
        depth = self.depths[low]
        return depth - 1 if self.stitch_sharing == "window" else 3 * depth - 2

    @cached_property
    def stitch_widths(self) -> tuple[tuple[int, int], ...]:
        """(source, target) width of every stitch layer, in order: of a two-way pool, first those to the wide row."""
        pairs = list(enumerate(zip(self.widths, self.widths[1:], strict=False)))
        upward = tuple(pair for low, pair in pairs for _ in range(self._stitches_of(low)))
        return upward + tuple((target, source) for source, target in upward) if self.two_way else upward

    @cached_property
    def unit_order(self) -> tuple[tuple[int, int] | int, ...]:
        """Row by row, with the stitch layers between them; of a two-way pool, position by position."""
        found: list[tuple[int, int] | int] = []
        if self.two_way:
            narrow, wide = self.depths
            group = wide // narrow
            for position in range(narrow):
                found += [(0, position), *((1, position * group + block) for block in range(group))]
                found += [position, narrow - 1 + position] if position + 1 < narrow else []
            return tuple(found)
        first = 0
        for row, depth in enumerate(self.depths):
            found += [(row, block) for block in range(depth)]
            if row + 1 < len(self.depths):
                found += range(first, first := first + self._stitches_of(row))
        return tuple(found)

    @cached_property
    def paths(self) -> tuple[Path, ...]:
        """Rows alone first, then the stitched paths: of each pair in the order of its windows; of a two-way pool those
        to the wide row, those to the narrow one, those back to the wide row and those back to the narrow one.

        This is the order of SN-Net and SN-Net v2.
        """
        rows = [Path((Segment(row, 0, depth),)) for row, depth in enumerate(self.depths)]
        return (*rows, *(self._two_way_paths() if self.two_way else self._window_paths()))

    def _window_paths(self) -> Iterator[Path]:
        first = 0
        for low, (depth, high) in enumerate(zip(self.depths, self.depths[1:], strict=False)):
            seen: set[tuple[int, int]] = set()
            for window in range(depth - 1):
                for j in (window, window + 1):
                    for k in (window, window + 1):
                        if (j, k) not in seen:
                            seen.add((j, k))
                            ends = (Segment(low, 0, j + 1), Segment(low + 1, k * (high // depth), high))
                            layer = window if self.stitch_sharing == "window" else len(seen) - 1
                            yield Path(ends, (first + layer,))
            first += self._stitches_of(low)

    def _two_way_paths(self) -> Iterator[Path]:
        positions, group = range(self.depths[0] - 1), self.depths[1] // self.depths[0]

        def part(row: int, start: int, stop: int) -> Segment:
            size = group if row else 1
            return Segment(row, start * size, stop * size)

        for row in (0, 1):
            for i in positions:
                yield Path((part(row, 0, i + 1), part(1 - row, i + 1, len(positions) + 1)), (row * len(positions) + i,))
        for row in (1, 0):
            for i in positions:
                for j in positions[i + 1 :]:
                    ends = (part(row, 0, i + 1), part(1 - row, i + 1, j + 1), part(row, j + 1, len(positions) + 1))
                    yield Path(ends, (row * len(positions) + i, (1 - row) * len(positions) + j))

    @cached_property
    def stored_params(self) -> int:
        """All rows and all stitch layers, without low-rank updates, which are merged into these."""
        rows = sum(self.cost(path).params for path in self.paths if path.is_row)
        return rows + sum((source + 1) * target for source, target in self.stitch_widths)

    def _rows_of(self, path: Path) -> tuple[int, int, int | None, int | None]:
        if not path.is_row:
            low, high = sorted({part.row for part in path.segments})
            blocks = [sum(part.stop - part.start for part in path.segments if part.row == row) for row in (low, high)]
            return blocks[0], blocks[1], low, high
        (row,) = (part.row for part in path.segments)
        if row == len(self.widths) - 1:
            return 0, path.blocks, None, row
        return path.blocks, 0, row, None

    def describe(self, path: Path) -> PathFields:
        """The fields of paths.json that need no training."""
        place = self.paths.index(path)
        # SN-Net v2 counts one more path to the wide row, which it never draws.
        return {**super().describe(path), "cfg_id": place + (self.two_way and place > self.depths[0])}
