"""Each layout, built from small files and read back by timm and by webdataset."""

import io
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm.data
import webdataset
from PIL import Image
from run_helpers import LIMIT_S
from shard_helpers import LAYOUTS, WNIDS, image, imagefolder, imagenet, kaggle, parquet, quiet, tar_of
from shard_helpers import webdataset as web_shards

from lgp_dist.data.build.build import BuildOptions, build_shards
from lgp_dist.data.build.parquet import parquet as read_parquet
from lgp_dist.data.shards.account import Account
from lgp_dist.data.shards.index import ShardIndex
from lgp_dist.data.shards.manifest import ShardManifest
from lgp_dist.data.shards.verify import verify_shards
from lgp_dist.errors import UserError
from lgp_dist.files import locked


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def refused(layout: str, root: Path, out: Path, **options: int) -> str:
    """The sentence of a build that fails; it leaves only what a resume needs."""
    with pytest.raises(UserError) as caught:
        build_shards(layout, root, out, BuildOptions(**{"workers": 1, **options}), quiet)
    assert not out.exists() and "\n" not in str(caught.value) and str(caught.value).endswith(".")
    return str(caught.value)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_is_read_back_by_webdataset_and_timm(layout: str, tmp_path: Path) -> None:
    made = LAYOUTS[layout](tmp_path / "source")
    out = tmp_path / "out"
    manifest = build_shards(layout, made.root, out, BuildOptions(per_shard=5, workers=2), quiet)
    assert manifest.classes == made.classes and set(manifest.splits) == set(made.splits)
    for split, truth in made.splits.items():
        paths = [str(out / entry.name) for entry in manifest.entries(split)]
        assert len(paths) == -(-len(truth) // 5)
        read = {}
        for sample in webdataset.WebDataset(paths, shardshuffle=False):
            content = next(sample[ending] for ending in ("jpg", "png", "webp") if ending in sample)
            read[sample["__key__"]] = (int(sample["cls"]), content)
        assert read == truth and list(read) != list(truth)
        seen = timm.data.create_dataset("wds/any", root=str(out), split=split)
        rows = list(seen)
        assert len(rows) == len(truth) == len(seen)
        for (picture, target), (label, content) in zip(rows, read.values(), strict=True):
            assert target == label
            assert np.array_equal(picture, Image.open(io.BytesIO(content)).convert("RGB"))
        assert seen.filenames() == [f"{key}.JPEG" for key in read]
        index = ShardIndex.load(manifest, split, 3)
        assert dict(zip(index.keys.tolist(), index.label.tolist(), strict=True)) == {k: v[0] for k, v in truth.items()}
        assert index.width.tolist() == [20] * len(truth) and index.height.tolist() == [16] * len(truth)
    assert verify_shards(out) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_workers_and_repeats_do_not_change_a_byte_and_seeds_do(tmp_path: Path) -> None:
    made = parquet(tmp_path / "source")
    for name, workers, seed in (("a", 1, 0), ("b", 3, 0), ("c", 1, 1)):
        build_shards(
            "parquet", made.root, tmp_path / name, BuildOptions(per_shard=4, workers=workers, seed=seed), quiet
        )
    a, b, c = (files(tmp_path / name) for name in "abc")
    assert a == b and a.keys() == c.keys() and a != c


KILLED = """
import os, signal, sys
from lgp_dist.data.build import build
real = build.write_shard
made = 0
def stop_at(path, *arguments):
    global made
    made += 1
    if made == int(sys.argv[3]):
        os.replace = lambda *names: os.kill(os.getpid(), signal.SIGKILL)
    return real(path, *arguments)
build.write_shard = stop_at
build.build_shards(sys.argv[4], sys.argv[1], sys.argv[2], build.BuildOptions(per_shard=2, workers=1), print)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "shard"), [("parquet", 1), ("imagefolder", 4), ("imagenet", 7)])
def test_kill_in_the_middle_and_resume(layout: str, shard: int, tmp_path: Path) -> None:
    """kill -9 comes when a shard is written but not yet renamed; the same command then continues."""
    made = LAYOUTS[layout](tmp_path / "source")
    out, options = tmp_path / "out", BuildOptions(per_shard=2, workers=1)
    call = [sys.executable, "-c", KILLED, str(made.root), str(out), str(shard), layout]
    done = subprocess.run(call, capture_output=True, timeout=LIMIT_S)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert not out.exists()
    partial = tmp_path / ".out.partial"
    whole = sorted((partial / "shards").glob("*.tar"))
    assert len(whole) == shard - 1 and len(list((partial / "shards").glob(".*.partial"))) == 1
    inodes = {path.name: path.stat().st_ino for path in whole}
    assert "was interrupted" in refused(layout, made.root, out, per_shard=3)
    build_shards(layout, made.root, out, options, quiet)
    assert all((out / name).stat().st_ino == inode for name, inode in inodes.items())
    again = tmp_path / "again"
    build_shards(layout, made.root, again, options, quiet)
    assert files(out) == files(again)
    assert not partial.exists()


@pytest.mark.slow
def test_kill_at_random_times(tmp_path: Path) -> None:
    """The command itself, killed at any point until it completes."""
    made = imagefolder(tmp_path / "source")
    for n in range(60):
        (made.root / "train" / "ant" / f"more{n}.jpg").write_bytes(image(n, size=(400, 300)))
    options = {"per_shard": 3, "short_side": 64, "workers": 2}
    code = (
        "import sys; from lgp_dist.data.build.build import *; sys.stdout.write('ready\\n'); sys.stdout.flush();"
        f"build_shards('imagefolder', sys.argv[1], sys.argv[2], BuildOptions(**{options}), print)"
    )
    kills = 0
    for delay in (0.02, 0.06, 0.15, 0.3, 0.6, 60.0):
        child = subprocess.Popen(
            [sys.executable, "-c", code, str(made.root), str(tmp_path / "out")], stdout=subprocess.PIPE
        )
        child.stdout.readline()
        try:
            child.wait(delay)
        except subprocess.TimeoutExpired:
            child.kill()
            kills += 1
        child.wait()
        child.stdout.close()
        if (tmp_path / "out").exists():
            break
    build_shards("imagefolder", made.root, tmp_path / "again", BuildOptions(**options), quiet)
    assert kills and files(tmp_path / "out") == files(tmp_path / "again")


def test_copies_of_parquet_files_are_used_again_if_whole(tmp_path: Path) -> None:
    made = parquet(tmp_path / "source")
    spool = tmp_path / "spool"
    read_parquet(made.root, spool, False, Account(made.root))
    before = {path.name: (path.stat().st_ino, path.read_bytes()) for path in spool.iterdir()}
    assert set(before) == {
        f"{n}.{e}" for n in ("train-00000", "train-00001", "validation-00000", "test-00000") for e in ("bin", "json")
    }
    (spool / "train-00000.bin").write_bytes(before["train-00000.bin"][1][:-1])
    (spool / "validation-00000.json").write_bytes(b"{")
    source = read_parquet(made.root, spool, False, Account(made.root))
    after = {path.name: (path.stat().st_ino, path.read_bytes()) for path in spool.iterdir()}
    assert {name: content for name, (_, content) in before.items()} == {n: c for n, (_, c) in after.items()}
    assert {n for n in before if before[n][0] == after[n][0]} == {
        f"{n}.{e}" for n in ("train-00001", "test-00000") for e in ("bin", "json")
    }
    assert [item.key for item in source.splits["train"]] == list(made.splits["train"])


def test_two_builds_of_one_folder(tmp_path: Path) -> None:
    made = kaggle(tmp_path / "source")
    with locked(tmp_path / ".out.lock"):
        assert f"{tmp_path / 'out'} is being written by process" in refused("kaggle", made.root, tmp_path / "out")
    build_shards("kaggle", made.root, tmp_path / "out", BuildOptions(workers=1), quiet)


def test_tars_in_folders_and_tars_without_a_split(tmp_path: Path) -> None:
    made = web_shards(tmp_path / "source")
    folders, plain = tmp_path / "folders", tmp_path / "plain"
    plain.mkdir()
    for split, folder in (("train", "train"), ("validation", "val")):
        (folders / folder).mkdir(parents=True)
        for number, path in enumerate(sorted(made.root.glob(f"*-{split}-*.tar"))):
            shutil.copy(path, folders / folder / f"{number:06d}.tar")
            shutil.copy(path, plain / f"{split}{number}.tar")
    lines: list[str] = []
    for root, wanted in ((folders, {"train": 15, "validation": 9}), (plain, {"train": 24})):
        manifest = build_shards(
            "webdataset", root, tmp_path / f"{root.name}_out", BuildOptions(workers=1), lines.append
        )
        assert {s: sum(e.samples for e in entries) for s, entries in manifest.splits.items()} == wanted
        assert all(entry.name.startswith("images-") for entries in manifest.splits.values() for entry in entries)
    assert any("are split train" in line for line in lines)
    assert len(ShardIndex.load(manifest, "train", 3)) == len({*ShardIndex.load(manifest, "train", 3).keys.tolist()})


def test_folders_leave_out_what_is_no_image_and_say_so(tmp_path: Path) -> None:
    made = imagefolder(tmp_path / "source")
    (made.root / "train" / "ant" / "loop").symlink_to(made.root / "train")
    (made.root / "val" / "linked").symlink_to(made.root / "train" / "ant", target_is_directory=True)
    (made.root / "train" / "ant" / "0.png").write_bytes(image(77, "PNG"))
    lines: list[str] = []
    manifest = build_shards("imagefolder", made.root, tmp_path / "out", BuildOptions(workers=1), lines.append)
    assert "left out: 2 that are links to folders, or no files: train/ant/loop" in lines  # twice by the link
    assert "left out: 2 hidden: train/ant/.hidden.jpg" in lines
    assert any(line.startswith("left out: 2 whose ending is no image's") and "notes.txt" in line for line in lines)
    assert manifest.classes == ("ant", "bee b", "linked", "wespe_ü")
    keys = ShardIndex.load(manifest, "train", 4).keys.tolist()
    assert {"ant/0", "ant/0-2"} <= set(keys) and len(keys) == 13


def test_short_side(tmp_path: Path) -> None:
    """Against Pillow: large images become JPEGs of the short side, small ones keep their bytes, grey stays grey."""
    root = tmp_path / "source"
    (root / "a").mkdir(parents=True)
    big = Image.open(io.BytesIO(image(1, "PNG", (300, 200))))
    pictures = {
        "rgb": big,
        "tall": big.resize((200, 301)),
        "grey": big.convert("L"),
        "alpha": big.convert("RGBA"),
        "cmyk": big.convert("CMYK"),
        "small": big.resize((64, 50)),
    }
    for name, picture in pictures.items():
        picture.save(root / "a" / f"{name}.{'jpg' if name in ('cmyk', 'small') else 'png'}")
    out = tmp_path / "out"
    build_shards("imagefolder", root, out, BuildOptions(short_side=64, quality=80, workers=1), quiet)
    index = ShardIndex.load(ShardManifest.load(out), "train", 1)
    sizes = {
        "rgb": (96, 64),
        "tall": (64, 96),
        "grey": (96, 64),
        "alpha": (96, 64),
        "cmyk": (96, 64),
        "small": (64, 50),
    }
    for i, key in enumerate(index.keys.tolist()):
        name = key.removeprefix("a/")
        content = index.files.read(0, int(index.offset[i]), int(index.size[i]))
        got = Image.open(io.BytesIO(content))
        assert got.size == (index.width[i], index.height[i]) == sizes[name] and got.format == "JPEG"
        assert got.mode == ("L" if name == "grey" else "RGB")
        if name == "small":
            assert content == (root / "a" / "small.jpg").read_bytes()
            continue
        stored = Image.open(next((root / "a").glob(f"{name}.*"))).convert(got.mode)
        wanted = np.asarray(stored.resize(sizes[name], Image.Resampling.LANCZOS), dtype=float)
        assert np.abs(np.asarray(got, dtype=float) - wanted).mean() < 4


def test_reshard_by_count_size_and_number(tmp_path: Path) -> None:
    made = web_shards(tmp_path / "source")
    total = {split: len(truth) for split, truth in made.splits.items()}
    for name, options, wanted in (
        ("count", {"per_shard": 6}, {"train": [6, 6, 3], "validation": [6, 3]}),
        ("number", {"shards": 5}, {"train": [3] * 5, "validation": [3, 3, 3]}),
        ("one", {"shards": 1}, {"train": [15], "validation": [9]}),
        ("many", {"shards": 99}, {"train": [1] * 15, "validation": [1] * 9}),
        ("limited", {"train": 6, "test": 3}, {"train": [6], "validation": [3]}),
    ):
        manifest = build_shards("webdataset", made.root, tmp_path / name, BuildOptions(workers=1, **options), quiet)
        assert {s: [e.samples for e in entries] for s, entries in manifest.splits.items()} == wanted, total
    again = build_shards("webdataset", tmp_path / "count", tmp_path / "again", BuildOptions(seed=3, workers=1), quiet)
    for split, truth in made.splits.items():
        index = ShardIndex.load(again, split, 3)
        assert index.shards == (f"imagenet1k-{split}-{'0000' if split == 'train' else '00'}.tar",)
        assert dict(zip(index.keys.tolist(), index.label.tolist(), strict=True)) == {k: v[0] for k, v in truth.items()}
    large = tmp_path / "large"
    (large / "a").mkdir(parents=True)
    for n in range(8):
        noise = np.random.default_rng(n).integers(0, 256, (400, 300, 3), dtype=np.uint8)
        Image.fromarray(noise).save(large / "a" / f"{n}.png")
    manifest = build_shards("imagefolder", large, tmp_path / "mb", BuildOptions(shard_mb=1, workers=1), quiet)
    assert [entry.samples for entry in manifest.entries("train")] == [2] * 4
    assert all(entry.bytes < 1_000_000 for entry in manifest.entries("train"))


@pytest.mark.parametrize(
    ("options", "piece"),
    [
        ({"per_shard": 0}, "--per-shard is 0"),
        ({"shards": -1}, "--shards is -1"),
        ({"shards": 2, "shard_mb": 2}, "exclude each other"),
        ({"short_side": 64, "shard_mb": 2}, "--per-shard or --shards"),
        ({"short_side": -3}, "--short-side is -3"),
        ({"quality": 0}, "--quality is 0"),
        ({"train": 18}, "set --train to 1 .. 17"),
        ({"test": 8}, "set --test to 1 .. 7"),
    ],
)
def test_options_out_of_range(options: dict[str, int], piece: str, tmp_path: Path) -> None:
    made = kaggle(tmp_path / "source")
    assert piece in refused("kaggle", made.root, tmp_path / "out", **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_a_bad_image_is_named_and_the_rest_is_kept(tmp_path: Path) -> None:
    made = imagefolder(tmp_path / "source")
    bad = made.root / "train" / "ant" / "0.JPEG"
    good = bad.read_bytes()
    out = tmp_path / "out"
    for content, options in ((b"no image", {}), (b"", {}), (image(1, size=(90, 80))[:-300], {"short_side": 64})):
        bad.write_bytes(content)
        text = refused("imagefolder", made.root, out, **options)
        assert str(bad) in text
        shutil.rmtree(tmp_path / ".out.partial")
    bad.write_bytes(good)
    build_shards("imagefolder", made.root, out, BuildOptions(workers=1), quiet)
    assert verify_shards(out) == []


def change(path: Path, content: bytes | str | None) -> None:
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content.encode() if isinstance(content, str) else content)


@pytest.mark.parametrize(
    ("layout", "name", "content", "pieces"),
    [
        ("imagenet", "ILSVRC2012_devkit_t12.tar.gz", None, ("ILSVRC2012_img_val.tar needs", "ILSVRC2012_devkit_t12")),
        ("imagenet", "ILSVRC2012_devkit_t12.tar.gz", b"no gzip", ("devkit_t12.tar.gz", "meta.mat", "copy the devkit")),
        ("imagenet", "ILSVRC2012_img_val.tar", tar_of([]), ("0 images", "7 classes")),
        ("imagenet", "ILSVRC2012_img_val.tar", b"x" * 2000, ("img_val.tar cannot be read", "copy the file again")),
        ("imagenet", "ILSVRC2012_img_train.tar", tar_of([("x.txt", b"")]), ("img_train.tar holds 'x'",)),
        ("imagenet", "ILSVRC2012_img_train.tar", tar_of([("n01440764.tar", b"no")]), ("img_train.tar cannot be read",)),
        ("kaggle", "LOC_val_solution.csv", "ImageId,PredictionString\nILSVRC2012_val_00000001,n9 1\n", ("line 2",)),
        ("kaggle", "LOC_val_solution.csv", f"ImageId,PredictionString\nx,{WNIDS[0]} 1\n", ("no class for",)),
        ("kaggle", "LOC_val_solution.csv", None, ("LOC_val_solution.csv cannot be read",)),
        ("kaggle", "LOC_synset_mapping.txt", f"{WNIDS[0]} tench\n", ("does not name the class n01443537",)),
        ("kaggle", "LOC_synset_mapping.txt", "tench\n", ("LOC_synset_mapping.txt, line 1",)),
        ("parquet", "data/train-00001-of-00002.parquet", b"PAR1 or not", ("train-00001-of-00002.parquet", "parquet")),
        ("webdataset", "imagenet1k-train-0001.tar", tar_of([("a.cls", b"0")]), ("sample a", "no image")),
        ("webdataset", "imagenet1k-train-0001.tar", b"x" * 1024, ("damaged or cut off",)),
    ],
)
def test_bad_source(
    layout: str, name: str, content: bytes | str | None, pieces: tuple[str, ...], tmp_path: Path
) -> None:
    made = LAYOUTS[layout](tmp_path / "source")
    change(made.root / name, content)
    text = refused(layout, made.root, tmp_path / "out")
    assert all(piece in text for piece in pieces), text
    kept = [".out.partial"] if layout == "parquet" else []  # the copy of the good file
    assert sorted(path.name for path in tmp_path.iterdir()) == [*kept, "source"]


def test_source_that_is_not_there(tmp_path: Path) -> None:
    for layout in LAYOUTS:
        assert "no folder" in refused(layout, tmp_path / "x", tmp_path / "out")
        (tmp_path / "empty").mkdir(exist_ok=True)
        assert str(tmp_path / "empty") in refused(layout, tmp_path / "empty", tmp_path / "out")
    assert "has no layout 'mnist'" in refused("mnist", tmp_path, tmp_path / "out")
    with pytest.raises(UserError, match="--source"):
        build_shards("kaggle", None, tmp_path / "out")


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = parquet(tmp_path / "source")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert "pip install pyarrow" in refused("parquet", made.root, tmp_path / "out")


def test_devkit_as_a_folder(tmp_path: Path) -> None:
    made = imagenet(tmp_path / "source")
    shutil.unpack_archive(made.root / "ILSVRC2012_devkit_t12.tar.gz", made.root)
    (made.root / "ILSVRC2012_devkit_t12.tar.gz").unlink()
    manifest = build_shards("imagenet", made.root, tmp_path / "out", BuildOptions(workers=1), quiet)
    assert manifest.classes == made.classes
    info = json.loads((tmp_path / "out" / "_info.json").read_text())
    assert info["splits"]["validation"]["num_samples"] == 7
