"""Means over seeds with 95 % intervals, and differences between variants on the same seeds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, stdev

T_95 = (
    *(12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281),
    *(2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860),
    *(2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423),
)
"""97.5 % quantiles of Student's t with 1, 2, ... degrees of freedom; the last, a little too wide, serves for more."""


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds."""

    mean: float
    half: float | None
    """Half the width of the 95 % interval by Student's t; None for one seed."""
    count: int
    """Seeds."""

    def __str__(self) -> str:
        return f"{self.mean:.2f}" + ("" if self.half is None else f" ± {self.half:.2f}")


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and interval of one value or more."""
    count = len(values)
    if count == 1:
        return Estimate(values[0], None, 1)
    quantile = T_95[min(count - 1, len(T_95)) - 1]
    return Estimate(fmean(values), quantile * stdev(values) / sqrt(count), count)


def difference(one: Mapping[int, float], other: Mapping[int, float]) -> Estimate | None:
    """Mean and interval of `one` minus `other` over the seeds that both have; None if they share none."""
    seeds = sorted(one.keys() & other.keys())
    return estimate([one[seed] - other[seed] for seed in seeds]) if seeds else None
