"""Evaluated paths as plain text for a terminal, and as CSV and JSON files."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

from lgp_dist.files import write_atomic
from lgp_dist.report.rows import FIELDS, Row, decimals, flops_unit, pareto_front
from lgp_dist.run.text_table import text_table

MAX_KEY = 32
"""Characters of a key that the text table shows; a longer key loses its middle. Keeps a line within 100 columns."""


def paths_table(rows: Sequence[Row]) -> str:
    """An aligned table of all paths, cheapest first, with * on the Pareto front of top-1 against FLOPs.

    Plain ASCII without escape codes and at most 100 columns wide, so that it reads the same in a terminal, a log and
    a pipe. Parameters in millions, FLOPs in M or G multiply-adds, accuracies in percent. Has no final newline.
    """
    if not rows:
        return "no evaluated paths"
    front = {row["key"] for row in pareto_front(rows)}
    divisor, letter = flops_unit(rows)
    params = [row["params"] / 1e6 for row in rows]
    flops = [row["flops"] / divisor for row in rows]
    head = ["", "path", "low", "high", "stitch", "params (M)", f"FLOPs ({letter})", "top-1 (%)", "top-5 (%)"]
    body = [
        [
            "*" if row["key"] in front else "",
            _shorten(row["key"]),
            str(row["low"]),
            str(row["high"]),
            "-" if row["stitch"] is None else str(row["stitch"]),
            f"{row['params'] / 1e6:.{decimals(params)}f}",
            f"{row['flops'] / divisor:.{decimals(flops)}f}",
            f"{row['top1']:.2f}",
            f"{row['top5']:.2f}",
        ]
        for row in sorted(rows, key=lambda row: (row["flops"], -row["top1"], row["key"]))
    ]
    note = f"* on the Pareto front of top-1 against FLOPs: {len(front)} of {len(rows)} paths"
    return text_table(head, body, left=2, style="ruled") + "\n" + note


def write_paths_csv(rows: Sequence[Row], path: Path) -> None:
    """Writes the rows as CSV with a header, whole or not at all. An absent value (no stitch) is an empty field.

    Fields beyond those of paths.json follow the known ones. Raises UserError where the file cannot be written.
    """
    extra = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in FIELDS]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=[*FIELDS, *extra], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, text.getvalue().encode())


def write_paths_json(rows: Sequence[Row], path: Path) -> None:
    """Writes the rows as a JSON list, one path a line, whole or not at all.

    Raises UserError where the file cannot be written.
    """
    lines = ",\n".join(json.dumps(row) for row in rows)
    write_atomic(path, f"[\n{lines}\n]\n".encode())


def _shorten(key: str) -> str:
    """A key that is printable, ASCII and at most MAX_KEY characters."""
    safe = key.encode("ascii", "backslashreplace").decode()
    safe = "".join(each if each.isprintable() else "?" for each in safe)
    half = (MAX_KEY - 2) // 2
    return safe if len(safe) <= MAX_KEY else f"{safe[:half]}..{safe[-half:]}"
