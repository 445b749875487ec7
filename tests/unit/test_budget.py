"""What a budget says, which path meets it, and latencies that are kept."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from run_helpers import has
from torch import Tensor, nn

from lgp_dist.config.budget import Amount, Budget, parse_amount
from lgp_dist.errors import UserError
from lgp_dist.export.choice import choose
from lgp_dist.export.latency import LatencyFile, LatencySetup, measure, with_latencies
from lgp_dist.run.latency_table import with_table

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


GIVEN = {"a": 1.5, "b": 20.0, "c": 3.0, "d": 4.0}
"""Latencies of ROWS that were measured elsewhere."""


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("table.csv", "key,latency_ms\na,1.5\nb,2e1\nc,3\nd,4.0\n"),
        ("table.csv", '\ufefflatency_ms,device,"key"\r\n4,phone,d\r\n3,phone,c\r\n20,phone,b\r\n1.5,phone,a'),
        ("table.json", json.dumps(GIVEN)),
        ("table.json", json.dumps([{"key": key, "latency_ms": value, "low": 1} for key, value in GIVEN.items()])),
    ],
    ids=["csv", "other columns", "object", "list"],
)
def test_latencies_measured_elsewhere(name: str, text: str, tmp_path: Path) -> None:
    """They replace those of this machine, and decide what a budget gives."""
    (tmp_path / name).write_text(text, encoding="utf-8")
    rows = with_table(ROWS, tmp_path / name)
    assert [(row["key"], row["latency_ms"]) for row in rows] == list(GIVEN.items())
    assert all(name in row["latency_on"] and row["top1"] == old["top1"] for row, old in zip(rows, ROWS, strict=True))
    assert [choose(each, Budget(max_latency_ms=4.0))["key"] for each in (ROWS, rows)] == ["b", "d"]


HEADER = "key,latency_ms\n"


@pytest.mark.parametrize(
    ("name", "text", "pieces"),
    [
        ("t.csv", HEADER + "a,1\nb,2\nc,3\n", ["t.csv lacks 1 of 4 paths, such as d"]),
        ("t.csv", HEADER + "a,1\nb,-2\nc,3\nd,4\n", ["t.csv has '-2' for b", "above 0"]),
        ("t.csv", HEADER + "a,1\nb,0\n", ["'0' for b"]),
        ("t.csv", HEADER + "a,fast\n", ["'fast' for a"]),
        ("t.csv", HEADER + "a,nan\n", ["'nan' for a"]),
        ("t.csv", HEADER + "a,inf\n", ["'inf' for a"]),
        ("t.csv", HEADER + "a\n", ["None for a"]),
        ("t.csv", HEADER + "a,1\na,1\n", ["t.csv names a twice"]),
        ("t.csv", HEADER + "aa,1\n", ["t.csv names 'aa'", "the nearest is a"]),
        ("t.csv", "a,1\nb,2\n", ["t.csv is no table of latencies", "the columns key and latency_ms"]),
        ("t.csv", HEADER + 'a,"1', ["t.csv is no table"]),
        ("t.csv", "", ["t.csv is no table", "it is empty"]),
        ("t.csv", "key;latency_ms\na;1\n", ["its columns are key;latency_ms"]),
        ("t.csv", "key,latency_ms,latency_ms\na,1,2\n", ["its columns are key, latency_ms, latency_ms"]),
        ("t.csv", HEADER + "a,3,5\n", ["a has more fields than there are columns"]),
        ("t.csv", HEADER + "a,1_0\n", ["'1_0' for a"]),
        ("t.json", "[" * 100_000, ["t.json is no table"]),
        ("t.json", '{"a": 1, "a": 2}', ["t.json names a twice"]),
        ("t.json", '{"a": true}', ["True for a"]),
        ("t.json", f'{{"a": {10**400}}}', ["0 for a: write milliseconds"]),
        ("t.json", '{"a": [1]}', ["[1] for a"]),
        ("t.json", '{"a": 1', ["t.json is no table", "JSON with milliseconds by key"]),
        ("t.json", "[1, 2]", ["t.json is no table"]),
        ("t.json", "3", ["t.json is no table"]),
        ("t.json", '[{"key": {"a": 1}, "latency_ms": 1}]', ["is no evaluated path"]),
        ("t.json", '[{"key": "a"}]', ["t.json is no table", "'latency_ms'"]),
        ("t.csv", None, ["t.csv cannot be read", "No such file"]),
    ],
)
def test_a_bad_table_is_refused(name: str, text: str | None, pieces: list[str], tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as refusal:
        with_table(ROWS, tmp_path / name)
    has(str(refusal.value), *pieces)
    assert str(refusal.value).endswith(".") and "\n" not in str(refusal.value)
