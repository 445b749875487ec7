"""A path, what it costs, and what all kinds of pools have in common. Pure Python: known before any tensor exists."""

from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass
from typing import NotRequired, TypedDict

from lgp_dist.errors import UserError, nearest

MLP_RATIO = 4
NORM_FLOPS = 5
"""Operations per element of a LayerNorm."""


def block_params(width: int) -> int:
    """Parameters of one block."""
    weights = (4 + 2 * MLP_RATIO) * width * width
    biases_and_norms = (3 + 1 + MLP_RATIO + 1 + 4) * width
    return weights + biases_and_norms


def block_flops(width: int, tokens: int) -> int:
    """FLOPs of one block on this number of tokens."""
    linear = tokens * (4 + 2 * MLP_RATIO) * width * width
    attention = 2 * tokens * tokens * width
    return linear + attention + 2 * NORM_FLOPS * tokens * width


@dataclass(frozen=True, order=True)
class Segment:
    """Blocks start .. stop - 1 of one row."""

    row: int
    start: int
    stop: int


@dataclass(frozen=True, order=True)
class Path:
    """One model of a pool: which blocks of which rows run."""

    segments: tuple[Segment, ...]
    """In the order in which they run. Two-way pools have up to three, other pools up to two, from narrow to wide."""
    stitches: tuple[int, ...] = ()
    """Index of the stitch layer after each segment but the last; empty for a row alone."""
    name: str = ""
    """Its key if that is not made from the segments."""

    @property
    def key(self) -> str:
        """Printable name, unique in a pool and the same in logs, tables, folders and exports.

        `r0.0-3+r1.4-5` leaves row 0 after block 3 and enters row 1 at block 4; `r0.0-5` is row 0 alone.
        """
        return self.name or "+".join(f"r{part.row}.{part.start}-{part.stop - 1}" for part in self.segments)

    @property
    def is_row(self) -> bool:
        """Whether it is a row alone, without a stitch layer."""
        return not self.stitches

    @property
    def first_row(self) -> int:
        """The row whose patch embedding it runs."""
        return self.segments[0].row

    @property
    def last_row(self) -> int:
        """The row whose norm and head it runs."""
        return self.segments[-1].row

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return sum(part.stop - part.start for part in self.segments)

    def has_block(self, row: int, block: int) -> bool:
        """Whether the path runs this block."""
        return any(part.row == row and part.start <= block < part.stop for part in self.segments)


@dataclass(frozen=True)
class PathCost:
    """Size and computation of a path."""

    params: int
    """All parameters of the descendant."""
    params_paper: int
    """Without class token and position embedding on stitched paths, as the published tables count."""
    flops: int
    """Multiply-adds of convolutions, linear layers and attention for one image, plus 5 per LayerNorm element."""


class PathFields(TypedDict):
    """The fields of paths.json that need no training."""

    key: str
    low: int
    """Blocks of the narrower row; 0 for the widest row alone."""
    high: int
    """Blocks of the wider row; 0 for another row alone."""
    low_row: int | None
    high_row: int | None
    stitch: int | None
    """Index of the first stitch layer; null for a row alone."""
    params: int
    params_paper: int
    flops: int
    cfg_id: NotRequired[int]
    """SN-Net's number of the path."""


class Space(ABC):
    """The paths of a pool and what each costs.

    Subclasses are frozen dataclasses; their fields are stored in the config.json of exports.
    """

    widths: tuple[int, ...]
    """Embedding width of each row."""
    depths: tuple[int, ...]
    """Blocks of each row."""
    image_size: int
    patch_size: int
    channels: int
    num_classes: int
    final_norm: bool
    """Whether stitched paths apply the final norm of their last row; rows alone always do."""
    class_token: bool
    """Whether the head takes a class token; otherwise it takes the mean of all tokens."""
    stitch_widths: tuple[tuple[int, int], ...]
    """(source, target) width of every stitch layer, in order."""
    stored_params: int
    """Parameters that make all paths."""
    paths: tuple[Path, ...]

    @abstractmethod
    def _rows_of(self, path: Path) -> tuple[int, int, int | None, int | None]:
        """`low`, `high`, `low_row` and `high_row` of `PathFields`."""

    @property
    def unit_order(self) -> tuple[tuple[int, int] | int, ...]:
        """Blocks, as (row, block), and stitch layers, by index, in an order that is every path's."""
        return tuple((row, block) for row, depth in enumerate(self.depths) for block in range(depth))

    def by_key(self, key: str) -> Path:
        """The path with this key; UserError if the pool has none."""
        known = {path.key: path for path in self.paths}
        if key not in known:
            advice = nearest(key, known, f"the first is {next(iter(known))}")
            raise UserError(f"The pool has no path {key!r}: {advice}; `lgp paths` lists its {len(known)} keys.")
        return known[key]

    def chosen(self, keys: Collection[str]) -> tuple[Path, ...]:
        """The paths with these keys in the pool's order, all paths for no keys; UserError if the pool lacks one."""
        wanted = {self.by_key(key) for key in keys}
        return tuple(path for path in self.paths if path in wanted or not wanted)

    def has_norm(self, path: Path) -> bool:
        """Whether the path applies its last row's final norm; it has the norm's parameters in any case."""
        return self.final_norm or path.is_row

    @property
    def tokens(self) -> int:
        """Patches, and the class token if there is one."""
        return (self.image_size // self.patch_size) ** 2 + self.class_token

    def cost(self, path: Path) -> PathCost:
        """Parameters and FLOPs of one path."""
        first, last = self.widths[path.first_row], self.widths[path.last_row]
        blocks = [(self.widths[part.row], part.stop - part.start) for part in path.segments]
        patch, patches = self.channels * self.patch_size**2, self.tokens - self.class_token
        params = (patch + 1) * first + 2 * last + (last + 1) * self.num_classes
        params += sum(count * block_params(width) for width, count in blocks)
        normed = self.tokens if self.class_token else 1  # the mean of all tokens is taken before the norm
        flops = patches * patch * first + last * self.num_classes
        flops += sum(count * block_flops(width, self.tokens) for width, count in blocks)
        flops += self.has_norm(path) * NORM_FLOPS * normed * last
        embeddings = (self.class_token + self.tokens) * first
        if path.is_row:
            return PathCost(params + embeddings, params + embeddings, flops)
        for source, target in (self.stitch_widths[index] for index in path.stitches):
            params += (source + 1) * target
            flops += self.tokens * source * target
        return PathCost(params + embeddings, params, flops)

    def describe(self, path: Path) -> PathFields:
        """The fields of paths.json that need no training."""
        low, high, low_row, high_row = self._rows_of(path)
        cost = self.cost(path)
        return {
            "key": path.key,
            "low": low,
            "high": high,
            "low_row": low_row,
            "high_row": high_row,
            "stitch": path.stitches[0] if path.stitches else None,
            "params": cost.params,
            "params_paper": cost.params_paper,
            "flops": cost.flops,
        }

    def _check_patches(self) -> None:
        if self.image_size % self.patch_size:
            sizes = f"data.image_size {self.image_size} is not a multiple of model.patch_size {self.patch_size}"
            raise UserError(f"{sizes}: change one.")


class PlainSpace(Space):
    """Models without stitch layers: each is a plain ViT, a row of its own."""

    final_norm = True
    stitch_widths = ()

    def _rows_of(self, path: Path) -> tuple[int, int, int | None, int | None]:
        return path.blocks, 0, 0, None
