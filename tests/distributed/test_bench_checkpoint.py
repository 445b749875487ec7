"""`lgp bench checkpoint` on two ranks: its bytes are those of the state, and nothing but the figures is left."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from exact_launch import ROOT, command
from run_helpers import LIMIT_S, Lgp

from lgp_dist.paths.stitched import PathSpace
from lgp_dist.recipes import tiny

pytestmark = pytest.mark.slow  # launches of several ranks

SMALL = ("--rounds=1", "--steps=2", "--finetune.train.batch-size=4", "--engine.device=cpu", "--checkpoint.every=10")


def test_figures_agree_with_each_other(tmp_path: Path) -> None:
    call = [*command(2, deepspeed=True), "-m", "lgp_dist", "bench", "checkpoint", "tiny_paper"]
    call += ["--out", str(tmp_path / "bench.json"), *SMALL]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(call, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stderr[-3000:]
    assert os.listdir(tmp_path) == ["bench.json"] and "background" in done.stdout
    background, wait = json.loads((tmp_path / "bench.json").read_text())
    assert (background["mode"], wait["mode"]) == ("background", "wait")
    parameters = PathSpace.from_config(tiny()).stored_params
    for row in (background, wait):
        assert (row["engine"], row["ranks"], row["parameters"]) == ("zero1", 2, parameters)
        assert 12 * parameters < row["bytes"] < 12.5 * parameters, "weights and two moments, fp32, once"
        assert row["cost_ms"] == pytest.approx(row["stall_ms"] + row["slower_ms"], abs=0.02)
        assert row["share"] == pytest.approx(row["cost_ms"] / (10 * row["step_ms"]), rel=1e-2, abs=1e-5)
        assert row["bytes_per_s"] == pytest.approx(row["bytes"] / row["publish_s"], rel=1e-2)
    assert wait["steps_under_way"] == wait["slower_ms"] == 0
    assert wait["publish_s"] >= wait["stall_ms"] / 1000 - 1e-3, "nothing is left to publish after the wait"


def test_what_is_in_the_way_stays(lgp: Lgp, tmp_path: Path) -> None:
    folder = tmp_path / "bench.json.checkpoints"
    folder.mkdir()
    sentence = lgp("bench", "checkpoint", "tiny_paper", "--out", tmp_path / "bench.json", *SMALL).sentence
    assert sentence == f"{folder} is there already: remove it, or choose another --out."
    assert os.listdir(tmp_path) == [folder.name]
