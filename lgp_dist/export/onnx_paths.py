"""The models of an exported pool in onnxruntime: sessions that share one file of weights, and their latencies.

    from onnx_paths import open_path

    session = open_path("FOLDER", "r0.0-3+r1.4-5")  # a key of paths.json
    (logits,) = session.run(["logits"], {"images": images})  # NumPy float32 [B, C, H, W], any batch size

    python FOLDER/onnx_paths.py [BATCH] > latencies.csv

prints a table for `lgp descend RUN --latency-table latencies.csv`. Needs onnxruntime and NumPy.
"""

import csv
import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

REPEATS, WARM_UP = 50, 10
"""Forwards of each path that count, and those before them that do not count."""
FIELDS = ("key", "latency_ms", "latency_low_ms", "latency_high_ms")


def open_path(folder: str | Path, key: str, threads: int = 0) -> onnxruntime.InferenceSession:
    """A session of one path on the CPU. threads: 0 for onnxruntime's choice.

    Weights stay in the operating system's cache of model.safetensors, which all sessions of all processes share:
    onnxruntime would otherwise copy each matrix into the order in which it multiplies ("prepacking").
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.enable_cpu_mem_arena = False  # an arena keeps the largest activations that a session ever had
    options.add_session_config_entry("session.disable_prepacking", "1")
    return onnxruntime.InferenceSession(str(Path(folder) / f"{key}.onnx"), options, providers=["CPUExecutionProvider"])


def latencies(folder: str | Path, batch: int = 1, threads: int = 0, repeats: int = REPEATS) -> Iterator[dict[str, Any]]:
    """Each path's key and milliseconds of a batch: median, and what 10 % of the forwards are below and 10 % above."""
    table = json.loads((Path(folder) / "paths.json").read_text())
    shape = table["shape"]
    images = np.zeros((batch, shape["channels"], shape["image_size"], shape["image_size"]), np.float32)
    for path in table["paths"]:
        session, times = open_path(folder, path["key"], threads), []
        for _ in range(WARM_UP + repeats):
            start = time.perf_counter()
            session.run(["logits"], {"images": images})
            times.append(1000 * (time.perf_counter() - start))
        kept = times[WARM_UP:]
        tenths = statistics.quantiles(kept, n=10, method="inclusive")
        found = (statistics.median(kept), tenths[0], tenths[-1])
        yield dict(zip(FIELDS, (path["key"], *(round(value, 5) for value in found)), strict=True))


def write_csv(rows: Any, file: Any) -> None:
    """Writes rows of `latencies` as CSV."""
    writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)


if __name__ == "__main__":
    write_csv(latencies(Path(__file__).parent, *map(int, sys.argv[1:2])), sys.stdout)
