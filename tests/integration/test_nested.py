"""Nested widths through the commands: from shards to exported models, and what is refused."""

import json
from pathlib import Path

import pytest
import timm
import torch
from run_helpers import SMALL, Lgp, has
from safetensors.torch import load_file

from lgp_dist.models.nested import NestedPool
from lgp_dist.paths.nested import NestedSpace
from lgp_dist.paths.space import space_of
from lgp_dist.recipes import nested_tiny

pytestmark = pytest.mark.slow  # runs of whole stages

KEPT = (
    "--data.root",
    "--ancestry",
    "--run-dir",
    "--engine",
    "--export",
    "--finetune.train.max",
    "--finetune.train.batch",
)
NESTED = ("nested_tiny", *(option for option in SMALL if option.startswith(KEPT)))
"""`nested_tiny` on what the fixture `place` holds: each stage takes about a second."""
WIDTHS = (24, 48, 72, 96)


def test_from_shards_to_exported_models(place: Path, lgp: Lgp) -> None:
    """Every width is trained, measured and exported as a stock ViT, and the best of two budgets train on alone."""
    done = lgp("run", *NESTED, "--specialise.top=2", "--specialise.epochs=0.5", "--specialise.lr=0.01")
    assert done.status == 0, done.err
    rows = json.loads(Path("run/paths.json").read_text())
    assert [row["key"] for row in rows] == [f"w{width}" for width in WIDTHS]
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert all(line["path"] == ["w96", "w72", "w48", "w24"] for line in lines if line["stage"] == "finetune")
    space, images = space_of(nested_tiny()), torch.randn(2, 1, 28, 28)
    assert isinstance(space, NestedSpace)
    pool = NestedPool.empty(space, space.heads).eval()
    pool.load_state_dict(load_file("run/finetune/pool.safetensors"), strict=True)
    for key in ("w48", "w96"):
        assert lgp("export", "run", "--path", key, "--out", key, "--formats").status == 0
        model = timm.create_model(f"local-dir:{key}", pretrained=True).eval()
        assert model.embed_dim == int(key.removeprefix("w"))
        with torch.no_grad():
            torch.testing.assert_close(model(images), pool(images, space.by_key(key)), rtol=1e-5, atol=1e-6)
    has(lgp("export", "run", "--all", "--out", "all").sentence, "run has nested widths", "--path KEY")
    best = {row["key"] for row in rows}
    alone = {folder.name for folder in Path("run/specialised").iterdir()}
    assert alone and alone <= best
    for key in alone:
        before, after = (
            json.loads(Path(f"run/specialised/{key}/evaluate/{name}.json").read_text())[0]
            for name in ("before", "paths")
        )
        assert before["top1"] == next(row["top1"] for row in rows if row["key"] == key)
        assert f"{key}: top-1 {before['top1']:.2f} % in the pool, {after['top1']:.2f} % trained alone" in done.out
        old, new = (load_file(f"{run}/finetune/pool.safetensors") for run in ("run", f"run/specialised/{key}"))
        assert any(not torch.equal(old[name], new[name]) for name in old)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--finetune.policy=spread",), "set finetune.policy to in_turn"),
        (("--finetune.train.accumulate=8",), "finetune.train.accumulate to 4"),
        (("--model.widths", "24", "48"), "model.widths ends with 48, but model.rows.0.width is 96"),
        (("--model.widths", "20", "96"), "multiples of the row's head width 24"),
        (("--engine.compile=aot_eager",), "engine.compile is aot_eager, which model.widths cannot use"),
        (("--engine.ops=fused",), "model.widths has no fused operations"),
        (("--model.depths", "3"), "leave model.stages and model.depths empty"),
    ],
)
def test_what_does_not_nest_is_refused(place: Path, lgp: Lgp, options: tuple[str, ...], sentence: str) -> None:
    result = lgp("run", *NESTED, *options)
    assert result.status == 2 and sentence in result.sentence
    assert not Path("run").exists()
