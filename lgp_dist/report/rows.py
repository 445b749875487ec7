"""What the report's parts share: the kind of a path and units for its costs.

A row is one evaluated path, a dict with the fields of paths.json: key, low, high (blocks), low_row, high_row, stitch
(indices or None), params, params_paper (counts), flops (multiply-adds), top1 and top5 (percent).
"""

import math
from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]
"""One evaluated path."""
Kind = tuple[int, ...]
"""The rows that a path visits, in order: (0,) is the narrow row alone, (0, 1) is stitched."""

FIELDS = ("key", "low", "high", "low_row", "high_row", "stitch", "params", "params_paper", "flops", "top1", "top5")
"""The fields of a row, in the order in which files hold them."""


def kind_of(row: Row) -> Kind:
    """The pool's rows that a path visits. Sorting kinds goes from the narrowest row to the widest."""
    return tuple(index for index in (row["low_row"], row["high_row"]) if index is not None)


def row_alone(rows: Sequence[Row], *, wide: bool) -> Row | None:
    """The cheapest of the paths that cross no stitch, or, wide, the dearest; None where there is none."""
    alone = sorted((row for row in rows if row["stitch"] is None), key=lambda row: row["flops"])
    return alone[-1 if wide else 0] if alone else None


def kinds(rows: Sequence[Row]) -> list[Kind]:
    """Every kind among the rows, each once, narrow to wide."""
    return sorted({kind_of(row) for row in rows})


def kind_label(kind: Kind, all_kinds: Sequence[Kind]) -> str:
    """A kind in words, as short as the pool allows: rows are numbered only where there are three or more."""
    visited = sorted({index for each in all_kinds for index in each})
    if len(kind) == 2:
        return "Stitched" if len(visited) <= 2 else f"Stitched, row {kind[0]} to {kind[1]}"
    if len(visited) > 1 and kind[0] == visited[0]:
        return "Narrow row alone"
    if len(visited) > 1 and kind[0] == visited[-1]:
        return "Wide row alone"
    return f"Row {kind[0]} alone"


def pareto_front(rows: Sequence[Row], cost: str = "flops") -> list[Row]:
    """The rows that no other row beats in cost and top-1 (percent) at once, cheapest first.

    cost: the field to keep low, "flops" or "params". Of rows with equal cost the most accurate stays, of rows with
    equal top-1 the cheapest; of rows equal in both the one whose key sorts first.
    """
    front: list[Row] = []
    for row in sorted(rows, key=lambda row: (row[cost], -row["top1"], row["key"])):
        if not front or row["top1"] > front[-1]["top1"]:
            front.append(row)
    return front


def flops_unit(rows: Sequence[Row]) -> tuple[float, str]:
    """Divisor and letter for a column of FLOPs: G where the largest path reaches 1e9 multiply-adds, else M."""
    return (1e9, "G") if max((row["flops"] for row in rows), default=0) >= 1e9 else (1e6, "M")


def decimals(values: Sequence[float]) -> int:
    """Decimals that give the smallest positive value two significant digits: at least 2, at most 6."""
    smallest = min((value for value in values if value > 0), default=1.0)
    return min(6, max(2, 1 - math.floor(math.log10(smallest))))


def amount(count: float) -> str:
    """A count of parameters or multiply-adds for running text: 8.85 G, 43.20 M, 62.40 k or 512."""
    for divisor, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= divisor:
            return f"{count / divisor:.2f} {letter}"
    return f"{count:g}"
