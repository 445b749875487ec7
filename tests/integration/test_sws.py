"""SWS through the commands: from shards to an exported model, and what is refused."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from run_helpers import PLAIN, SMALL, Lgp, eventually, has
from safetensors.torch import load_file, save_file

from lgp_dist.config.flat import STAGES
from lgp_dist.export.modeling_descendant import load_pool
from lgp_dist.models.pool import LearngenePool
from lgp_dist.paths.space import space_of
from lgp_dist.recipes import sws_tiny

pytestmark = pytest.mark.slow  # runs of whole stages

ROOT = Path(__file__).parents[2]
SWS = ("sws_tiny", *(option for option in SMALL[1:] if option not in PLAIN))
"""`sws_tiny` on what the fixture `place` holds: each stage takes about a second."""
DEPTHS = (3, 4, 5, 6)


def test_from_shards_to_an_exported_model(place: Path, lgp: Lgp) -> None:
    """The model of the auxiliary net's own depth is as good as the net before fine-tuning, and another after; the
    exported one loads with timm alone and gives the same logits."""
    done = lgp("run", *(setting for setting in SWS if setting != "--evaluate.no-before"))
    assert done.status == 0, done.err
    rows = json.loads(Path("run/paths.json").read_text())
    assert [row["key"] for row in rows] == [f"d{depth}" for depth in DEPTHS]
    before = {row["key"]: row for row in json.loads(Path("run/evaluate/before.json").read_text())}
    distilled = json.loads(Path("run/distil/artifact.json").read_text())["facts"]["rows"][0]
    assert before["d6"]["top1"] == round(distilled["top1"], 4) and before["d6"]["top5"] == round(distilled["top5"], 4)
    assert json.loads(Path("run/pool/artifact.json").read_text())["facts"]["stored_params"] == rows[0]["params"]
    start, end = load_file("run/pool/pool.safetensors"), load_file("run/finetune/pool.safetensors")
    assert all(not torch.equal(start[name], end[name]) for name in start)
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    tuned = [line for line in lines if line["stage"] == "finetune"]
    assert all(sorted(line["path"]) == [row["key"] for row in rows] for line in tuned) and len(tuned) == 2
    assert "d6" in Path("run/report.html").read_text()
    key = json.loads(Path("run/descend/descendant.json").read_text())["key"]
    model = timm.create_model("local-dir:run/export", pretrained=True).eval()
    assert len(model.blocks) == int(key.removeprefix("d")) and model.cls_token is None
    assert sum(p.numel() for p in model.parameters()) == next(row["params"] for row in rows if row["key"] == key)
    space, images = space_of(sws_tiny()), torch.randn(2, 1, 28, 28)
    pool = LearngenePool.empty(space, (3,) * len(DEPTHS)).eval()
    pool.load_state_dict(end, strict=True)
    assert torch.equal(model(images), pool(images, space.by_key(key)))
    assert lgp("export", "run", "--all", "--out", "all", "--formats").status == 0
    every = load_pool("all")
    for path in space.paths:
        every.select(path.key)
        assert torch.equal(every(images), pool(images, path))


def test_trained_together_is_trained_alone(place: Path, lgp: Lgp) -> None:
    """A model's weights are the same bits whether the other depths train too or not."""
    assert lgp("pool", *SWS).status == 2, "distil comes first"
    for stage in ("ancestry", "distil", "pool"):
        assert lgp(stage, *SWS).status == 0
    shutil.copytree("run", "alone")
    assert lgp("finetune", *SWS).status == 0
    single = ("--finetune.only=d4", "--finetune.paths-per-batch=1", "--finetune.train.accumulate=1")
    assert lgp("finetune", *SWS, "--run-dir=alone", *single).status == 0
    together, alone = (load_file(f"{run}/finetune/pool.safetensors") for run in ("run", "alone"))
    start = load_file("run/pool/pool.safetensors")
    marks = {name: ".rows.1." in name or "row1_" in name for name in start}
    assert any(marks.values())
    for name, mine in marks.items():
        assert torch.equal(alone[name], together[name] if mine else start[name])
        assert not torch.equal(together[name], start[name])


@pytest.mark.skipif(not os.environ.get("LGP_LONG_TESTS"), reason="takes half a minute: LGP_LONG_TESTS=1")
def test_a_killed_run_goes_on_as_if_it_had_not_been(place: Path, lgp: Lgp) -> None:
    """Killed in distillation and again in fine-tuning, after a checkpoint: the same bits."""
    steps = [f"--{stage}.train.max-steps=30" for stage in ("distil", "finetune")]
    assert all(lgp(stage, *SWS, *steps).status == 0 for stage in STAGES[:4])
    files = ("distil/rows.safetensors", "finetune/pool.safetensors")
    expected = [load_file(f"run/{file}") for file in files]
    shutil.rmtree("run")
    for stage in ("distil", "finetune"):
        killed_after_a_checkpoint(stage, *SWS, *steps, "--checkpoint.every=2")
    assert lgp("finetune", *SWS, *steps).status == 0
    log = Path("run/log.txt").read_text()
    assert all(f"{stage}: resumes from step " in log for stage in ("distil", "finetune"))
    for file, weights in zip(files, expected, strict=True):
        found = load_file(f"run/{file}")
        assert found.keys() == weights.keys() and all(torch.equal(found[name], weights[name]) for name in found)


def killed_after_a_checkpoint(stage: str, *settings: str) -> None:
    """Runs all stages in a process of their own and kills it when this stage has saved and goes on."""
    checkpoints = Path("run/checkpoints") / stage
    with subprocess.Popen(
        [sys.executable, "-m", "lgp_dist", "run", *settings],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        eventually(lambda: any(checkpoints.glob("step-*")) or process.poll() is not None, "a checkpoint comes")
        assert process.poll() is None, process.communicate()[1][-3000:]
        process.kill()
    assert not Path(f"run/{stage}/artifact.json").exists()


def test_the_teacher_may_be_any_classifier(place: Path, lgp: Lgp) -> None:
    """Only its logits are used: a ResNet of timm in place of a ViT."""
    torch.manual_seed(0)
    teacher = timm.create_model("test_resnet", in_chans=1, num_classes=10)
    save_file(teacher.state_dict(), "teacher.safetensors")
    other = ("--ancestry.model=test_resnet", "--ancestry.weights=teacher.safetensors")
    for stage in ("ancestry", "distil"):
        done = lgp(stage, *SWS, *other)
        assert done.status == 0, done.err
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert all(line["loss"] == line["row0/pred"] != line["row0/cls"] for line in lines) and len(lines) == 2


def test_other_depths_need_no_other_distillation(place: Path, lgp: Lgp) -> None:
    """Models of any depth come from what is stored; another number of heads needs another auxiliary net."""
    for stage in ("ancestry", "distil"):
        assert lgp(stage, *SWS).status == 0
    other = ("--model.depths", "6", "9", "--finetune.paths-per-batch=2", "--finetune.train.accumulate=2")
    done = lgp("pool", *SWS, *other)
    assert done.status == 0 and "2 paths" in done.err
    sentence = lgp("pool", *SWS, "--model.rows.0.heads=4", "--force").sentence
    has(sentence, "distil", "model.rows.0.heads was 3, now 4")


@pytest.mark.parametrize(
    ("settings", "pieces"),
    [
        (("--model.depth=7",), ("model.depth is 7", "model.stages [2, 2, 2]", "6 layers")),
        (("--model.depths", "2", "4"), ("model.depths is [2, 4]", "rise from 3")),
        (("--model.depths", "5", "4"), ("model.depths is [5, 4]", "rise")),
        (("--model.stages", "0", "6"), ("model.stages is [0, 6]", "1 or more")),
        (("--model.depths", "4", "6"), ("finetune.paths_per_batch is 4", "set both to 2")),
        (("--model.rows.0.levels=last",), ("model.rows.0", "levels last", "levels none")),
        (("--model.rows.0.source=file",), ("model.rows.0", "source file")),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("--") else "",
)
def test_settings_that_do_not_fit_are_named(
    place: Path, lgp: Lgp, settings: tuple[str, ...], pieces: tuple[str, ...]
) -> None:
    has(lgp("distil", *SWS, *settings).sentence, *pieces)
    assert not Path("run").exists()


def test_depths_without_stages_are_named(place: Path, lgp: Lgp) -> None:
    has(lgp("distil", *SMALL, "--model.depths", "3", "6").sentence, "model.depths", "model.stages", "both")


def test_stored_sizes_are_printed(lgp: Lgp) -> None:
    """9.63 and 36.95 M, as published."""
    for recipe, size in (("sws_small", "9.63"), ("sws_base", "36.95")):
        assert f"4 paths, 0 stitch layers, {size} M stored" in lgp("paths", recipe).out
