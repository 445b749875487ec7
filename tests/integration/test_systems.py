"""The systems that the method is compared with, from shards to an exported descendant; their teachers and anchors."""

import json
import re
from pathlib import Path

import huggingface_hub.constants
import pytest
import timm
import torch
from run_helpers import PLAIN, SMALL, Lgp, has, refused
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import checkpoint_filter_fn

from lgp_dist.config.flat import STAGES
from lgp_dist.errors import UserError
from lgp_dist.models.descendant import load_descendant
from lgp_dist.models.row_start import take_tail
from lgp_dist.models.vit import build_vit
from lgp_dist.paths.stitched import PathSpace
from lgp_dist.recipes import snnet_v2_tiny, tiny
from lgp_dist.run.metrics import read_lines, read_metrics

pytestmark = pytest.mark.slow  # runs of whole stages

HUB = "timm/test_vit.r160_in1k"
ANCHOR = (
    *("--data.image-size=32", "--model.patch-size=16", "--data.channels=3", "--data.num-classes=1000"),
    *("--data.mean", "0.5", "0.5", "0.5", "--data.std", "0.5", "0.5", "0.5"),
    *("--model.rows.0.source=hub", "--model.rows.0.model=test_vit", "--model.rows.0.levels=none"),
    *("--model.rows.0.width=64", "--model.rows.0.heads=2"),
    *("--model.rows.1.source=random", "--model.rows.1.levels=none"),
    *("--model.rows.0.start=random", "--model.rows.1.start=random"),
    *("--pool.stitch-init=random", "--finetune.distil-weight=0"),
)
"""A pool whose narrow row is timm's smallest ViT from the hub."""


def small(recipe: str, *more: str) -> tuple[str, ...]:
    """A recipe of the sample on what the fixture `place` holds, each stage of about a second."""
    return (recipe, *(option for option in SMALL[1:] if option not in PLAIN), "--pool.samples=16", *more)


POOL = [path.key for path in PathSpace.from_config(tiny()).paths]
SYSTEMS = {
    "tiny": POOL,
    "snnet_tiny": POOL,
    "snnet_v2_tiny": [path.key for path in PathSpace.from_config(snnet_v2_tiny()).paths],
    "vanilla_tiny": ["r0.0-5"],
    "scratch_tiny": ["r0.0-3+r1.4-5"],
    "sws_tiny": ["d3", "d4", "d5", "d6"],
    "nested_tiny": ["w24", "w48", "w72", "w96"],
}
"""Recipes and the models that each gives."""
UNTAUGHT = ("scratch_tiny", "snnet_v2_tiny")
"""Those that have no ancestry."""


def test_every_system_from_shards_to_export_and_in_one_report(lgp: Lgp, place: Path) -> None:
    """Each runs through the same stages, measures what it trains, and ends with a model that loads and a report; one
    report has them all, next to a result file of SN-Net's authors."""
    for recipe, keys in SYSTEMS.items():
        run = Path(recipe)
        call = ("run", *small(recipe, f"--run-dir={run}"))
        done = lgp(*call)
        assert done.status == 0, done.err
        needed = [stage for stage in STAGES if stage != "ancestry" or recipe not in UNTAUGHT]
        assert sorted(path.parent.name for path in run.glob("*/artifact.json")) == sorted(needed)
        measured = json.loads((run / "paths.json").read_text())
        assert sorted(row["key"] for row in measured) == sorted(keys)
        assert all(key in done.out for key in keys) and (run / "report.html").is_file()
        config = json.loads((run / "export/config.json").read_text())
        if recipe in ("sws_tiny", "nested_tiny"):
            model = timm.create_model(f"local-dir:{run}/export", pretrained=True)
        else:
            model = load_descendant(config, load_file(run / "export/model.safetensors"))
            assert config["lgp"]["path"] in keys
        assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
        trained = {key for line in read_lines(run / "metrics.jsonl") for key in line.get("path", ())}
        assert trained <= set(keys)
        again = lgp(*call)
        assert again.status == 0 and again.err.count("skipped") == len(STAGES)
    Path("stitches.txt").write_text(
        json.dumps({"cfg_id": 0, "flops": 1258411200, "params": 5717416, "acc1": 71.0}) + "\n"
    )
    done = lgp("report", *SYSTEMS, "--snnet", "stitches.txt", "--out", "all")
    assert done.status == 0, done.err
    lines = [line for line in done.out.splitlines() if line.startswith("| ")][2:]
    assert [line.split("|")[1].strip() for line in lines] == [*SYSTEMS, "stitches"]
    for line, (recipe, keys) in zip(lines, SYSTEMS.items(), strict=False):
        top1 = [row["top1"] for row in json.loads(Path(recipe, "paths.json").read_text())]
        has(line, f" {len(keys)} ", f"{sum(top1) / len(top1):.2f}")
    assert (
        Path("all/compare.png").read_bytes().startswith(b"\x89PNG") and Path("all/compare.md").read_text() in done.out
    )


def test_only_what_is_trained_can_be_exported(lgp: Lgp, place: Path) -> None:
    sentence = lgp("export", *small("scratch_tiny", "--export.path=r1.0-5")).sentence
    has(sentence, "export.path is 'r1.0-5'", "finetune.only")


def test_the_teacher_may_be_no_vit_where_its_logits_are_enough(lgp: Lgp, place: Path) -> None:
    """A ResNet from a file teaches by hard labels; where blocks are compared, or it is to be trained, it is refused."""
    torch.manual_seed(0)
    teacher = timm.create_model("test_resnet", in_chans=1, num_classes=10)
    save_file(teacher.state_dict(), "teacher.safetensors")
    overrides = ("--ancestry.model=test_resnet", "--ancestry.weights=teacher.safetensors")
    taught = small("snnet_tiny", *overrides, "--finetune.distil=hard", "--evaluate.batch-size=8")
    done = lgp("run", *taught)
    assert done.status == 0, done.err
    lines = list(read_metrics(Path("run/metrics.jsonl"), "finetune"))
    assert len(lines) == 2 and all(line["loss"] == pytest.approx(line["cls"] + line["pred"]) for line in lines)
    has(refused(lgp, "ancestry", *overrides, "--run-dir=other", run="other"), "test_resnet has no blocks of attention")
    trained = small(
        "snnet_tiny", overrides[0], "--ancestry.source=train", "--ancestry.train.batch-size=8", "--run-dir=third"
    )
    has(lgp("ancestry", *trained).sentence, "test_resnet is not a plain ViT")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's local cache with weights of timm's test_vit, offline; the file that it holds."""
    folder = tmp_path / "hub" / f"models--{HUB.replace('/', '--')}"
    snapshot = folder / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0" * 40)
    torch.manual_seed(3)
    vit = build_vit(image_size=32, patch_size=16, channels=3, num_classes=1000, width=64, depth=6, heads=2)
    save_file(vit.state_dict(), snapshot / "model.safetensors")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return snapshot / "model.safetensors"


def test_an_anchor_from_the_hub_is_the_hubs(lgp: Lgp, place: Path, hub: Path) -> None:
    """The row holds the hub's tensors, and its record says where they are from."""
    done = lgp("distil", *SMALL, *ANCHOR)
    assert done.status == 0, done.err
    rows = load_file("run/distil/rows.safetensors")
    for name, value in load_file(hub).items():
        assert torch.equal(rows[f"rows.0.vit.{name}"], value), name
    row = json.loads(Path("run/distil/artifact.json").read_text())["facts"]["rows"][0]
    assert row["weights"] == HUB and re.fullmatch("[0-9a-f]{64}", row["weights_sha256"])


def test_an_anchor_for_other_images_is_adapted_as_timm_does(lgp: Lgp, place: Path, hub: Path) -> None:
    """Another size of images and of patches: positions and patch embedding are resampled, and the log says so."""
    other = ("--data.image-size=48", "--model.patch-size=12", "--model.rows.0.model=test_vit.r160_in1k")
    done = lgp("distil", *SMALL, *ANCHOR, *other)
    assert done.status == 0, done.err
    has(done.err, "row 0: timm's functions adapted to its input: ", "patch_embed.proj.weight", "pos_embed")
    theirs = timm.create_model("test_vit", img_size=48, patch_size=12)
    state = checkpoint_filter_fn(load_file(hub), theirs)
    rows = load_file("run/distil/rows.safetensors")
    for name, value in state.items():
        assert torch.equal(rows[f"rows.0.vit.{name}"], value), name
    assert state["pos_embed"].shape == (1, 17, 64) and state["patch_embed.proj.weight"].shape[-1] == 12


@pytest.mark.parametrize(
    ("overrides", "pieces"),
    [
        (("--model.rows.0.heads=4",), ["model.rows.0.model test_vit has width 64, 2 heads", "row has 64, 4"]),
        (("--model.depth=5",), ["2 heads and 6 blocks", "64, 2 and 5"]),
        (
            ("--data.std", "0.5", "0.5", "0.4"),
            ["timm's weights of test_vit (model.rows.0) expect data.std", "set --data.std 0.5 0.5 0.5"],
        ),
        (("--data.num-classes=10",), ["does not fit the recipe's row 0", "head.bias", "data.num_classes"]),
    ],
)
def test_anchors_of_another_shape_are_refused(
    lgp: Lgp, place: Path, hub: Path, overrides: tuple[str, ...], pieces: list[str]
) -> None:
    has(refused(lgp, "distil", *ANCHOR, *overrides), *pieces)


@pytest.mark.parametrize(("depth", "heads", "fits"), [(3, 4, True), (2, 4, False), (4, 2, False)])
def test_a_tail_needs_the_shape_of_timms_ancestry(depth: int, heads: int, fits: bool) -> None:
    """Its width and heads, and three blocks at least, which are copied."""
    shape = {"image_size": 28, "patch_size": 7, "channels": 1, "num_classes": 10, "width": 16}
    row, ancestry = build_vit(depth=depth, heads=heads, **shape), build_vit(depth=5, heads=4, **shape)
    if fits:
        take_tail(row, ancestry, "model.rows.0")
        assert all(torch.equal(row.blocks[i].mlp.fc1.weight, ancestry.blocks[i + 2].mlp.fc1.weight) for i in range(3))
        return
    with pytest.raises(UserError) as caught:
        take_tail(row, ancestry, "model.rows.0")
    has(str(caught.value), "model.rows.0.source is tail", f"16, {heads} heads and {depth} blocks", "16, 4 and 5")
