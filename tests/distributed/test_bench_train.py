"""`lgp bench train` and `lgp bench peers` on two ranks."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from exact_launch import ROOT, command
from run_helpers import LIMIT_S

from lgp_dist.bench.loop.phases import PHASES

pytestmark = pytest.mark.slow  # launches of several ranks

SMALL = ("--rounds=1", "--steps=2", "--finetune.train.batch-size=4", "--engine.device=cpu")


def bench(name: str, folder: Path, deepspeed: bool, *more: str) -> list[dict[str, Any]]:
    """What a benchmark writes on two ranks."""
    out = folder / "out.json"
    call = [*command(2, deepspeed), "-m", "lgp_dist", "bench", name, "tiny_paper", *SMALL, *more]
    call += ["--out", str(out), "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(call, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(out.read_text())
    printed = done.stdout[done.stdout.index("[\n") :]  # DeepSpeed logs there before
    assert json.loads(printed) == rows, "rank 0 alone prints, what the file holds"
    return rows


@pytest.mark.parametrize(("deepspeed", "engine"), [(True, "zero1"), (False, "ddp")])
def test_exchange_is_transfer_and_waiting(tmp_path: Path, deepspeed: bool, engine: str) -> None:
    (row,) = bench("train", tmp_path, deepspeed, "--finetune.train.accumulate=2")
    assert (row["engine"], row["ranks"], row["micro_steps"]) == (engine, 2, 2)
    assert all(row[f"{name}_ms"] >= 0 for name in PHASES)
    assert 0 < row["transfer_ms"] <= row["exchange_ms"]
    assert row["transfer_ms"] + row["skew_ms"] == pytest.approx(row["exchange_ms"], abs=2e-3)


def test_peers_draw_on_every_rank_and_bare_is_for_one(tmp_path: Path) -> None:
    """Two paths of every batch count twice; SN-Net's way draws as the policy `independent`, one path a step."""
    more = ("--workers=1", "--finetune.train.accumulate=2", "--finetune.paths-per-batch=2")
    snnet, timm = bench("peers", tmp_path, False, *more)
    assert (snnet["peer"], timm["peer"]) == ("snnet", "timm")
    assert snnet["images_per_s"] > 0 and snnet["peer_images_per_s"] > 0 and snnet["ranks"] == timm["ranks"] == 2
    assert snnet["paths_per_batch"] == 2 and timm["paths_per_batch"] == 1 and timm["gmacs"] == timm["peer_gmacs"]
