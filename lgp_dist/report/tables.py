"""Evaluated paths as plain text for a terminal, and as CSV and JSON files."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

from lgp_dist.files import write_atomic
from lgp_dist.report.rows import FIELDS, decimals, flops_unit, pareto_front
from lgp_dist.run.path_rows import PathRow
from lgp_dist.run.text_table import text_table

MAX_KEY = 32
"""Characters of a key in the text table; a longer key loses its middle. Keeps a line within 100 columns."""


def paths_table(rows: Sequence[PathRow]) -> str:
    """A table of all paths, cheapest first, with * on the Pareto front of top-1 against FLOPs.

    Plain ASCII without escape codes and at most 100 columns wide, for terminals, logs and pipes. Parameters in
    millions, FLOPs in M or G multiply-adds, accuracies in percent. No final newline.
    """
    if not rows:
        return "no evaluated paths"
    front = {row["key"] for row in pareto_front(rows)}
    divisor, letter = flops_unit(rows)
    params, flops = decimals(row["params"] / 1e6 for row in rows), decimals(row["flops"] / divisor for row in rows)
    head = ["", "path", "low", "high", "stitch", "params (M)", f"FLOPs ({letter})", "top-1 (%)", "top-5 (%)"]
    body = [
        [
            "*" if row["key"] in front else "",
            _shorten(row["key"]),
            str(row["low"]),
            str(row["high"]),
            "-" if row["stitch"] is None else str(row["stitch"]),
            f"{row['params'] / 1e6:.{params}f}",
            f"{row['flops'] / divisor:.{flops}f}",
            f"{row['top1']:.2f}",
            f"{row['top5']:.2f}",
        ]
        for row in sorted(rows, key=lambda row: (row["flops"], -row["top1"], row["key"]))
    ]
    note = f"* on the Pareto front of top-1 against FLOPs: {len(front)} of {len(rows)} paths"
    return text_table(head, body, left=2, style="ruled") + "\n" + note


def write_paths_csv(rows: Sequence[PathRow], path: Path) -> None:
    """Writes the rows as CSV with a header; no stitch is an empty field. Other fields than FIELDS come last."""
    fields = list(dict.fromkeys((*FIELDS, *(name for row in rows for name in row))))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=fields, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, text.getvalue().encode())


def write_paths_json(rows: Sequence[PathRow], path: Path) -> None:
    """Writes the rows as a JSON list, one path a line."""
    lines = ",\n".join(json.dumps(row) for row in rows)
    write_atomic(path, f"[\n{lines}\n]\n".encode())


def _shorten(key: str) -> str:
    """A key of printable ASCII, at most MAX_KEY characters long."""
    safe = key.encode("ascii", "backslashreplace").decode()
    safe = "".join(each if each.isprintable() else "?" for each in safe)
    half = (MAX_KEY - 2) // 2
    return safe if len(safe) <= MAX_KEY else f"{safe[:half]}..{safe[-half:]}"
