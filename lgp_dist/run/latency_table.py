"""Latencies of paths that were measured elsewhere: CSV or JSON. Needs no torch: the command line reads them first."""

import csv
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lgp_dist.errors import UserError, nearest
from lgp_dist.run.path_rows import PathRow


def with_table(rows: Iterable[PathRow], file: Path) -> list[PathRow]:
    """The rows with the latencies of a table. UserError where it lacks one, has another, or is no table.

    CSV has the columns key and latency_ms, JSON milliseconds by key or a list of objects with these fields.
    """
    found, wanted = dict[str, float](), {row["key"]: row for row in rows}
    for key, value in _pairs(file):
        if key not in wanted:
            advice = nearest(key, wanted, f"the first is {next(iter(wanted))}")
            raise UserError(f"{file} names {key!r}, which is no evaluated path of the run: {advice}.")
        if key in found:
            raise UserError(f"{file} names {key} twice: leave one latency.")
        try:
            found[key] = math.nan if isinstance(value, bool) or "_" in str(value) else float(value)
        except (TypeError, ValueError, OverflowError):
            found[key] = math.nan
        if not 0 < found[key] < math.inf:
            raise UserError(f"{file} has {value!r} for {key}: write milliseconds, a number above 0.")
    if missing := [key for key in wanted if key not in found]:
        raise UserError(f"{file} lacks {len(missing)} of {len(wanted)} paths, such as {missing[0]}: measure them all.")
    return [{**row, "latency_ms": found[key], "latency_on": f"another device ({file})"} for key, row in wanted.items()]


def _pairs(file: Path) -> list[tuple[str, Any]]:
    """Key and value of each entry; a key may stand twice."""
    try:
        text = file.read_text(encoding="utf-8-sig")
        if file.suffix.lower() != ".json":
            reader = csv.DictReader(text.splitlines(), strict=True, skipinitialspace=True)
            columns, entries = list(reader.fieldnames or []), list(reader)
            if columns.count("key") != 1 or columns.count("latency_ms") != 1:
                raise ValueError(f"its columns are {', '.join(columns)}" if columns else "it is empty")
            if long := next((entry for entry in entries if None in entry), None):
                raise ValueError(f"{long['key']} has more fields than there are columns")
        else:  # as lists of pairs, since an object would keep one of two equal keys
            content = json.loads(text, object_pairs_hook=list)
            entries = [
                dict(zip(("key", "latency_ms"), each, strict=True)) if isinstance(each, tuple) else dict(each)
                for each in content
            ]
        return [(str(entry["key"]), entry["latency_ms"]) for entry in entries]
    except OSError as error:
        raise UserError(f"--latency-table {file} cannot be read ({error.strerror}): name a file that can.") from None
    except (ValueError, TypeError, KeyError, RecursionError, csv.Error) as error:
        wanted = "CSV with the columns key and latency_ms, or JSON with milliseconds by key"
        raise UserError(
            f"{file} is no table of latencies ({str(error) or type(error).__name__}): write {wanted}."
        ) from None
