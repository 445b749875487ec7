"""Latency of a model on this machine, and the file that keeps what was measured."""

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
from lgp_dist.run.provenance import processor

NAME = "latency.json"
"""The file in a run directory."""

REPEATS, WARM_UP = 50, 10
"""Measurements that count, and those before them that do not."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class LatencySetup:
    """Where and how a latency is measured; figures of two places are not compared."""

    device: str
    """cpu or cuda."""
    batch: int
    """Images of a forward."""
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
        """This machine, with the device, batch and dtype of a budget; UserError where there is no such device."""
        if budget.device == "cuda" and not torch.cuda.is_available():
            raise UserError("The budget's device is cuda, but torch finds no GPU on this machine: choose cpu.")
        chip = torch.cuda.get_device_name() if budget.device == "cuda" else processor()
        machine = f"{platform.node()}, {chip}"
        threads = torch.get_num_threads()
        return cls(budget.device, budget.batch, budget.dtype, machine, threads, torch.__version__)

    @property
    def words(self) -> str:
        """In one line."""
        threads = f", {self.threads} thread(s)" if self.device == "cpu" else ""
        return f"{self.device}, batch {self.batch}, {self.dtype}{threads}, torch {self.torch}, {self.machine}"


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one forward of a whole batch."""

    median_ms: float
    low_ms: float
    """A tenth of the measurements are below."""
    high_ms: float
    """A tenth of the measurements are above."""
    repeats: int
    """Measurements, after the warm-up."""


@torch.inference_mode()
def measure(model: nn.Module, image: tuple[int, int, int], place: LatencySetup, repeats: int = REPEATS) -> Latency:
    """Times forwards of zeros [batch, *image] one by one. image: channels, height, width. Moves the model to the
    place's device and dtype."""
    device, dtype = torch.device(place.device), DTYPES[place.dtype]
    model, images = model.to(device, dtype).eval(), torch.zeros(place.batch, *image, device=device, dtype=dtype)
    times = []
    for _ in range(WARM_UP + repeats):
        start = time.perf_counter()
        model(images)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(1000 * (time.perf_counter() - start))
    kept = sorted(times[WARM_UP:])
    tenths = statistics.quantiles(kept, n=10, method="inclusive")
    return Latency(*(round(value, 5) for value in (statistics.median(kept), tenths[0], tenths[-1])), repeats)


@dataclass(frozen=True)
class LatencyFile:
    """Latencies of the paths of one run, measured once for each place."""

    path: Path
    """RUN/latency.json."""
    of: str
    """What the models' shape depends on, such as the id of the trained pool; figures of another are dropped."""

    def latency(self, key: str, place: LatencySetup, measured: Callable[[], Latency]) -> Latency:
        """What the file has of a path at a place; else what is measured, which it then keeps."""
        kept = self._read()
        name = hashlib.sha256(json.dumps(asdict(place), sort_keys=True).encode()).hexdigest()[:12]
        entry = kept["places"].setdefault(name, {"place": asdict(place), "paths": {}})
        if key not in entry["paths"]:
            entry["paths"][key] = asdict(measured())
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
            raise UserError(f"{self.path} is damaged ({error}): remove it, and latencies are measured again.") from None


def with_latencies(
    rows: Iterable[dict[str, Any]],
    build: Callable[[str], nn.Module],
    image: tuple[int, int, int],
    budget: Budget,
    file: LatencyFile,
) -> list[dict[str, Any]]:
    """The rows with latency_ms, latency_low_ms, latency_high_ms and latency_on for a budget's device, batch, dtype.

    build: a path's key to a model of its shape; weights do not matter. image: channels, height, width.
    """
    place, timed = LatencySetup.here(budget), []
    for row in rows:
        found = file.latency(row["key"], place, lambda key=row["key"]: measure(build(key), image, place))
        spread = {"latency_low_ms": found.low_ms, "latency_high_ms": found.high_ms, "latency_on": place.words}
        timed.append({**row, "latency_ms": found.median_ms, **spread})
    return timed


def with_path_latencies(
    rows: Iterable[dict[str, Any]], space: Space, heads: tuple[int, ...], budget: Budget, file: LatencyFile
) -> list[dict[str, Any]]:
    """`with_latencies` of paths of a pool. heads: attention heads of each row."""
    image = (space.channels, space.image_size, space.image_size)
    return with_latencies(rows, lambda key: empty_descendant(space, heads, space.by_key(key)), image, budget, file)
