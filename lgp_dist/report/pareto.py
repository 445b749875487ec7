"""Which paths are worth having: no other path is as accurate for less."""

from collections.abc import Sequence

from lgp_dist.report.rows import Row


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
