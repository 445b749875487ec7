"""What parts of the report share: kinds of paths, the Pareto front, and units of costs."""

import math
import re
from collections.abc import Iterable, Sequence
from typing import TypeVar

from lgp_dist.paths.path import PathFields
from lgp_dist.run.path_rows import ModelRow, PathRow, number_of

Kind = tuple[int, ...]
"""The rows that a path visits, in order: (0,) is the narrow row alone, (0, 1) stitched, (0, 1, 0) there and back."""
Model = TypeVar("Model", bound=ModelRow)

FIELDS = ("key", "low", "high", "low_row", "high_row", "stitch", "params", "params_paper", "flops", "top1", "top5")
"""The fields of a path's row, in the order in which files hold them."""


def visits(row: PathRow) -> list[tuple[int, int]]:
    """The rows that a path visits, in order, each with its number of blocks there."""
    parts = [re.fullmatch(r"r(\d+)\.(\d+)-(\d+)", part) for part in row["key"].split("+")]
    if found := [(int(part[1]), int(part[3]) - int(part[2]) + 1) for part in parts if part]:
        return found
    both = ((row["low_row"], row["low"]), (row["high_row"], row["high"]))
    return [(index, blocks) for index, blocks in both if index is not None]


def kind_of(row: PathRow) -> Kind:
    """The rows that a path visits. Kinds sort from the narrowest row to the widest."""
    return tuple(index for index, _ in visits(row))


def kinds(rows: Iterable[PathRow]) -> list[Kind]:
    """All kinds among the rows, narrow to wide."""
    return sorted({kind_of(row) for row in rows})


def kind_label(kind: Kind, all_kinds: Sequence[Kind]) -> str:
    """A kind in words; rows are numbered only in pools of three or more."""
    visited = sorted({index for each in all_kinds for index in each})
    if len(kind) > 1:
        only = len({each for each in all_kinds if len(each) > 1}) == 1
        return "Stitched" if only else f"Stitched, row {' to '.join(map(str, kind))}"
    if len(visited) > 1 and kind[0] == visited[0]:
        return "Narrow row alone"
    if len(visited) > 1 and kind[0] == visited[-1]:
        return "Wide row alone"
    return f"Row {kind[0]} alone"


def row_alone(rows: Iterable[PathRow], *, wide: bool) -> PathRow | None:
    """The row alone with the fewest FLOPs, or, if wide, the most; None if all paths are stitched."""
    alone = sorted((row for row in rows if row["stitch"] is None), key=lambda row: row["flops"])
    return alone[-1 if wide else 0] if alone else None


def pareto_front(rows: Iterable[Model], cost: str = "flops") -> list[Model]:
    """The rows that no other row beats in cost and top-1 at once, cheapest first.

    cost: a field. Of rows with equal cost the most accurate stays, of rows with equal top-1 the cheapest, and of rows
    equal in both the one whose key sorts first.
    """
    # From cheap to expensive, a row is on the front if it is more accurate than all before it.
    front: list[Model] = []
    for row in sorted(rows, key=lambda row: (number_of(row, cost), -row["top1"], row["key"])):
        if not front or row["top1"] > front[-1]["top1"]:
            front.append(row)
    return front


def flops_unit(rows: Iterable[ModelRow | PathFields]) -> tuple[float, str]:
    """Divisor and letter for a column of FLOPs: G if the largest model has 1e9 multiply-adds or more, else M."""
    return (1e9, "G") if max((row["flops"] for row in rows), default=0) >= 1e9 else (1e6, "M")


def decimals(values: Iterable[float]) -> int:
    """Decimals that give the smallest positive value two significant digits: at least 2, at most 6."""
    smallest = min((value for value in values if value > 0), default=1.0)
    return min(6, max(2, 1 - math.floor(math.log10(smallest))))


def amount(count: float) -> str:
    """A number of parameters or multiply-adds in running text: 8.85 G, 43.20 M, 62.40 k or 512."""
    for divisor, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= divisor:
            return f"{count / divisor:.2f} {letter}"
    return f"{count:g}"


def duration(seconds: float) -> str:
    """Seconds as a person says them: 4.2 s, 3 min 20 s, 5 h 12 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def date(created: str) -> str:
    """A time of artifact.json to the minute."""
    return f"{created[:10]} {created[11:16]} UTC"
