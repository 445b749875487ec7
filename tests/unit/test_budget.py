"""What a budget says, which path meets it, and latencies that are kept."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lgp_dist.config.budget import Amount, Budget, parse_amount
from lgp_dist.errors import UserError
from lgp_dist.export.choice import choose
from lgp_dist.export.latency import LatencyFile, LatencySetup, measure, with_latencies

ROWS: list[dict[str, Any]] = [
    {"key": "a", "params": 100, "flops": 10, "latency_ms": 3.0, "top1": 50.0},
    {"key": "b", "params": 200, "flops": 30, "latency_ms": 2.0, "top1": 60.0},
    {"key": "c", "params": 300, "flops": 20, "latency_ms": 5.0, "top1": 70.0},
    {"key": "d", "params": 400, "flops": 15, "latency_ms": 9.0, "top1": 70.0},
]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("10M", 10_000_000),
        ("2G", 2_000_000_000),
        ("1.5e6", 1_500_000),
        ("0.4k", 400),
        ("3 T", 3e12),
        (".5M", 500_000),
        ("7", 7),
        ("-1M", -1_000_000),
    ],
)
def test_amounts(text: str, value: float) -> None:
    assert parse_amount(text) == value and isinstance(parse_amount(text), Amount)


@pytest.mark.parametrize("text", ["", "M", "10Q", "10MB", "1_0", "nan", "inf", "1e999", "0x10", "10 M M", "ten"])
def test_what_is_no_amount(text: str) -> None:
    with pytest.raises(UserError, match="no amount: write a number such as .* 10M or 2G"):
        parse_amount(text)


@pytest.mark.parametrize(
    ("limits", "key"),
    [
        ({}, "d"),
        ({"max_params": 399}, "c"),
        ({"max_params": 300}, "c"),
        ({"max_params": 299}, "b"),
        ({"max_flops": 29}, "d"),
        ({"max_latency_ms": 2.5}, "b"),
        ({"max_params": 250, "max_flops": 25}, "a"),
        ({"max_params": 350, "max_flops": 25, "max_latency_ms": 5.0}, "c"),
    ],
)
def test_the_best_path_that_meets_all_limits(limits: dict[str, float], key: str) -> None:
    """Of c and d, which are as accurate, the one with fewer FLOPs."""
    assert choose(ROWS, replace(Budget(), **limits))["key"] == key


def test_nearest_where_none_fits() -> None:
    """Nearest by the limit that it misses by the largest factor: a by 2, b by 3."""
    with pytest.raises(UserError) as refusal:
        choose(ROWS, Budget(max_params=Amount(90), max_flops=Amount(10), max_latency_ms=1.5), "--")
    missed = "params 100 over --max-params 90; latency_ms 3 over --max-latency-ms 1.5"
    assert str(refusal.value) == f"No path fits the budget; the nearest is a ({missed}): raise the limit."


class Counted(nn.Module):
    """Says what it was given, and how often."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.seen = nn.Parameter(torch.ones(1)), []

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append((tuple(images.shape), images.dtype))
        return images.mean() * self.weight


@pytest.mark.parametrize(("dtype", "kind"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_latency_of_what_was_asked(dtype: str, kind: torch.dtype) -> None:
    model, place = Counted(), LatencySetup.here(Budget(batch=3, dtype=dtype))  # type: ignore[arg-type]
    found = measure(model, (1, 5, 7), place, repeats=11)
    assert set(model.seen) == {((3, 1, 5, 7), kind)} and len(model.seen) > 11, "warmed up"
    assert 0 < found.low_ms <= found.median_ms <= found.high_ms < math.inf and found.repeats == 11
    assert place.threads == torch.get_num_threads() and place.machine and place.torch == torch.__version__


def test_latencies_are_measured_once_for_each_place(tmp_path: Path) -> None:
    built: list[str] = []

    def build(key: str) -> nn.Module:
        built.append(key)
        return Counted()

    def timed(of: str, **changes: Any) -> list[dict[str, Any]]:
        file = LatencyFile(tmp_path / "latency.json", of)
        rows = [{"key": row["key"]} for row in ROWS[:2]]
        return with_latencies(rows, build, (1, 4, 4), replace(Budget(), **changes), file)

    first = timed("pool")
    assert built == ["a", "b"] and timed("pool") == first and built == ["a", "b"]
    assert all(row["latency_low_ms"] <= row["latency_ms"] <= row["latency_high_ms"] for row in first)
    other = timed("pool", batch=2)
    assert built == ["a", "b"] * 2 and other[0]["latency_on"] != first[0]["latency_on"]
    assert timed("pool") == first and timed("pool", batch=2) == other and built == ["a", "b"] * 2
    timed("another pool")
    assert built == ["a", "b"] * 3
    place = next(iter(json.loads((tmp_path / "latency.json").read_text())["places"].values()))["place"]
    assert {"machine", "torch", "threads", "device", "batch", "dtype"} == set(place)


@pytest.mark.parametrize("content", ["", "[1]", '{"places": {}}', "\udcff"])
def test_damaged_latencies_are_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "latency.json"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match="latency.json is damaged .*: remove it"):
        with_latencies([{"key": "a"}], lambda key: Counted(), (1, 4, 4), Budget(), LatencyFile(path, "pool"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_no_such_device() -> None:
    with pytest.raises(UserError, match="device is cuda, but torch finds no GPU .* choose cpu"):
        LatencySetup.here(Budget(device="cuda"))
