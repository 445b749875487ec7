"""`lgp bench op` and `lgp bench step`: what is checked, counted and refused."""

import json
import math
from dataclasses import replace

import pytest
import torch
from run_helpers import Lgp, has

from lgp_dist.bench import op, step
from lgp_dist.bench.common import ceilings
from lgp_dist.paths.stitched import PathSpace
from lgp_dist.recipes import tiny

CPU = torch.device("cpu")
CEILINGS = (1e12, 1e11)
"""FLOP/s and bytes/s in place of measured ones: a product in bf16 takes seconds where the processor has no bf16."""


@pytest.mark.slow
def test_op_prints_an_object_for_each_way(lgp: Lgp, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ratios agree with the times of the same run; marks are for a GPU. One case, since compilation is slow."""
    monkeypatch.setattr(op, "CASES", op.CASES[1:2])
    monkeypatch.setattr(op, "LIMITS", {"bf16": op.LIMITS["bf16"]})
    monkeypatch.setattr(op, "ceilings", lambda *_: CEILINGS)
    result = lgp("bench", "op", "--device", "cpu", "--batch", "1", "--repeats", "2", "--json")
    rows = json.loads(result.out)
    assert result.status == 0 and len(rows) == 2 * 3
    for first in range(0, len(rows), 3):
        eager, compiled, fused = rows[first : first + 3]
        assert [row["mode"] for row in (eager, compiled, fused)] == ["reference", "compiled", "fused"]
        assert fused["to_eager"] == pytest.approx(eager["us"] / fused["us"], rel=0.02, abs=2e-3)
        assert fused["to_compiled"] == pytest.approx(compiled["us"] / fused["us"], rel=0.02, abs=2e-3)
        assert fused["of_floor"] == pytest.approx(fused["floor_us"] / fused["us"], rel=0.02, abs=2e-3)
        assert all(row["passes"] is None and row["machine"]["device"] == "cpu" for row in (eager, compiled, fused))


def test_floors_are_the_design_figures() -> None:
    """H100's ceilings, 128 images: 29.2 us forward and 84 us backward of the stitch, in bf16."""
    case = op.Case("stitch_norm", 128 * 197, 192, 768, "bf16")
    floor = case.floor(798e12, 3.0e12)
    assert 1e6 * floor["forward"] == pytest.approx(29.2, abs=0.1)
    assert 1e6 * floor["backward"] == pytest.approx(84, abs=1)
    assert case.flops()["forward"] == 2 * 128 * 197 * 192 * 768


def test_what_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """An operation whose results are off by more than rounding stops the measurement: here a limit none meets."""
    case = op.Case("stitch_norm", 50, 32, 96, "bf16")
    assert 1e-4 < op.check(case, CPU) <= op.LIMITS["bf16"]
    monkeypatch.setitem(op.LIMITS, "bf16", 1e-4)
    with pytest.raises(ArithmeticError, match="from float64"):
        op.check(case, CPU)


@pytest.mark.slow
def test_step_compares_ways_and_shares_the_ancestry(lgp: Lgp, monkeypatch: pytest.MonkeyPatch) -> None:
    """Per-path time with several paths holds a part of the ancestry's."""
    monkeypatch.setattr(step, "PRECISIONS", ("bf16",))
    monkeypatch.setattr(step, "ceilings", lambda *_: CEILINGS)
    small = ("--model.depth=2", "--ancestry.depth=2", "--batch=1", "--repeats=1", "--no-compiled")
    rows = json.loads(lgp("bench", "step", "tiny", *small, "--engine.device=cpu", "--engine.threads=1", "--json").out)
    paths, steps = ([row for row in rows if row["kind"] == kind] for kind in ("path", "step"))
    assert {(row["way"], row["precision"]) for row in paths} == {("eager", "bf16"), ("fused", "bf16")}
    keys = {row["path"] for row in paths}
    assert {"r0.0-1", "r1.0-1"} < keys and any("+" in key for key in keys)
    config = tiny()
    space = PathSpace.from_config(replace(config, model=replace(config.model, depth=2)))
    for row in paths:
        flops = 6 * space.cost(space.by_key(row["path"])).flops
        assert row["tflops"] == pytest.approx(flops / row["ms"] / 1e9, rel=0.02, abs=1e-4)
        assert row["of_peak"] == pytest.approx(row["tflops"] * 1e12 / CEILINGS[0], abs=2e-3)
    assert [(row["way"], row["paths"]) for row in steps[:6]] == [
        (way, count) for way in ("plain", "prepared") for count in step.SHARED
    ]
    one = steps[0]
    assert all(row["to_one"] == pytest.approx(one["ms_per_path"] / row["ms_per_path"], rel=0.02) for row in steps[:6])


def test_ceilings_are_positive() -> None:
    peak, bandwidth = ceilings(CPU, torch.float32)
    assert 0 < peak < math.inf and 0 < bandwidth < math.inf


@pytest.mark.parametrize(
    ("arguments", "pieces"),
    [
        (["op", "--device=cpu", "--repeats=0"], ["--repeats", "0"]),
        (["op", "--device=cpu", "--batch=0"], ["--batch", "0"]),
        (["step", "tiny", "--batch=-1"], ["--batch", "-1"]),
        (["step", "tiny", "--repeats=0"], ["--repeats", "0"]),
        (["step", "tiny", "--finetune.paths-per-batch=3"], ["finetune.paths_per_batch", "3", "accumulate"]),
    ],
)
def test_arguments_that_cannot_be(lgp: Lgp, arguments: list[str], pieces: list[str]) -> None:
    has(lgp("bench", *arguments).sentence, *pieces)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
@pytest.mark.parametrize("arguments", [["op", "--device=cuda"], ["step", "tiny", "--engine.device=cuda"]])
def test_a_gpu_that_is_not_there(lgp: Lgp, arguments: list[str]) -> None:
    has(
        lgp("bench", *arguments).sentence,
        "device",
        "cuda",
        "this machine",
        "--engine.device cpu" if "step" in arguments else "--device cpu",
    )
