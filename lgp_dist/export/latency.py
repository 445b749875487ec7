"""Latency of a model on this machine, and the file that keeps the measurements."""

import hashlib
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lgp_dist.config.budget import Budget
from lgp_dist.errors import UserError
from lgp_dist.files import write_json
from lgp_dist.models.descendant import empty_descendant
from lgp_dist.paths.path import Space
from lgp_dist.run.path_rows import PathRow
from lgp_dist.run.provenance import processor

NAME = "latency.json"
"""The file in a run directory."""

REPEATS, WARM_UP = 50, 10
"""Measurements that count, and those before them that do not count."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class LatencySetup:
    """Where and how a latency is measured; latencies of different setups are not compared."""

    device: str
    """cpu or cuda."""
    batch: int
    """Images per forward."""
    dtype: str
    """Of weights and images: fp32, bf16 or fp16."""
    machine: str
    """Host name and processor, or the GPU's name."""
    threads: int
    """Of torch, on the CPU."""
    torch: str
    """Version."""

    @classmethod
    def here(cls, budget: Budget) -> "LatencySetup":
        """This machine with the device, batch and dtype of a budget; UserError if it has no such device."""
        if budget.device == "cuda" and not torch.cuda.is_available():
            raise UserError("The budget's device is cuda, but torch finds no GPU on this machine: choose cpu.")
        chip = torch.cuda.get_device_name() if budget.device == "cuda" else processor()
        machine = f"{platform.node()}, {chip}"
        threads = torch.get_num_threads()
        return cls(budget.device, budget.batch, budget.dtype, machine, threads, torch.__version__)

    @property
    def words(self) -> str:
        """One line of text."""
        threads = f", {self.threads} thread(s)" if self.device == "cpu" else ""
        return f"{self.device}, batch {self.batch}, {self.dtype}{threads}, torch {self.torch}, {self.machine}"


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one forward of a whole batch."""

    median_ms: float
    low_ms: float
    """10 % of the measurements are below."""
    high_ms: float
    """10 % of the measurements are above."""
    repeats: int
    """Number of measurements after the warm-up."""


@torch.inference_mode()
def measure(model: nn.Module, image: tuple[int, int, int], setup: LatencySetup, repeats: int = REPEATS) -> Latency:
    """Times forwards of zeros [batch, *image] one by one. image: channels, height, width. Moves the model to the
    setup's device and dtype."""
    device, dtype = torch.device(setup.device), DTYPES[setup.dtype]
    model, images = model.to(device, dtype).eval(), torch.zeros(setup.batch, *image, device=device, dtype=dtype)
    times = []
    for _ in range(WARM_UP + repeats):
        start = time.perf_counter()
        model(images)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(1000 * (time.perf_counter() - start))
    kept = sorted(times[WARM_UP:])
    tenths = statistics.quantiles(kept, n=10, method="inclusive")
    return Latency(round(statistics.median(kept), 5), round(tenths[0], 5), round(tenths[-1], 5), repeats)


@dataclass(frozen=True)
class LatencyFile:
    """Latencies of a run's paths, measured once for each setup."""

    path: Path
    """RUN/latency.json."""
    of: str
    """Id of what the models come from, such as the trained pool; latencies of another are discarded."""

    def latency(self, key: str, setup: LatencySetup, measured: Callable[[str], Latency]) -> Latency:
        """The path's latency in the file, or else the measured one, which the file then keeps."""
        kept = self._read()
        name = hashlib.sha256(json.dumps(asdict(setup), sort_keys=True).encode()).hexdigest()[:12]
        entry = kept["places"].setdefault(name, {"place": asdict(setup), "paths": {}})
        if key not in entry["paths"]:
            entry["paths"][key] = asdict(measured(key))
            write_json(self.path, kept)
        return Latency(**entry["paths"][key])

    def _read(self) -> dict[str, Any]:
        empty: dict[str, Any] = {"of": self.of, "places": {}}
        try:
            kept = json.loads(self.path.read_text())
            return kept if kept["of"] == self.of else empty
        except FileNotFoundError:
            return empty
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{self.path} is damaged ({error}): remove it to measure latencies again.") from None


def with_latencies(
    rows: Iterable[PathRow],
    build: Callable[[str], nn.Module],
    image: tuple[int, int, int],
    budget: Budget,
    file: LatencyFile,
) -> list[PathRow]:
    """The rows with their latencies on the budget's device, with its batch and dtype.

    build: a path's key to a model of its shape; the weights do not matter. image: channels, height, width.
    """
    setup = LatencySetup.here(budget)
    timed: list[PathRow] = []
    for row in rows:
        found = file.latency(row["key"], setup, lambda key: measure(build(key), image, setup))
        timed.append(
            {
                **row,
                "latency_ms": found.median_ms,
                "latency_low_ms": found.low_ms,
                "latency_high_ms": found.high_ms,
                "latency_on": setup.words,
            }
        )
    return timed


def with_path_latencies(
    rows: Iterable[PathRow], space: Space, heads: tuple[int, ...], budget: Budget, file: LatencyFile
) -> list[PathRow]:
    """`with_latencies` for paths of a pool. heads: attention heads of each row."""
    image = (space.channels, space.image_size, space.image_size)
    return with_latencies(rows, lambda key: empty_descendant(space, heads, space.by_key(key)), image, budget, file)
