"""Rows that are not distilled: what stage distil makes of each source, and what is not run or trained for it."""

import json
from pathlib import Path

import pytest
import torch
from run_helpers import SMALL, Lgp, has, refused
from safetensors.torch import load_file, save_file

from lgp_dist.config.flat import STAGES
from lgp_dist.models.vit import build_vit

pytestmark = pytest.mark.slow  # runs of whole stages

TINY_INPUT = {"image_size": 28, "patch_size": 7, "channels": 1, "num_classes": 10}
LEAST = ("--pool.stitch-init=least_squares", "--pool.samples=16")


def rows(*sources: str) -> tuple[str, ...]:
    """Overrides that give the rows of `tiny` these sources."""
    overrides = []
    for index, source in enumerate(sources):
        overrides += [f"--model.rows.{index}.source={source}", f"--model.rows.{index}.levels=none"]
    return (*overrides, *LEAST)


def row_state(row: int) -> dict[str, torch.Tensor]:
    """One row's ViT as stage distil left it."""
    prefix = f"rows.{row}.vit."
    state = load_file("run/distil/rows.safetensors")
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def fresh(width: int, heads: int, seed: int) -> dict[str, torch.Tensor]:
    """A row of `tiny` with random weights."""
    torch.manual_seed(seed)
    return build_vit(width=width, depth=6, heads=heads, **TINY_INPUT).state_dict()


def test_a_row_from_a_file_is_the_file(lgp: Lgp, place: Path) -> None:
    """The narrow row is what the file holds and is not trained; the wide one is trained with labels, without any
    ancestry, which is not read. Another content is another run."""
    save_file(fresh(32, 1, seed=1), "narrow.safetensors")
    overrides = (*rows("file", "labels"), "--model.rows.0.weights=narrow.safetensors", "--finetune.distil-weight=0")
    assert lgp("run", *SMALL, *overrides, "--ancestry.weights=none.safetensors").status == 0
    assert all((Path("run") / stage / "artifact.json").is_file() == (stage != "ancestry") for stage in STAGES)
    for name, value in load_file("narrow.safetensors").items():
        assert torch.equal(row_state(0)[name], value), name
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    losses = [line for line in lines if line["stage"] == "distil"]
    assert len(losses) == 2 and all(line["loss"] == line["row1/cls"] for line in losses)
    assert not any(name.startswith("row0/") or name == "row1/pred" for line in losses for name in line)
    assert all("pred" not in line for line in lines if line["stage"] == "finetune")
    save_file(fresh(32, 1, seed=2), "narrow.safetensors")
    has(refused(lgp, "pool", *overrides), "model.rows.0.weights was", "--run-dir")


def test_the_tail_is_the_ancestrys_and_random_rows_stay_random(lgp: Lgp, place: Path) -> None:
    """Before the first update: the last three blocks, norm and head are the ancestry's, all else is not."""
    still = ("--distil.train.lr=0", "--distil.train.min-lr=0")
    assert lgp("ancestry", *SMALL).status == 0
    assert lgp("distil", *SMALL, *rows("random", "tail"), *still).status == 0
    ancestry, wide = load_file("ancestry.safetensors"), row_state(1)
    for name, value in wide.items():
        block = int(name.split(".")[1]) if name.startswith("blocks.") else None
        theirs = ancestry[name if block is None else name.replace(f"blocks.{block}.", f"blocks.{block + 6}.")]
        taken = name.startswith(("norm.", "head.")) or block in (3, 4, 5)
        constant = value.unique().numel() == 1
        assert torch.equal(value, theirs) == (taken or constant), name
    facts = json.loads(Path("run/distil/artifact.json").read_text())["facts"]
    assert [row["source"] for row in facts["rows"]] == ["random", "tail"]
    assert row_state(0)["blocks.0.attn.qkv.bias"].abs().max() == 0


def test_where_nothing_is_trained_nothing_is(lgp: Lgp, place: Path) -> None:
    """Random rows: stage distil has no steps, and its settings of training are not checked against the data."""
    assert lgp("distil", *SMALL, *rows("random", "random"), "--finetune.distil-weight=0").status == 0
    artifact = json.loads(Path("run/distil/artifact.json").read_text())
    assert "training" not in artifact["facts"] and artifact["inputs"] == {}
    assert not Path("run/checkpoints").exists() and not Path("run/ancestry").exists()
    assert lgp("ancestry", *SMALL, *rows("random", "random"), "--finetune.distil-weight=0").status == 0
    assert not Path("run/ancestry").exists()


@pytest.mark.parametrize(
    ("overrides", "pieces"),
    [
        (rows("hub", "labels"), ["model.rows.0.source", "model.rows.0.model is empty"]),
        (rows("labels", "file"), ["model.rows.1.source", "model.rows.1.weights is empty"]),
        (("--model.rows.0.source=labels", *LEAST), ["model.rows.0.levels is dense", "source labels"]),
        (rows("labels", "labels")[:-2], ["pool.stitch_init is transformation", "row 0", "least_squares"]),
        (rows("tail", "labels"), ["model.rows.0.source is tail", "width 32 and 1", "96 and 3"]),
        ((*rows("file", "labels"), "--model.rows.0.weights=gone"), ["gone", "cannot be read"]),
    ],
)
def test_sources_that_do_not_fit_are_refused(
    lgp: Lgp, place: Path, overrides: tuple[str, ...], pieces: list[str]
) -> None:
    has(refused(lgp, "distil", *overrides), *pieces)


@pytest.mark.parametrize(
    ("model", "pieces"),
    [
        ("no_such_vit", ["model.rows.0.model is 'no_such_vit'", "timm does not have"]),
        ("resnet18", ["model.rows.0.model resnet18", "plain ViT"]),
        ("vit_small_patch14_reg4_dinov2", ["model.rows.0.model vit_small_patch14_reg4_dinov2", "plain ViT"]),
        ("vit_tiny_patch16_224", ["model.rows.0.model vit_tiny_patch16_224", "has width 192, 3 heads and 12 blocks"]),
    ],
)
def test_anchors_that_are_no_rows_are_refused(lgp: Lgp, place: Path, model: str, pieces: list[str]) -> None:
    overrides = (*rows("hub", "labels"), f"--model.rows.0.model={model}", "--finetune.distil-weight=0")
    has(refused(lgp, "distil", *overrides), *pieces)


@pytest.mark.parametrize(
    ("tensor", "shape"), [("blocks.0.ls1.gamma", (16,)), ("pos_embed", (1, 32, 32))], ids=["layer scale", "positions"]
)
def test_weights_that_cannot_be_adapted_are_refused(lgp: Lgp, place: Path, tensor: str, shape: tuple[int, ...]) -> None:
    """A layer scale of another width; positions of images that are not square."""
    save_file(fresh(32, 1, seed=1) | {tensor: torch.ones(shape)}, "narrow.safetensors")
    overrides = (*rows("file", "random"), "--model.rows.0.weights=narrow.safetensors", "--finetune.distil-weight=0")
    has(refused(lgp, "distil", *overrides), "narrow.safetensors does not fit the recipe's row 0", tensor)


def test_the_ancestry_as_the_wide_row_of_full_depth(lgp: Lgp, place: Path) -> None:
    """36 paths of rows of 12 blocks; the wide row before fine-tuning has the ancestry's accuracy, and the narrow one,
    which starts from the ancestry's channels, is distilled."""
    whole = ("--model.depth=12", "--model.rows.0.start=ancestry", "--pool.stitch-init=least_squares")
    wide = ("--model.rows.1.source=file", "--model.rows.1.weights=ancestry.safetensors", "--model.rows.1.levels=none")
    for stage in ("ancestry", "distil", "pool"):
        done = lgp(stage, *SMALL, *whole, *wide, "--pool.samples=16")
        assert done.status == 0, done.err
    facts = json.loads(Path("run/pool/artifact.json").read_text())["facts"]
    assert facts["paths"] == 36 and facts["stitches"] == 11
    narrow, widest = json.loads(Path("run/distil/artifact.json").read_text())["facts"]["rows"]
    ancestry = json.loads(Path("run/ancestry/artifact.json").read_text())["facts"]
    assert (widest["source"], widest["top1"]) == ("file", ancestry["top1"]) and narrow["source"] == "distil"


def test_weights_of_other_makes(lgp: Lgp, place: Path) -> None:
    """Prefixes of wrapped modules are left out, and the log says so; a pickle is not opened, and the sentence has the
    lines that convert it; weights that are not finite are refused."""
    state = load_file("ancestry.safetensors")
    wrapped = {f"module._orig_mod.{name}": value for name, value in state.items()}
    save_file(wrapped, "wrapped.safetensors")
    done = lgp("ancestry", *SMALL, "--ancestry.weights=wrapped.safetensors")
    assert done.status == 0
    has(done.err, "the prefix module. of all its names is left out", "the prefix _orig_mod.")
    made = load_file("run/ancestry/ancestry.safetensors")
    assert all(torch.equal(made[name], value) for name, value in state.items())
    torch.save(state, "weights.pth")
    pickled = lgp("ancestry", *SMALL, "--ancestry.weights=weights.pth", "--run-dir=second")
    has(pickled.sentence, "weights.pth is a pickle of PyTorch", "weights_only=True", "save_file")
    save_file(state | {"norm.bias": torch.full_like(state["norm.bias"], torch.nan)}, "nan.safetensors")
    broken = lgp("ancestry", *SMALL, "--ancestry.weights=nan.safetensors", "--run-dir=third")
    has(broken.sentence, "nan.safetensors has values in norm.bias that are not finite")
    assert pickled.status == broken.status == 2
