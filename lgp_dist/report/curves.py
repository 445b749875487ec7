"""What the report shows of metrics.jsonl: a stage's numbers as columns, since a file may have half a million lines."""

import math
from array import array
from collections.abc import Iterable, Mapping, MutableSequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Curves:
    """The numbers that one stage logged, by increasing optimizer step."""

    steps: MutableSequence[int] = field(default_factory=lambda: array("q"))
    columns: dict[str, MutableSequence[float]] = field(default_factory=dict)
    """By name, in the order of their first line; NaN where a line has none or it is not finite."""
    counts: set[str] = field(default_factory=set)
    """Names of columns whose values are all whole numbers in the file: steps, samples, bytes."""

    def of(self, name: str) -> MutableSequence[float]:
        """One column; all NaN if no line has it."""
        return self.columns.get(name, array("d", [math.nan]) * len(self.steps))

    def finite(self, name: str) -> list[float]:
        """The finite values of one column."""
        return [value for value in self.of(name) if not math.isnan(value)]

    def _add(self, line: Mapping[str, Any]) -> None:
        self.steps.append(line["step"])
        for name, value in line.items():
            if isinstance(value, int | float):
                if name not in self.columns and isinstance(value, int):
                    self.counts.add(name)
                elif isinstance(value, float):
                    self.counts.discard(name)
                column = self.columns.setdefault(name, array("d"))
                column.extend([math.nan] * (len(self.steps) - 1 - len(column)))
                column.append(value if math.isfinite(value) else math.nan)

    def _each_step_once(self) -> "Curves":
        """By increasing step; of several lines for a step the last counts: a restart repeated it."""
        for column in self.columns.values():
            column.extend([math.nan] * (len(self.steps) - len(column)))
        last = {step: place for place, step in enumerate(self.steps)}
        places = [last[step] for step in sorted(last)]
        kept = Curves(array("q", sorted(last)), counts=self.counts)
        for name, column in self.columns.items():
            kept.columns[name] = array("d", [column[place] for place in places])
        return kept


def curves_of(lines: Iterable[Mapping[str, Any]]) -> dict[str, Curves]:
    """The numbers of each stage from one pass over the lines of metrics.jsonl, in the order of the stages there."""
    found: dict[str, Curves] = {}
    for line in lines:
        found.setdefault(line["stage"], Curves())._add(line)
    return {stage: curves._each_step_once() for stage, curves in found.items()}
