"""The best path within a budget."""

from collections.abc import Sequence
from typing import Any

from lgp_dist.config.budget import Budget
from lgp_dist.errors import UserError

LIMITS = {"params": "max_params", "flops": "max_flops", "latency_ms": "max_latency_ms"}
"""Field of a path's row and of the budget."""


def limits_of(budget: Budget) -> dict[str, float]:
    """What the budget limits: field of a path's row -> the most that it may be."""
    return {field: getattr(budget, name) for field, name in LIMITS.items() if getattr(budget, name)}


def choose(rows: Sequence[dict[str, Any]], budget: Budget, prefix: str = "--budget.") -> dict[str, Any]:
    """The most accurate row within the budget, the cheaper of two equals; UserError naming the nearest if none is.

    rows: fields of paths.json, and latency_ms where the budget limits it. prefix: of the options that a person gave.
    """
    limits = limits_of(budget)

    def excess(row: dict[str, Any]) -> float:
        return max((row[field] / limit for field, limit in limits.items()), default=0.0)

    fitting = [row for row in rows if excess(row) <= 1.0]
    if fitting:
        return max(fitting, key=lambda row: (row["top1"], -row["flops"]))
    nearest = min(rows, key=excess)
    missed = "; ".join(
        f"{field} {nearest[field]:.6g} over {prefix}{LIMITS[field].replace('_', '-')} {limit:.6g}"
        for field, limit in limits.items()
        if nearest[field] > limit
    )
    raise UserError(f"No path fits the budget; the nearest is {nearest['key']} ({missed}): raise the limit.")
