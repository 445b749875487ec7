"""The rows of paths.json and before.json: one for each evaluated path."""

import json
from pathlib import Path
from typing import NotRequired, TypedDict

from lgp_dist.paths.path import PathFields


class ModelRow(TypedDict):
    """What is compared of a model of any origin."""

    key: str
    params: int
    flops: int
    """Multiply-adds of one image's forward."""
    top1: float
    """Percent."""


class PathRow(PathFields):
    """An evaluated path."""

    top1: float
    """Percent."""
    top5: float
    """Percent."""
    latency_ms: NotRequired[float]
    """Median; 10 % of the measurements are below `latency_low_ms`, 10 % above `latency_high_ms`."""
    latency_low_ms: NotRequired[float]
    latency_high_ms: NotRequired[float]
    latency_on: NotRequired[str]
    """Where it was measured."""
    largest_difference: NotRequired[float]
    """In an export: of a logit of the exported model from the path's."""


def number_of(row: ModelRow | PathRow, field: str) -> float:
    """The number in a field of a row."""
    value: float = row[field]  # type: ignore[literal-required]
    return value


def read_rows(file: Path) -> list[PathRow]:
    """The rows of an artifact's file."""
    rows: list[PathRow] = json.loads(file.read_text())
    return rows
