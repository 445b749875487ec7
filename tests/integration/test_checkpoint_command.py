"""`lgp checkpoint` on a real run's checkpoints, and what is made of the weights that it takes out of them."""

import csv
import io
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from run_helpers import SMALL, Lgp, call_main, has, index_of, overwrite, refused, snapshot
from safetensors.torch import load_file
from torch import Tensor

from lgp_dist.models.descendant import load_descendant
from lgp_dist.models.pool import LearngenePool
from lgp_dist.paths.stitched import PathSpace
from lgp_dist.recipes import tiny

FIRST = Path("run/checkpoints/finetune/step-00000001")
OPTIONS = ("--finetune.train.max-steps=3", "--checkpoint.every=1")


@pytest.fixture(scope="module")
def saved(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`finished` with checkpoints of steps 1 and 2 of stage finetune. Not to be changed."""
    folder = tmp_path_factory.mktemp("saved") / "place"
    shutil.copytree(finished, folder)
    before = Path.cwd()
    os.chdir(folder)
    try:
        assert call_main(("finetune", *SMALL, *OPTIONS, "--force")) == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def here(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of it as the current folder."""
    shutil.copytree(saved, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    yield tmp_path / "place"
    monkeypatch.undo()


def pool_of(weights: dict[str, Tensor]) -> LearngenePool:
    """The recipe's pool with these weights."""
    config = tiny()
    pool = LearngenePool.empty(PathSpace.from_config(config), tuple(row.heads for row in config.model.rows))
    pool.load_state_dict(weights, strict=True)
    return pool.eval()


def test_images() -> tuple[Tensor, Tensor]:
    """All test images as the recipe normalises them, read by Pillow alone, and their labels."""
    data, index = tiny().data, index_of("test")
    images, labels = [], []
    for sample in range(len(index)):
        with (index.root / index.shards[index.shard[sample]]).open("rb") as file:
            file.seek(int(index.offset[sample]))
            image = Image.open(io.BytesIO(file.read(int(index.size[sample]))))
            images.append(torch.tensor(list(image.getdata()), dtype=torch.float32).view(1, 28, 28) / 255)
        labels.append(int(index.label[sample]))
    return (torch.stack(images) - data.mean[0]) / data.std[0], torch.tensor(labels)


test_images.__test__ = False  # type: ignore[attr-defined]


def whole_weights(checkpoint: Path) -> dict[str, Tensor]:
    """A one-rank checkpoint's weights, from its file alone."""
    shapes = json.loads((checkpoint / "manifest.json").read_text())["shapes"]
    found = load_file(checkpoint / "rank-00000.safetensors")
    return {name: found[f"weight/{name}@0"].view(shape) for name, shape in shapes.items()}


@pytest.mark.slow
def test_weights_of_a_checkpoint_are_evaluated_and_exported(lgp: Lgp, here: Path) -> None:
    """Taken out, taken over by finetune, measured and exported: all as the checkpoint's own tensors say."""
    assert lgp("checkpoint", "consolidate", FIRST, "--out", "weights.safetensors").status == 0
    expected, found = whole_weights(FIRST), load_file("weights.safetensors")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    for stage in ("finetune", "evaluate", "descend", "export"):
        done = lgp(stage, *SMALL, "--finetune.weights=weights.safetensors", "--force")
        assert done.status == 0, done.err
    taken = load_file("run/finetune/pool.safetensors")
    assert all(torch.equal(taken[name], expected[name]) for name in expected)

    pool, (images, labels) = pool_of(expected), test_images()
    with torch.no_grad():
        top1 = {path.key: (pool(images, path).argmax(-1) == labels).float().mean() for path in pool.space.paths}
        rows = {
            row["key"]: float(row["top1"]) for row in csv.DictReader(Path("run/paths.csv").read_text().splitlines())
        }
        assert rows.keys() == top1.keys()
        assert all(abs(rows[key] - 100 * float(value)) <= 100 / len(labels) + 1e-3 for key, value in top1.items())
        config = json.loads(Path("run/export/config.json").read_text())
        model = load_descendant(config, load_file("run/export/model.safetensors")).eval()
        chosen = json.loads(Path("run/descend/artifact.json").read_text())["facts"]["key"]
        path = next(path for path in pool.space.paths if path.key == chosen)
        assert float((model(images) - pool(images, path)).abs().max()) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "pieces"),
    [
        ("nowhere.safetensors", ["nowhere.safetensors", "No such file"]),
        ("ancestry.safetensors", ["ancestry.safetensors does not fit the recipe's pool", "model and data.num_classes"]),
        ("cut.safetensors", ["cut.safetensors is not a whole safetensors file"]),
        (f"{FIRST}/rank-00000.safetensors", ["rank-00000.safetensors does not fit the recipe's pool"]),
    ],
)
def test_wrong_weights_are_refused(lgp: Lgp, here: Path, file: str, pieces: list[str]) -> None:
    Path("cut.safetensors").write_bytes(Path("run/finetune/pool.safetensors").read_bytes()[:-100])
    has(refused(lgp, "finetune", "--force", f"--finetune.weights={file}"), *pieces)


def test_verify_and_show_what_is_whole(lgp: Lgp, here: Path) -> None:
    before = snapshot(Path("run"))
    for path in (FIRST, FIRST.parent, "run"):
        out = lgp("checkpoint", "verify", path).out
        assert f"{FIRST}: whole, 1 file(s), " in out and out.count("whole") == (1 if path == FIRST else 2)
        shown = lgp("checkpoint", "show", path)
        assert shown.status == 0 and f"{FIRST}: stage finetune, step 1 of 3, written " in shown.out
    (row,) = json.loads(lgp("checkpoint", "show", FIRST, "--json").out)
    assert (row["stage"], row["step"], row["world"], row["data"]["position"]) == ("finetune", 1, 1, 8)
    assert snapshot(Path("run")) == before


@pytest.mark.parametrize("command", ["verify", "show", "consolidate"])
@pytest.mark.parametrize(
    ("path", "piece"),
    [
        ("nowhere", "holds no checkpoint"),
        ("runs", "holds no checkpoint"),
        ("run/checkpoints/finetune/step-00000009", "is not a checkpoint"),
        ("step-00000001", "is damaged (it is not a checkpoint's manifest)"),
    ],
)
def test_missing_and_foreign_folders(lgp: Lgp, here: Path, command: str, path: str, piece: str) -> None:
    """A folder of another program that is called as ours are counts as foreign too."""
    Path("runs").mkdir()
    Path("step-00000001").mkdir()
    Path("step-00000001/manifest.json").write_text('{"format": 1, "state": {}}')
    further = ["--out", "weights.safetensors"] if command == "consolidate" else []
    sentence = lgp("checkpoint", command, path, *further).sentence
    has(sentence, path, "is not a checkpoint" if command == "consolidate" and "holds" in piece else piece)
    assert not list(Path().glob("weights*"))


@pytest.mark.parametrize("command", ["verify", "consolidate"])
@pytest.mark.parametrize("damage", ["lost", "cut", "flipped"])
def test_damage_is_named(lgp: Lgp, here: Path, command: str, damage: str) -> None:
    path = FIRST / "rank-00000.safetensors"
    if damage == "lost":
        path.unlink()
    elif damage == "cut":
        os.truncate(path, path.stat().st_size - 1)
    else:
        overwrite(path, path.stat().st_size // 2, bytes([path.read_bytes()[path.stat().st_size // 2] ^ 1]))
    further = ["--out", "weights.safetensors"] if command == "consolidate" else []
    sentence = lgp("checkpoint", command, FIRST, *further).sentence
    has(sentence, str(path), {"lost": "cannot be read", "cut": "bytes, but its manifest", "flipped": "sha256"}[damage])
    assert not list(Path().glob("weights*"))


@pytest.mark.parametrize(("out", "piece"), [("nowhere/weights", "cannot be written"), ("shards", "is there already")])
def test_consolidate_where_it_cannot(lgp: Lgp, here: Path, out: str, piece: str) -> None:
    before = snapshot(Path())
    has(lgp("checkpoint", "consolidate", FIRST, "--out", out).sentence, out, piece)
    assert snapshot(Path()) == before
