"""Ratios of a measurement to a stored one of the same benchmark, with what their spreads leave open."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lgp_dist.errors import UserError
from lgp_dist.run.text_table import objects_table

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Fields:
    """The fields of a benchmark's objects that a comparison uses."""

    same: tuple[str, ...]
    """Two objects that agree in these measure the same thing; a field that both lack agrees."""
    measures: dict[str, str]
    """Measured field -> the field with its spread ((most - least) / median); empty for arithmetic."""


LOOP = ("recipe", "engine", "reduction", "policy", "only", "ranks", "micro_steps", "paths_per_batch", "widths")
LOOP += ("image_size", "images", "precision", "compile", "ancestry", "threads")
FIELDS = {
    "sampler": Fields(
        ("recipe", "policy", "meet", "ranks", "micro_steps", "steps", "seed"),
        dict.fromkeys(("efficiency", "efficiency_micro_step", "efficiency_with_ancestry", "coverage", "blocks"), ""),
    ),
    "latency": Fields(("key",), {"latency_ms": ""}),
    "paths": Fields(("recipe", "precision", "batch", "path"), {"seconds": "spread"}),
    "engine": Fields(
        ("recipe", "engine", "reduction", "policy", "ranks", "micro_steps", "widths", "images", "precision"),
        {"ms_per_work": "spread", "peak_mb": ""},
    ),
    "checkpoint": Fields(
        ("recipe", "engine", "mode", "ranks", "widths", "images"),
        {"stall_ms": "cost_spread", "cost_ms": "cost_spread", "publish_s": "publish_spread"},
    ),
    "op": Fields(("op", "size", "dtype", "way", "mode"), {"us": "spread"}),
    "step": Fields(("kind", "path", "precision", "batch", "way", "paths"), {"ms": "spread", "ms_per_path": "spread"}),
    "data": Fields(("loader", "data", "threads", "batch"), {"images_per_cpu_second": "spread"}),
    "train": Fields(LOOP, {"images_per_s": "spread", "peak_mb": ""}),
    "peers": Fields(("peer", "workers", *LOOP), {"images_per_s": "spread", "ratio": "ratio_spread"}),
    "distil": Fields(
        ("recipe", "precision", "ancestry", "compile", "widths", "image_size", "batch"),
        {"together_ms": "spread", "ratio": "ratio_spread"},
    ),
    "scaling": Fields(("recipe", "policy", "micro_steps", "images_per_rank", "ranks"), {"efficiency": ""}),
}
"""By the benchmark's name in `lgp bench`."""


def read_rows(option: str, file: Path, needed: Sequence[str], advice: str) -> list[dict[str, Any]]:
    """The objects in the file that an option names; UserError if it holds none, or if one lacks a needed field."""
    try:
        rows = as_rows(json.loads(file.read_bytes()))
    except OSError as error:
        raise UserError(f"{option} {file} cannot be read ({error.strerror}): {advice}.") from None
    except ValueError as error:
        raise UserError(f"{option} {file} is not valid JSON ({error}): {advice}.") from None
    lacks = [name for row in rows or [{}] for name in needed if not isinstance(row, dict) or name not in row]
    if lacks:
        raise UserError(f"{option} {file} holds no objects, or one without {lacks[0]}: {advice}.")
    return rows


def as_rows(content: Any) -> list[dict[str, Any]]:
    """The objects of a result; the table of `lgp bench paths` becomes an object for each path."""
    if isinstance(content, dict) and isinstance(content.get("costs"), dict):
        about = {name: content.get(name) for name in ("recipe", "precision", "batch", "machine")}
        spreads = content.get("spread", {})
        return [
            about | {"path": key, "seconds": value, "spread": spreads.get(key)}
            for key, value in content["costs"].items()
        ]
    return content if isinstance(content, list) else []


def baseline_ratios(bench: str, now: Rows, before: Rows) -> list[dict[str, Any]]:
    """One object for each measure of each object that both have: `now` over `before`.

    ratio; low and high, the ratio if both medians lay at the far ends of intervals as wide as their spreads; differs,
    whether 1 lies outside low to high. For arithmetic low and high are the ratio. Objects are matched by the fields
    that say what was measured; machine, versions and commit may differ.
    """
    fields, found = FIELDS[bench], {}
    for row in before:
        found.setdefault(_key(fields, row), row)
    result = []
    for row in now:
        old = found.get(_key(fields, row))
        for measure, width in fields.measures.items() if old else ():
            new_value, old_value = row.get(measure), old.get(measure)
            if not (_is_number(new_value) and _is_number(old_value) and old_value):
                continue
            new_half, old_half = (_half(each, width) for each in (row, old))
            ratio = new_value / old_value
            low = ratio * (1 - new_half) / (1 + old_half)
            high = ratio * (1 + new_half) / (1 - old_half) if old_half < 1 else float("inf")
            result.append(
                {"of": _label(fields, row), "measure": measure, "before": old_value, "now": new_value}
                | {"ratio": round(ratio, 4), "low": round(max(0.0, low), 4), "high": round(high, 4)}
                | {"differs": not low <= 1 <= high}
            )
    return result


def comparison(bench: str, now: Rows, before: Rows, file: Path) -> str:
    """`baseline_ratios` as text; a sentence where the two have nothing in common."""
    rows = baseline_ratios(bench, now, before)
    if not rows:
        return f"{file} holds nothing that was measured here: {', '.join(FIELDS[bench].same)} differ."
    missing = len({_key(FIELDS[bench], row) for row in now} - {_key(FIELDS[bench], row) for row in before})
    lines = [f"against {file}, now over before:"]
    lines += [objects_table(rows, ("of", "measure", "before", "now", "ratio", "low", "high", "differs"))]
    return "\n".join(lines + [f"{missing} objects are not in {file}"] * bool(missing))


def _key(fields: Fields, row: Mapping[str, Any]) -> str:
    return json.dumps([row.get(name) for name in fields.same])


def _label(fields: Fields, row: Mapping[str, Any]) -> str:
    values = [row[name] for name in fields.same if row.get(name) not in (None, "", [])]
    return " ".join(",".join(map(str, value)) if isinstance(value, list) else str(value) for value in values)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _half(row: Mapping[str, Any], width: str) -> float:
    value = row.get(width) if width else 0.0
    return value / 2 if _is_number(value) else 0.0
