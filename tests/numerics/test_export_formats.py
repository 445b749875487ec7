"""Every way to load an exported descendant gives the logits of its path."""

import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path as File

import onnx
import onnxruntime
import pytest
import timm
import torch
from numerics_cases import BARE, BOTH_WAYS, EVERY_PATH, HEADS, ONE, THREE, TWO, UNEQUAL, path_id, shake
from run_helpers import LIMIT_S
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import lgp_dist.timm_models  # noqa: F401
from lgp_dist.config.run_config import DataConfig, ExportConfig
from lgp_dist.errors import UserError
from lgp_dist.export import modeling_descendant
from lgp_dist.export.folder import Exported, largest_difference, write_folder
from lgp_dist.export.formats import FORMATS, wanted
from lgp_dist.export.onnx_paths import open_path
from lgp_dist.export.pool_folder import pool_table, write_pool_folder
from lgp_dist.files import replace_folder
from lgp_dist.models.descendant import descendant_from_path, exported_config, timm_config, vit_arguments
from lgp_dist.models.pool import LearngenePool
from lgp_dist.paths.depths import DepthSpace
from lgp_dist.paths.path import Path, Space
from lgp_dist.paths.stitched import PathSpace
from lgp_dist.protocols import Batch

DATA = DataConfig(
    image_size=28,
    channels=1,
    num_classes=10,
    mean=(0.2856,),
    std=(0.3527,),
    interpolation="bilinear",
    crop_pct=0.95,
)
NAMES = tuple(f"class {number}" for number in range(10))
FACTS = {
    "key": "r0.0-3",
    "params": 1,
    "flops": 2,
    "top1": 50.0,
    "top5": 90.0,
    "latency_ms": 1.0,
    "latency_low_ms": 0.5,
    "latency_high_ms": 2.0,
    "latency_on": "cpu",
}


@cache
def pool_of(space: PathSpace) -> LearngenePool:
    torch.manual_seed(7)
    pool = LearngenePool.empty(space, HEADS[space])
    shake(pool)
    return pool.eval()


def images(count: int, seed: int = 3) -> Tensor:
    return torch.randn(count, 1, 28, 28, generator=torch.Generator().manual_seed(seed))


def batches(count: int) -> list[Batch]:
    labels = torch.arange(count) % 10
    return [Batch(images(count), labels, torch.ones(count))]


def written(space: PathSpace, path: Path, folder: File) -> nn.Module:
    """The path's model, written to a folder as config.json and model.safetensors."""
    model = descendant_from_path(pool_of(space), HEADS[space], path)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(timm_config(space, HEADS[space], path, DATA, NAMES)))
    save_file(model.state_dict(), folder / "model.safetensors")
    return model


@pytest.mark.slow
@pytest.mark.parametrize(("space", "path"), EVERY_PATH, ids=path_id)
def test_timm_loads_every_path(space: PathSpace, path: Path, tmp_path: File) -> None:
    """Bit for bit, with the run's own normalisation; a new number of classes gives a new head and keeps the rest."""
    model = written(space, path, tmp_path)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(loaded(images(3)), pool_of(space)(images(3), path))
    resolved = timm.data.resolve_model_data_config(loaded)
    assert (tuple(resolved["mean"]), tuple(resolved["std"])) == (DATA.mean, DATA.std)
    assert (tuple(resolved["input_size"]), resolved["interpolation"]) == ((1, 28, 28), "bilinear")
    assert (resolved["crop_pct"], resolved["crop_mode"]) == (0.95, "center")
    assert tuple(loaded.pretrained_cfg["label_names"]) == NAMES
    other = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=3).eval()
    assert other(images(2)).shape == (2, 3) and other.num_features == space.widths[path.last_row]
    with torch.no_grad():
        assert torch.equal(other.forward_features(images(2)), model.forward_features(images(2)))


def test_stitched_paths_refuse_other_inputs(tmp_path: File) -> None:
    written(TWO, TWO.by_key("r0.0-1+r1.2-3"), tmp_path)
    with pytest.raises(ValueError, match="lgp_descendant takes 1 x 28 x 28 images .* leave these out"):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True, img_size=56)


@pytest.mark.slow
def test_plain_torch_file_needs_torch_alone(tmp_path: File) -> None:
    """The exported file, in a process that cannot import timm or this package, for every path of both pools."""
    for index, (space, path) in enumerate(EVERY_PATH):
        folder = tmp_path / str(index)
        model = written(space, path, folder)
        FORMATS["torch"].write(model, images(2), folder)
        with torch.no_grad():
            save_file({"images": images(4, index), "logits": pool_of(space)(images(4, index), path)}, folder / "x.st")
    script = """
import sys
for name in ("timm", "lgp_dist", "torchvision", "einops"):
    sys.modules[name] = None
sys.path.insert(0, "0")
import torch
from modeling_descendant import load
from safetensors.torch import load_file
worst = 0.0
for folder in sys.argv[1:]:
    given = load_file(folder + "/x.st")
    with torch.no_grad():
        worst = max(worst, float((load(folder)(given["images"]) - given["logits"]).abs().max()))
print(worst)
"""
    folders = [str(index) for index in range(len(EVERY_PATH))]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", script, *folders]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) <= FORMATS["torch"].bound == 1e-5


def test_plain_torch_file_notices_other_tensors(tmp_path: File) -> None:
    written(TWO, TWO.paths[0], tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    save_file({**state, "blocks.0.ls1.gamma": torch.ones(16)}, tmp_path / "model.safetensors")
    with pytest.raises(RuntimeError, match="low.0.ls1.gamma"):
        modeling_descendant.load(tmp_path)


def test_plain_torch_file_without_the_final_norm(tmp_path: File) -> None:
    """As SN-Net's released code runs stitched paths: the norm is stored and not applied."""
    model = written(TWO, TWO.by_key("r0.0-1+r1.2-3"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["lgp"]["shape"]["final_norm"] = False
    (tmp_path / "config.json").write_text(json.dumps(config))
    normed = model.head.norm
    with torch.no_grad():
        before = model(images(3))
        model.head.norm = nn.Identity()
        assert (modeling_descendant.load(tmp_path)(images(3)) - model(images(3))).abs().max() <= 1e-5
        assert (model(images(3)) - before).abs().max() > 1e-2 and normed.weight.numel() == 32


def test_mean_of_patches_without_class_token(tmp_path: File) -> None:
    """A plain ViT of another kind: its arguments and its shape are read from the model."""
    torch.manual_seed(1)
    arguments = {"img_size": 28, "patch_size": 7, "in_chans": 1, "num_classes": 10, "embed_dim": 24, "depth": 3}
    model = VisionTransformer(**arguments, num_heads=2, class_token=False, global_pool="avg").eval()
    shake(model)
    config = exported_config(model, DATA, vit_arguments(model), {"path": "any"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    with torch.no_grad():
        expected = model(images(3))
        assert torch.equal(timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()(images(3)), expected)
        assert (modeling_descendant.load(tmp_path)(images(3)) - expected).abs().max() <= 1e-5


@pytest.mark.slow
def test_transformers_loads_a_row(tmp_path: File, monkeypatch: pytest.MonkeyPatch) -> None:
    """As transformers' own class for timm's models, with the names of the labels, without a network."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    transformers = pytest.importorskip("transformers")
    model = written(TWO, TWO.paths[1], tmp_path)
    loaded = transformers.AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(images(3)).logits, model(images(3)))
    assert tuple(loaded.config.id2label[number] for number in range(10)) == NAMES
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    assert tuple(processor.data_config["mean"]) == DATA.mean


@pytest.mark.slow
@pytest.mark.parametrize(
    ("space", "key"),
    [(TWO, "r1.0-3"), (TWO, "r0.0-1+r1.2-3"), (THREE, "r1.0-1+r2.1-2"), (BOTH_WAYS, "r1.0-1+r0.1-1+r1.4-5")],
    ids=path_id,
)
def test_folder_of_all_formats(space: PathSpace, key: str, tmp_path: File) -> None:
    """ONNX and torch.export take any batch; what verify.json says of the largest differences is so."""
    path = space.by_key(key)
    model = descendant_from_path(pool_of(space), HEADS[space], path)
    config = timm_config(space, HEADS[space], path, DATA)

    def reference(batch: Tensor) -> Tensor:
        return pool_of(space)(batch, path)

    exported = Exported(model, config, FACTS | {"key": key}, {"pool": "0123abcd"})
    verdict = write_folder(tmp_path, exported, ExportConfig(images=8, int8_images=30), batches, reference)
    assert json.loads((tmp_path / "verify.json").read_text()) == verdict
    assert {name: found["file"] for name, found in verdict["formats"].items()} == {
        "timm": "model.safetensors",
        "torch": "modeling_descendant.py",
        "pt2": "model.pt2",
        "onnx": "model.onnx",
        "int8": "model.int8.onnx",
    }
    assert verdict["formats"]["timm"]["largest_difference"] == 0
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    program = torch.export.load(tmp_path / "model.pt2").module()
    with torch.no_grad():
        for count in (1, 2, 5, 33):
            batch = images(count, count)
            logits = torch.from_numpy(session.run(None, {"images": batch.numpy()})[0])
            assert 0 < (logits - reference(batch)).abs().max() <= 1e-4, "another library's arithmetic, within its bound"
            assert (program(batch) - reference(batch)).abs().max() <= 1e-5
        session = onnxruntime.InferenceSession(tmp_path / "model.int8.onnx", providers=["CPUExecutionProvider"])
        (given,) = batches(30)
        int8 = torch.from_numpy(session.run(None, {"images": given.images.numpy()})[0]).argmax(-1)
        exact = reference(given.images).argmax(-1)
    top1, top1_path = (100 * float((found == given.targets).float().mean()) for found in (int8, exact))
    assert verdict["int8"]["top1"] == pytest.approx(top1) and verdict["int8"]["top1_path"] == pytest.approx(top1_path)
    assert verdict["int8"]["loss"] == pytest.approx(top1_path - top1)
    assert (tmp_path / "model.int8.onnx").stat().st_size < (tmp_path / "model.onnx").stat().st_size
    card = (tmp_path / "README.md").read_text()
    assert all(text in card for text in (f"`{key}`", "0123abcd", "onnxruntime", "torch.export.load", "local-dir:"))
    assert ("lgp_dist.timm_models" in card) == (not path.is_row) == ("transformers" not in card)


DEPTHS = DepthSpace(16, (1, 2, 2, 1), (4, 7), image_size=28, patch_size=7, channels=1, num_classes=10)


def whole_pool(space: Space, heads: tuple[int, ...], folder: File, rank: int = 0, formats=()) -> LearngenePool:
    """A pool, written as a folder with all paths; the accuracies of these are their places."""
    torch.manual_seed(7)
    pool = LearngenePool.empty(space, heads, rank).eval()
    shake(pool)
    about = {"top5": 90.0, "latency_on": "a phone"}
    rows = [
        {**space.describe(path), "top1": float(place), "latency_ms": 9.0 - place, **about}
        for place, path in enumerate(space.paths)
    ]
    table = pool_table(space, heads, rows, timm_config(space, heads, space.paths[0], DATA, NAMES), {"pool": "0123abcd"})
    write_pool_folder(folder, pool, table, ExportConfig(images=4, formats=formats), batches)
    return pool


@pytest.mark.slow
@pytest.mark.parametrize(
    ("space", "heads", "rank"),
    [
        *((space, HEADS[space], 0) for space in (TWO, THREE, BARE, UNEQUAL, BOTH_WAYS)),
        (TWO, (2, 4), 3),
        (DEPTHS, (4, 4), 0),
    ],
    ids=["two", "three", "bare", "unequal", "both ways", "low rank", "depths"],
)
def test_a_folder_is_every_path(space: Space, heads: tuple[int, ...], rank: int, tmp_path: File) -> None:
    """Bit for bit, after the folder is gone: switching loads nothing. Each weight is stored once; models of several
    depths share none."""
    pool = whole_pool(space, heads, tmp_path, rank)
    stored = load_file(tmp_path / "model.safetensors").values()
    once = space.stored_params if isinstance(space, PathSpace) else sum(space.cost(path).params for path in space.paths)
    assert sum(tensor.numel() for tensor in stored) == once
    plain = modeling_descendant.load_pool(tmp_path)
    for file in tmp_path.iterdir():
        file.unlink()
    with torch.no_grad():
        for path in (*space.paths, *reversed(space.paths)):
            assert plain.select(path.key)["params"] == space.cost(path).params
            assert torch.equal(plain(images(3)), pool(images(3), path)), path.key


def test_a_pool_selects_within_limits(tmp_path: File) -> None:
    """As sorting finds it; a selection that cannot be leaves the one before."""
    whole_pool(TWO, HEADS[TWO], tmp_path)
    pool = modeling_descendant.load_pool(tmp_path)
    rows = json.loads((tmp_path / "paths.json").read_text())["paths"]
    by_accuracy = sorted(rows, key=lambda row: -row["top1"])
    assert pool.selected == by_accuracy[0]
    middle = {field: sorted(row[field] for row in rows)[len(rows) // 2] for field in ("params", "flops", "latency_ms")}
    for limits in ({"params"}, {"flops"}, {"latency_ms"}, {"params", "latency_ms"}):
        expected = next(row for row in by_accuracy if all(row[field] <= middle[field] for field in limits))
        assert pool.select(**{f"max_{field}": middle[field] for field in limits}) == expected == pool.selected
    kept = pool.selected
    with pytest.raises(ValueError, match="No path is within .*'params': 5.*the least of all paths: params [1-9]"):
        pool.select(max_params=5)
    with pytest.raises(KeyError, match="r0.0-9"):
        pool.select("r0.0-9")
    with pytest.raises(ValueError, match="a key or limits"):
        pool.select("r0.0-3", max_flops=1e9)
    assert pool.selected is kept


@pytest.mark.slow
@pytest.mark.parametrize("space", [UNEQUAL, BOTH_WAYS], ids=path_id)
def test_graphs_share_the_weights_of_a_folder(space: PathSpace, tmp_path: File) -> None:
    """A graph holds no weights: each of its tensors is the bytes of one in model.safetensors, and each tensor of that
    file is some graph's but for norms that no path applies. Any batch, and all sessions open together."""
    pool = whole_pool(space, HEADS[space], tmp_path, formats=("pt2", "onnx", "int8"))
    content, seen = (tmp_path / "model.safetensors").read_bytes(), set[str]()
    weights = load_file(tmp_path / "model.safetensors")
    for path in space.paths:
        model = onnx.load(tmp_path / f"{path.key}.onnx", load_external_data=False)
        for tensor in model.graph.initializer:
            place = {entry.key: entry.value for entry in tensor.external_data}
            assert place["location"] == "model.safetensors" and tuple(tensor.dims) == weights[tensor.name].shape
            stored = content[int(place["offset"]) : int(place["offset"]) + int(place["length"])]
            assert stored == weights[tensor.name].numpy().tobytes()
            seen.add(tensor.name)
        constants = [node.attribute[0].t for node in model.graph.node if node.op_type == "Constant"]
        assert all(len(tensor.raw_data) <= 64 for tensor in constants)
    assert seen == weights.keys()
    sessions = {path: open_path(tmp_path, path.key, threads=1) for path in space.paths}
    with torch.no_grad():
        for count in (1, 5):
            for path, session in sessions.items():
                logits = torch.from_numpy(session.run(["logits"], {"images": images(count).numpy()})[0])
                assert (logits - pool(images(count), path)).abs().max() <= 1e-4
    verdict = json.loads((tmp_path / "verify.json").read_text())["formats"]
    assert verdict["torch"]["largest_difference"] == 0 < verdict["onnx"]["largest_difference"] <= 1e-4
    card = (tmp_path / "README.md").read_text()
    assert all(f"| `{path.key}` | {space.cost(path).params:,} |" in card for path in space.paths)
    assert all(text in card for text in ("0123abcd", "load_pool", "open_path", "a phone", "verify.json"))


@pytest.mark.slow
def test_a_folder_of_all_paths_needs_no_package(tmp_path: File) -> None:
    """Its code in processes that cannot import this package: the pool without timm, the graphs without torch too."""
    pool = whole_pool(ONE, HEADS[ONE], tmp_path, formats=("onnx",))
    with torch.no_grad():
        save_file({"images": images(4), "logits": pool(images(4), ONE.paths[0])}, tmp_path / "x.st")
    script = """
import sys
for name in sys.argv[1].split(","):
    sys.modules[name] = None
import torch
from modeling_descendant import load_pool
from safetensors.torch import load_file
given = load_file("x.st")
with torch.no_grad():
    print(torch.equal(load_pool(".")(given["images"]), given["logits"]))
"""
    without = "import sys, runpy\nfor name in sys.argv.pop(1).split(','):\n    sys.modules[name] = None\n"
    table = f"{without}runpy.run_path('onnx_paths.py', run_name='__main__')"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    said = []
    for arguments in (
        (script, "timm,lgp_dist,torchvision,einops"),
        (table, "torch,timm,lgp_dist,safetensors,onnx", "2"),
    ):
        command = [sys.executable, "-c", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=LIMIT_S)
        assert done.returncode == 0, done.stderr
        said.append(done.stdout.splitlines())
    assert said[0] == ["True"]
    assert said[1][0].startswith("key,latency_ms,") and said[1][1].startswith("r0.0-2,") and len(said[1]) == 2


def test_a_pool_that_differs_is_not_exported(tmp_path: File) -> None:
    pool = whole_pool(TWO, HEADS[TWO], tmp_path)
    table = json.loads((tmp_path / "paths.json").read_text())
    table["paths"][3]["segments"][1][1] += 1  # one block less
    with pytest.raises(UserError, match=re.escape(f"modeling_descendant.py of {table['paths'][3]['key']} differs")):
        write_pool_folder(tmp_path, pool, table, ExportConfig(images=4, formats=()), batches)


def test_an_export_that_differs_leaves_nothing(tmp_path: File) -> None:
    """The path's weights change while it is exported: the folder that was there before stays as it was."""
    path = TWO.by_key("r0.0-1+r1.2-3")
    model = descendant_from_path(pool_of(TWO), HEADS[TWO], path)
    exported = Exported(model, timm_config(TWO, HEADS[TWO], path, DATA), FACTS, {})
    other = descendant_from_path(pool_of(TWO), HEADS[TWO], path)
    with torch.no_grad():
        other.head.head.bias[3] += 1e-6
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "kept").write_text("before")
    settings = ExportConfig(images=4, formats=())
    with pytest.raises(UserError, match=r"model.safetensors of r0.0-3 differs from its path by .*e-0\d, more than 0"):
        replace_folder(
            tmp_path / "export", lambda folder: write_folder(folder, exported, settings, batches, other.forward)
        )
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == ["export", "export/kept"]


@pytest.mark.parametrize("broken", [0, 5])
def test_differences_that_hide_are_found(broken: int) -> None:
    """In one image of a batch, or only where an image comes alone; NaN counts as the largest."""
    given = batches(6)

    def spoiled(batch: Tensor) -> Tensor:
        logits = batch.flatten(1)[:, :4].clone()
        logits[broken if len(batch) > broken else 0, 2] = torch.nan
        return logits

    def right(batch: Tensor) -> Tensor:
        return batch.flatten(1)[:, :4]

    def alone(batch: Tensor) -> Tensor:
        return right(batch) + 0.5 * (len(batch) == 1)

    assert not largest_difference(spoiled, right, given) <= 1e9
    assert largest_difference(alone, right, given) == pytest.approx(0.5)
    assert largest_difference(right, right, given) == 0.0


def test_without_the_extra_one_sentence_says_what_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert wanted(("pt2", "onnx", "int8")) == (["timm", "torch", "pt2", "onnx", "int8"], "")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    names, sentence = wanted(("pt2", "onnx", "int8"))
    assert names == ["timm", "torch", "pt2"]
    assert "model.onnx and model.int8.onnx left out because onnxruntime is not installed" in sentence
    assert "pip install 'lgp_dist[onnx]'" in sentence
    assert wanted(("pt2",)) == (["timm", "torch", "pt2"], "")
    with pytest.raises(UserError, match="int8 without onnx"):
        wanted(("int8",))
