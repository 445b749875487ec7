"""Pretrained models of twelve architectures as the ancestry: a whole run of two steps each."""

import json
from pathlib import Path

import pytest
import timm
import torch
from run_helpers import SMALL, Lgp, has, refused
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.slow  # runs of whole stages

MODELS = {
    "vit_small_patch14_reg4_dinov2": "none",
    "vit_small_patch16_dinov3": "fit",
    "vit_base_patch16_siglip_224": "fit",
    "deit3_small_patch16_224": "pretrained",
    "vit_base_patch16_clip_224": "none",
    "deit_tiny_distilled_patch16_224": "fit",
    "eva02_tiny_patch14_224": "fit",
    "vit_wee_patch16_reg1_gap_256": "pretrained",
    "vit_pe_core_tiny_patch16_384": "none",
    "vit_small_patch16_rope_224": "pretrained",
    "test_vit2": "fit",
    "convnext_atto": "pretrained",
}
"""timm's names, and ancestry.head."""
FEATURES = ("--finetune.feature-weight=1",)
ALONE = ("--model.rows.0.levels=none", "--model.rows.1.levels=none")


def stock(name: str, classes: int, **shape: int) -> None:
    """Random weights of timm's model for RGB images of its own size, as if from the hub, in weights.safetensors."""
    torch.manual_seed(0)
    save_file(timm.create_model(name, num_classes=classes, **shape).state_dict(), "weights.safetensors")


def options(name: str, head: str) -> tuple[str, ...]:
    size = 28 if "patch14" in name else 32
    chosen = (f"--ancestry.model={name}", "--ancestry.weights=weights.safetensors", f"--ancestry.head={head}")
    stitches = ("--pool.stitch-init=least_squares", "--pool.samples=16")
    return (*chosen, *stitches, f"--ancestry.image-size={size}", "--ancestry.head-images=64")


@pytest.mark.parametrize("name", MODELS)
def test_a_run_takes_it(lgp: Lgp, place: Path, name: str) -> None:
    """Weights for RGB images of another size and, where the head is fitted or left out, of other classes."""
    head, is_vit = MODELS[name], name != "convnext_atto"
    stock(name, 10 if head == "pretrained" else 7, **({"img_size": 64 if "16" in name else 56} if is_vit else {}))
    done = lgp("run", *SMALL, *options(name, head), *(FEATURES if is_vit else ALONE))
    assert done.status == 0, done.err
    facts = json.loads(Path("run/ancestry/artifact.json").read_text())["facts"]
    assert ("top1" in facts) == (head != "none")
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    last = {line["stage"]: line for line in lines if "loss" in line}
    teaches = head != "none"
    assert (last["distil"]["row0/pred"] > 0) == teaches if teaches else "row0/pred" not in last["distil"]
    assert (last["distil"].get("row0/block", 0) > 0) == is_vit
    assert (last["finetune"]["pred"] > 0) == teaches


def test_a_fitted_head_knows_the_images(lgp: Lgp, place: Path) -> None:
    """Logistic regression on a random model's features knows its training images; the random head does not."""
    stock("test_vit", 7)
    found = {}
    for head in ("fit", "pretrained"):
        if head == "pretrained":
            stock("test_vit", 10)
        run = (f"--run-dir={head}", "--data.val-split=train", "--ancestry.image-size=32")
        assert lgp("ancestry", *SMALL, *options("test_vit", head), *run).status == 0
        found[head] = json.loads((Path(head) / "ancestry/artifact.json").read_text())["facts"]["top1"]
    assert found["fit"] > 80 > 40 > found["pretrained"]
    made = load_file("fit/ancestry/ancestry.safetensors")
    assert made["head.weight"].shape == (10, 64)


def test_what_is_said_before_anything_trains(lgp: Lgp, place: Path) -> None:
    """`lgp ancestry RECIPE --check` fetches no weights and writes nothing; it reads those of a file."""
    filed = (*SMALL, *options("vit_small_patch14_reg4_dinov2", "none"))
    has(lgp("ancestry", *filed, *FEATURES, "--check").sentence, "weights.safetensors cannot be read")
    named = (*filed, "--ancestry.source=hub")
    done = lgp("ancestry", *named, *FEATURES, "--check")
    assert done.status == 0 and not Path("run").exists()
    has(
        done.out,
        "vit_small_patch14_reg4_dinov2 (timm's VisionTransformer)",
        "images of 28 pixels become 28 pixels of mean",
        "a class token, 4 others, 2 x 2 patches",
        "rows' 4 x 4",
        "it teaches by its blocks",
        "L_pred is left out",
    )
    assert lgp("distil", *named, "--check").sentence.startswith("--check is for lgp ancestry")


@pytest.mark.parametrize(
    ("name", "overrides", "pieces"),
    [
        ("convnext_atto", (), ["convnext_atto has no blocks", "levels of all rows none"]),
        ("vit_small_patch16_dinov3", ("--ancestry.image-size=28",), ["patches of 16", "ancestry.image_size to 32"]),
        ("test_vit2", ("--model.rows.0.start=ancestry",), ["plain ViT", "start of all rows to random"]),
        ("test_vit2", ("--ancestry.head=none", "--model.rows.1.levels=none"), ["model.rows.1 has no levels"]),
        (
            "vit_small_patch16_dinov3",
            ("--ancestry.image-size=16",),
            ["do not make a grid", "ancestry.image_size to 32"],
        ),
        ("test_vit.no_such_tag", ("--ancestry.source=hub",), ["test_vit.no_such_tag", "no_such_tag"]),
        ("test_vit2", ("--ancestry.mean", "0.5", "0.5"), ["ancestry.mean is (0.5, 0.5)", "each channel"]),
        ("vit_tiny_patch16_224", ("--ancestry.source=hub",), ["1000 classes", "data.num_classes is 10", "fit", "none"]),
    ],
)
def test_what_cannot_be_used_is_refused(
    lgp: Lgp, place: Path, name: str, overrides: tuple[str, ...], pieces: list[str]
) -> None:
    Path("weights.safetensors").touch()
    has(refused(lgp, "ancestry", *options(name, "pretrained"), *overrides), *pieces)
