"""The best path within a budget."""

from collections.abc import Sequence

from lgp_dist.config.budget import Budget
from lgp_dist.errors import UserError
from lgp_dist.run.path_rows import PathRow, number_of

LIMITS = {"params": "max_params", "flops": "max_flops", "latency_ms": "max_latency_ms"}
"""Field of a path's row to field of the budget."""


def limits_of(budget: Budget) -> dict[str, float]:
    """The limits of a budget by field of a path's row."""
    return {field: getattr(budget, name) for field, name in LIMITS.items() if getattr(budget, name)}


def choose(rows: Sequence[PathRow], budget: Budget, prefix: str = "--budget.") -> PathRow:
    """The most accurate row within the budget, on ties the one with fewer FLOPs; UserError if no row is within it.

    rows: with latency_ms if the budget limits it. prefix: of the options that a person gave.
    """
    limits = limits_of(budget)

    def excess(row: PathRow) -> float:
        return max((number_of(row, field) / limit for field, limit in limits.items()), default=0.0)

    fitting = [row for row in rows if excess(row) <= 1.0]
    if fitting:
        return max(fitting, key=lambda row: (row["top1"], -row["flops"]))
    nearest = min(rows, key=excess)
    missed = "; ".join(
        f"{field} {number_of(nearest, field):.6g} over {prefix}{LIMITS[field].replace('_', '-')} {limit:.6g}"
        for field, limit in limits.items()
        if number_of(nearest, field) > limit
    )
    raise UserError(f"No path fits the budget; the nearest is {nearest['key']} ({missed}): raise the limit.")
