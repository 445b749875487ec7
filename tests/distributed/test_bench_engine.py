"""`lgp bench engine` counts what the schedule says it must."""

import json
import os
import subprocess
from typing import Any

import pytest
from exact_launch import ROOT, command
from run_helpers import LIMIT_S

pytestmark = pytest.mark.slow  # launches of several ranks

SMALL = ("--rounds=1", "--steps=2", "--finetune.train.batch-size=4", "--engine.device=cpu")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str, str], dict[str, Any]]:
    """Objects by engine, reduction and policy."""
    found = {}
    for number, (engine, *more) in enumerate([("zero2",), ("zero2", "--engine.reduction=union"), ("zero3",), ("ddp",)]):
        out = tmp_path_factory.mktemp("bench") / f"{number}.json"
        launch = command(2, deepspeed=engine != "ddp") + ([] if engine == "ddp" else ["--zero_stage", engine[-1]])
        call = [*launch, "-m", "lgp_dist", "bench", "engine", "tiny_paper", "--out", str(out), *SMALL, *more]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(call, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT_S)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "balanced" in done.stdout
        for row in json.loads(out.read_text()):
            found[row["engine"], row["reduction"], row["policy"]] = row
    return found


def gradients(row: dict[str, Any]) -> int:
    """Bytes of gradients that a rank gives away; some operations add a few numbers (norms) of their own."""
    return row["bytes"].get("all_reduce", 0) + row["bytes"].get("reduce_scatter_tensor", 0)


@pytest.mark.parametrize("policy", ["shared", "independent", "balanced"])
def test_the_union_spares_what_no_rank_used(rows: dict[tuple[str, str, str], dict[str, Any]], policy: str) -> None:
    every, union = rows["zero2", "all", policy], rows["zero2", "union", policy]
    assert gradients(every) == pytest.approx(every["bytes_weights"], rel=1e-3)
    assert gradients(every) - gradients(union) == pytest.approx(every["bytes_unused"], rel=1e-3)
    assert 0 < every["bytes_unused"] < every["bytes_weights"]


@pytest.mark.parametrize("engine", ["zero3", "ddp"])
def test_other_engines_send_every_gradient(rows: dict[tuple[str, str, str], dict[str, Any]], engine: str) -> None:
    row = rows[engine, "all", "independent"]
    assert gradients(row) == pytest.approx(row["bytes_weights"], rel=1e-3)


def test_zero3_never_holds_more_than_a_unit(rows: dict[tuple[str, str, str], dict[str, Any]]) -> None:
    row = rows["zero3", "all", "independent"]
    assert row["units"] == 1 and row["elements"] == row["largest_unit"] < row["bytes_weights"] / 4
    assert row["commit"] == rows["ddp", "all", "shared"]["commit"] and row["peak_mb"] > 0
