"""The models of an exported pool in onnxruntime: sessions that share one file of weights, and their latencies.

    from onnx_paths import open_path

    session = open_path("FOLDER", "r0.0-3+r1.4-5")  # a key of paths.json
    (logits,) = session.run(["logits"], {"images": images})  # NumPy float32 [B, C, H, W], any batch size

    python FOLDER/onnx_paths.py [BATCH] > latencies.csv

prints a table for `lgp descend RUN --latency-table latencies.csv`. Needs onnxruntime and NumPy.
"""

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

REPEATS, WARM_UP = 50, 10
"""Forwards of each path that count, and those before them that do not count."""


def open_path(folder: str | Path, key: str, threads: int = 0) -> onnxruntime.InferenceSession:
    """A session of one path on the CPU. threads: 0 for onnxruntime's choice.

    Weights stay in the system's cache of model.safetensors, which all sessions of all processes share. By default
    onnxruntime copies every matrix into an order that suits its products ("prepacking"), for each session.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.enable_cpu_mem_arena = False  # an arena keeps the largest activations that a session has had
    options.add_session_config_entry("session.disable_prepacking", "1")
    return onnxruntime.InferenceSession(str(Path(folder) / f"{key}.onnx"), options, providers=["CPUExecutionProvider"])


def latencies(folder: str | Path, batch: int = 1, threads: int = 0) -> list[dict[str, Any]]:
    """Each path's key and milliseconds of a batch: median, and what 10 % of the forwards are below and 10 % above."""
    table, rows = json.loads((Path(folder) / "paths.json").read_text()), []
    shape = table["shape"]
    images = np.zeros((batch, shape["channels"], shape["image_size"], shape["image_size"]), np.float32)
    for path in table["paths"]:
        session, times = open_path(folder, path["key"], threads), []
        for _ in range(WARM_UP + REPEATS):
            start = time.perf_counter()
            session.run(["logits"], {"images": images})
            times.append(1000 * (time.perf_counter() - start))
        tenths = [round(value, 5) for value in statistics.quantiles(times[WARM_UP:], n=10, method="inclusive")]
        names = ("latency_ms", "latency_low_ms", "latency_high_ms")
        rows.append({"key": path["key"], **dict(zip(names, (tenths[4], tenths[0], tenths[8]), strict=True))})
    return rows


def as_csv(rows: list[dict[str, Any]]) -> str:
    """Rows of `latencies` as a table."""
    return "".join(",".join(map(str, line)) + "\n" for line in (rows[0], *(row.values() for row in rows)))


if __name__ == "__main__":
    sys.stdout.write(as_csv(latencies(Path(__file__).parent, *map(int, sys.argv[1:2]))))
