"""What the command line offers, and that it answers at once."""

import json
import re
import subprocess
import sys

import pytest
from run_helpers import LIMIT_S, Lgp, has

from lgp_dist.cli import SUMMARIES
from lgp_dist.config.flat import STAGES
from lgp_dist.recipes import RECIPES

FIELDS = ["key", "low", "high", "low_row", "high_row", "stitch", "params", "params_paper", "flops", "cfg_id"]
FIELDS += ["top1", "top5"]
HEAVY = {"torch", "torchvision", "timm", "deepspeed", "accelerate", "transformers", "matplotlib", "webdataset"}


def test_help_answers_without_torch() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "lgp_dist", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=True)
    imported = set(re.findall(r"\| +([\w.]+)$", done.stderr, re.MULTILINE))
    assert "tyro" in imported and not imported & HEAVY
    assert all(name in done.stdout for name in (*STAGES, "run", "paths", "shards", "bench", "study", "report"))


def test_every_stage_has_a_summary(lgp: Lgp) -> None:
    assert list(SUMMARIES) == list(STAGES)
    shown = " ".join(re.sub(r"[│╭╮╰╯─]", " ", lgp("--help").out).split())
    assert all(summary in shown for summary in SUMMARIES.values())


@pytest.mark.parametrize("stage", [*STAGES, "run", "paths"])
def test_every_stage_takes_every_recipe(lgp: Lgp, stage: str) -> None:
    listed = lgp(stage, "--help")
    assert listed.status == 0 and all(name in listed.out for name in RECIPES)
    for name, recipe in RECIPES.items():
        shown = lgp(stage, name, "--help")
        assert shown.status == 0 and "--distil.alpha" in shown.out and "--run-dir" in shown.out
        assert (recipe.__doc__ or "").split(".")[0][:40] in " ".join(shown.out.split())


@pytest.mark.parametrize("action", ["sampler", "paths"])
def test_bench_has_its_actions(lgp: Lgp, action: str) -> None:
    shown = lgp("bench", action, "--help")
    assert shown.status == 0 and f"bench {action}" in shown.out


@pytest.mark.parametrize("action", ["build", "index", "verify", "show", "reshard"])
def test_shards_has_its_actions(lgp: Lgp, action: str) -> None:
    shown = lgp("shards", action, "--help")
    assert shown.status == 0 and f"shards {action}" in shown.out


@pytest.mark.parametrize(("recipe", "count"), [("tiny", 18), ("pool12", 18), ("pool18", 27)])
def test_paths_as_json(lgp: Lgp, recipe: str, count: int) -> None:
    result = lgp("paths", recipe, "--json")
    rows = json.loads(result.out)
    assert (result.status, result.err, len(rows)) == (0, "", count)
    assert all(list(row) == FIELDS for row in rows)
    assert len({row["key"] for row in rows}) == count
    assert [row["flops"] for row in rows] == sorted(row["flops"] for row in rows)
    assert all(row["top1"] is None and row["top5"] is None for row in rows)


def test_paths_as_text_has_the_published_numbers(lgp: Lgp) -> None:
    """METHOD, section 3: parameters as the paper counts them, and the pool's size."""
    lines = lgp("paths", "pool12").out.splitlines()
    paper = {line.split()[-2] for line in lines[1:-1]}
    assert {"3.05", "10.38", "10.82", "17.02", "17.47", "23.66", "30.31", "36.95", "44.04"} <= paper
    assert lines[-1] == "18 paths, 5 stitch layers, 47.83 M stored"


def test_overrides_reach_the_paths(lgp: Lgp) -> None:
    assert len(json.loads(lgp("paths", "pool12", "--json", "--model.depth", "4").out)) == 12
    result = lgp("paths", "pool12", "--model.rows.0.width", "800")
    has(result.sentence, "model.rows has widths [800, 768]", "narrow to wide")
