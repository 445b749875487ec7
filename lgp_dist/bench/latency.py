"""Latency of every path of an exported pool in onnxruntime, for `lgp descend RUN --latency-table`. Needs no torch."""

import importlib
import importlib.util
from pathlib import Path
from typing import Any

from lgp_dist.errors import UserError, first_line
from lgp_dist.files import write_atomic

COLUMNS = (("key", "latency_ms", "latency_low_ms", "latency_high_ms"),)


def bench_latency(folder: Path, out: Path, batch: int = 1, threads: int = 0) -> list[dict[str, Any]]:
    """Times every path of a folder that `lgp export RUN --all` wrote, and writes a CSV file; UserError if it cannot.

    batch: images of a forward. threads: of onnxruntime; 0 for its choice.
    """
    if batch < 1 or threads < 0:
        raise UserError(f"--batch is {batch} and --threads {threads}, but must be at least 1 and 0: change them.")
    if not (folder / "paths.json").is_file() or not any(folder.glob("*.onnx")):
        raise UserError(f"{folder} has no paths.json with graphs: name a folder that `lgp export RUN --all` wrote.")
    if importlib.util.find_spec("onnxruntime") is None:
        raise UserError("onnxruntime is not installed: `pip install onnxruntime`.")
    onnx_paths = importlib.import_module("lgp_dist.export.onnx_paths")  # imports onnxruntime
    try:
        rows: list[dict[str, Any]] = onnx_paths.latencies(folder, batch, threads)
    except Exception as error:  # onnxruntime raises kinds of its own for graphs that are missing or damaged
        advice = "write it again with `lgp export RUN --all`"
        raise UserError(f"{folder} cannot be measured ({first_line(error)}): {advice}.") from error
    write_atomic(out, onnx_paths.as_csv(rows).encode())
    return rows
