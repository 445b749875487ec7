"""Which paths a pool has and what each costs, by arithmetic. Pure Python: known before any tensor exists.

The rule (METHOD, section 3): for two adjacent rows of depth L slide a window over block indices (i, i + 1). Every
ordered pair (j, k) in the window that no earlier window had is a path "leave the low row after block j, enter the high
row at block k"; the pairs that are new in one window share one stitch layer. Each row on its own is a path too.
"""

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, TypeVar

from lgp_dist.config.ranges import check_value
from lgp_dist.config.run_config import RunConfig, StitchSharing
from lgp_dist.errors import UserError, nearest

MLP_RATIO = 4
NORM_FLOPS = 5
"""Operations that one LayerNorm element counts as."""


def block_params(width: int) -> int:
    """Parameters of one block."""
    weights = (4 + 2 * MLP_RATIO) * width * width
    biases_and_norms = (3 + 1 + MLP_RATIO + 1 + 4) * width
    return weights + biases_and_norms


def block_flops(width: int, tokens: int) -> int:
    """FLOPs of one block on so many tokens."""
    linear = tokens * (4 + 2 * MLP_RATIO) * width * width
    attention = 2 * tokens * tokens * width
    return linear + attention + 2 * NORM_FLOPS * tokens * width


def check_patches(image_size: int, patch_size: int) -> None:
    """UserError where patches do not cover the image."""
    if image_size % patch_size:
        raise UserError(f"data.image_size {image_size} is no multiple of model.patch_size {patch_size}: change one.")


class Keyed(Protocol):
    """A path of any kind."""

    @property
    def key(self) -> str:
        """Printable name, unique among its kind."""
        ...


Kind = TypeVar("Kind", bound=Keyed)


def by_key(paths: Collection[Kind], key: str) -> Kind:
    """The path of that key; UserError where there is none."""
    known = {path.key: path for path in paths}
    if key not in known:
        advice = nearest(key, known, f"the first is {next(iter(known))}")
        raise UserError(f"The pool has no path {key!r}: {advice}; `lgp paths` lists its {len(known)} keys.")
    return known[key]


def chosen(paths: Collection[Kind], keys: Collection[str]) -> tuple[Kind, ...]:
    """The paths of these keys in their own order, all where there are none; UserError where one is missing."""
    wanted = {by_key(paths, key) for key in keys}
    return tuple(path for path in paths if path in wanted or not wanted)


@dataclass(frozen=True, order=True)
class Segment:
    """Blocks start .. stop - 1 of one row."""

    row: int
    start: int
    stop: int


@dataclass(frozen=True, order=True)
class Path:
    """Which instances run: segments from narrow to wide, joined by stitch layers.

    Its key is the same string in logs, tables, folders and exports: `r0.0-3+r1.4-5` leaves row 0 after block 3
    and enters row 1 at block 4; `r0.0-5` is row 0 alone.
    """

    segments: tuple[Segment, ...]
    stitch: int | None = None
    """Index of the stitch layer, counted over all pairs of rows; None for a row alone."""

    @property
    def key(self) -> str:
        """Printable name, unique in a pool."""
        return "+".join(f"r{part.row}.{part.start}-{part.stop - 1}" for part in self.segments)

    @property
    def first_row(self) -> int:
        """The row that embeds."""
        return self.segments[0].row

    @property
    def last_row(self) -> int:
        """The row whose norm and head give the logits."""
        return self.segments[-1].row

    def has_block(self, row: int, block: int) -> bool:
        """Whether the path runs this block."""
        return any(part.row == row and part.start <= block < part.stop for part in self.segments)


@dataclass(frozen=True)
class PathCost:
    """What a path weighs and computes."""

    params: int
    """Every tensor that the descendant holds."""
    params_paper: int
    """Without class and position embedding on stitched paths, as the published tables count."""
    flops: int
    """Multiply-adds of convolutions, linear layers and attention products of an image, plus 5 per LayerNorm element."""


@dataclass(frozen=True)
class PathSpace:
    """All paths of a pool of rows of equal depth."""

    widths: tuple[int, ...]
    """Embedding width of each row, narrow to wide."""
    depth: int
    """Blocks of every row."""
    image_size: int = 224
    """Pixels."""
    patch_size: int = 16
    """Pixels."""
    channels: int = 3
    """Of an image."""
    num_classes: int = 1000
    """Of the head."""
    final_norm: bool = True
    """Whether stitched paths apply the final norm of their last row, as rows alone always do."""
    stitch_sharing: StitchSharing = "window"
    """Whether the paths of a window share a stitch layer, or each path has its own."""

    def __post_init__(self) -> None:
        check_value("model.depth", self.depth)
        if not self.widths or list(self.widths) != sorted(set(self.widths)):
            raise UserError(
                f"model.rows has widths {list(self.widths)}, but rows go from narrow to wide, each wider than the one "
                "before: reorder or change them."
            )
        check_patches(self.image_size, self.patch_size)

    @classmethod
    def from_config(cls, config: RunConfig) -> "PathSpace":
        """The path space of a run; UserError where its model is none of rows and stitch layers."""
        data, model = config.data, config.model
        if model.stages:
            raise UserError(
                f"Recipe {config.recipe} has model.stages, so its models share no rows and stitch layers, which this "
                "needs: choose a recipe of a pool, such as tiny."
            )
        if model.depths:
            raise UserError("model.depths is set, but model.stages is empty: set both, or neither.")
        widths = tuple(row.width for row in model.rows)
        image = (data.image_size, model.patch_size, data.channels, data.num_classes)
        return cls(widths, model.depth, *image, model.final_norm, model.stitch_sharing)

    @property
    def depths(self) -> tuple[int, ...]:
        """Blocks of each row."""
        return (self.depth,) * len(self.widths)

    @property
    def class_token(self) -> bool:
        """Rows have one, which goes through the last norm to the head."""
        return True

    @property
    def stitches_per_pair(self) -> int:
        """Stitch layers between two adjacent rows: one for each window, or for each of the pairs (j, k)."""
        return self.depth - 1 if self.stitch_sharing == "window" else 3 * self.depth - 2

    @property
    def stitch_widths(self) -> tuple[tuple[int, int], ...]:
        """(narrow, wide) width of every stitch layer, in order."""
        pairs = zip(self.widths, self.widths[1:], strict=False)
        return tuple(pair for pair in pairs for _ in range(self.stitches_per_pair))

    @cached_property
    def paths(self) -> tuple[Path, ...]:
        """Rows alone first, then the stitched paths of each pair in the order of their windows: SN-Net's order, where
        the place is a path's `cfg_id`."""
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

    def by_key(self, key: str) -> Path:
        """The path of that key; UserError where the pool has none."""
        return by_key(self.paths, key)

    def chosen(self, keys: Collection[str]) -> tuple[Path, ...]:
        """The paths of these keys in the pool's order, all where there are none; UserError where the pool lacks one."""
        return chosen(self.paths, keys)

    def has_norm(self, path: Path) -> bool:
        """Whether the path applies its last row's final norm; it holds the norm's parameters in any case."""
        return self.final_norm or path.stitch is None

    @property
    def tokens(self) -> int:
        """Patches and the class token."""
        return (self.image_size // self.patch_size) ** 2 + 1

    def _patch_params(self, width: int) -> int:
        return (self.channels * self.patch_size**2 + 1) * width

    def _tokens_params(self, width: int) -> int:
        return (1 + self.tokens) * width

    def _head_params(self, width: int) -> int:
        return 2 * width + (width + 1) * self.num_classes

    def cost(self, path: Path) -> PathCost:
        """Parameters and FLOPs of one path."""
        first, last = self.widths[path.first_row], self.widths[path.last_row]
        blocks = [(self.widths[part.row], part.stop - part.start) for part in path.segments]
        params = self._patch_params(first) + self._head_params(last)
        params += sum(count * block_params(width) for width, count in blocks)
        flops = (self.tokens - 1) * self.channels * self.patch_size**2 * first
        flops += sum(count * block_flops(width, self.tokens) for width, count in blocks)
        flops += self.has_norm(path) * NORM_FLOPS * self.tokens * last + last * self.num_classes
        if path.stitch is None:
            params += self._tokens_params(first)
            return PathCost(params, params, flops)
        narrow, wide = self.stitch_widths[path.stitch]
        params += (narrow + 1) * wide
        flops += self.tokens * narrow * wide
        return PathCost(params + self._tokens_params(first), params, flops)

    @property
    def stored_params(self) -> int:
        """Every parameter of the pool: all rows and all stitch layers."""
        rows = sum(self.cost(path).params for path in self.paths if path.stitch is None)
        return rows + sum((narrow + 1) * wide for narrow, wide in self.stitch_widths)

    def describe(self, path: Path) -> dict[str, str | int | None]:
        """The fields of paths.json that need no training: key, blocks, rows, stitch, cost and place in `paths`."""
        low, high = path.segments[0], path.segments[-1]
        alone, is_widest = path.stitch is None, low.row == len(self.widths) - 1
        cost = self.cost(path)
        return {
            "key": path.key,
            "low": 0 if alone and is_widest else low.stop - low.start,
            "high": 0 if alone and not is_widest else high.stop - high.start,
            "low_row": None if alone and is_widest else low.row,
            "high_row": None if alone and not is_widest else high.row,
            "stitch": path.stitch,
            "params": cost.params,
            "params_paper": cost.params_paper,
            "flops": cost.flops,
            "cfg_id": self.paths.index(path),
        }
