"""Nothing is left out in silence: splits, classes, files and shards that are not taken are named or refused."""

import io
import json
import os
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from run_helpers import LIMIT_S, Lgp
from shard_helpers import WNIDS, WORDS, image, imagefolder, imagenet, kaggle, parquet, quiet, tar_of, webdataset
from timm.data import ImageDataset
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.utils.misc import natural_key

from lgp_dist.config.run_config import DataConfig
from lgp_dist.data.build.build import BuildOptions, build_shards
from lgp_dist.data.build.folders import natural
from lgp_dist.data.shards.account import Account, class_lines
from lgp_dist.data.shards.decode import decode_pixels
from lgp_dist.data.shards.formats import kind_of
from lgp_dist.data.shards.index import ShardIndex, index_shards
from lgp_dist.data.shards.manifest import ShardManifest
from lgp_dist.data.shards.scan import Reading
from lgp_dist.data.shards.splits import parquet_name, split_of, tar_name
from lgp_dist.data.shards.verify import verify_shards
from lgp_dist.data.stream import open_split
from lgp_dist.errors import UserError

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1073741824\n"


def put(root: Path, *names: str) -> None:
    """A different image for each name."""
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(image(number))


def built(root: Path, layout: str = "imagefolder", **options: object) -> tuple[ShardManifest, list[str]]:
    """The manifest of a build next to `root`, and what it said."""
    lines: list[str] = []
    out = root.with_name("out")
    manifest = build_shards(layout, root, out, BuildOptions(**{"workers": 1, **options}), lines.append)
    return manifest, lines


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text and text.endswith("."), text
    return text


def labels(manifest: ShardManifest) -> dict[str, dict[str, int]]:
    """Split -> key -> label, as the shards have them."""
    found = {split: ShardIndex.load(manifest, split, 10**6) for split in manifest.splits}
    return {split: dict(zip(index.keys.tolist(), index.label.tolist(), strict=True)) for split, index in found.items()}


@pytest.mark.parametrize(
    ("train", "other", "split"),
    [
        ("training", "validation", "validation"),
        ("Training", "Testing", "test"),
        ("TRAIN", "Valid", "validation"),
        ("train_", "dev", "validation"),
        ("training_set", "test-set", "test"),
        ("train", "eval", "test"),
    ],
)
def test_split_folders(train: str, other: str, split: str, tmp_path: Path) -> None:
    """The same bytes as under the names train and val or test."""
    for name, pair in (("one", (train, other)), ("two", ("train", {"validation": "val"}.get(split, split)))):
        root = tmp_path / name / "src"
        put(
            root,
            *(f"{pair[0]}/{c}/{n}.jpg" for c in "ab" for n in range(3)),
            f"{pair[1]}/a/9.jpg",
            f"{pair[1]}/b/8.jpg",
        )
        manifest, _ = built(root)
        assert set(manifest.splits) == {"train", split} and manifest.classes == ("a", "b")
    files = [
        sorted((path.name, path.read_bytes()) for path in (tmp_path / n / "out").iterdir()) for n in ("one", "two")
    ]
    assert files[0] == files[1]


def test_names_of_splits() -> None:
    assert [split_of(name) for name in ("Val", "dev_", "TEST", "training-set", "a", "train2", "data", "")] == [
        *("validation", "validation", "test", "train"),
        *[""] * 4,
    ]
    assert tar_name("imagenet1k-train-0000.tar")[:4] == ("imagenet1k", "train", "train", 0)
    assert tar_name("x_Valid_07-of-12.tar") == ("x", "valid", "validation", 7, 12)
    assert tar_name("a-val-1.tar")[2] == "val"  # as manifests have always called it
    assert [tar_name(name) for name in ("train0.tar", "train.tar", "x-train-0.tar.gz", "trainer-0.tar")] == [None] * 4
    assert parquet_name("valid-00000-of-00001-70d52.parquet", "data") == ("", "valid", "validation", 0, 1)
    assert parquet_name("0000.parquet", "Test")[2] == "test" and parquet_name("0000.parquet", "data") is None
    assert parquet_name("train-00000-of-00001-test-x.parquet", "")[2] == "train"


def test_images_outside_of_class_folders(tmp_path: Path) -> None:
    root = tmp_path / "src"
    put(root, "train/a/1.jpg", "train/b/1.jpg", *(f"val/ILSVRC2012_val_{n:08d}.JPEG" for n in range(6)))
    text = refused(lambda: built(root))
    assert f"{root / 'val'} has 6 images outside of class folders" in text and "layout kaggle" in text
    put(root, "val/a/1.jpg", "val/b/1.jpg")  # sorted but for a few
    manifest, lines = built(root)
    assert [line for line in lines if "outside of class folders" in line] == [
        "left out: 6 in val, outside of class folders: val/ILSVRC2012_val_00000000.JPEG,"
        " val/ILSVRC2012_val_00000001.JPEG, val/ILSVRC2012_val_00000002.JPEG, ..."
    ]
    assert lines[0] == "taken: 2 of split train, 2 of split validation" and len(labels(manifest)["validation"]) == 2


def test_folders_that_are_left_over(tmp_path: Path) -> None:
    root = tmp_path / "src"
    put(root, "train/a/1.jpg", "train/b/1.jpg", "holdout/a/1.jpg", "holdout/b/1.jpg", "extra.jpg")
    (root / "dev").mkdir()
    _, lines = built(root)
    assert "left out: 3 that are in no split's folder: extra.jpg, holdout/a/1.jpg, holdout/b/1.jpg" in lines
    assert "split validation has no images" in lines


def test_a_class_called_as_a_split_is(tmp_path: Path) -> None:
    root = tmp_path / "src"
    put(root, *(f"{name}/{n}.jpg" for name in ("bus", "car", "train") for n in range(2)))
    manifest, lines = built(root)
    assert manifest.classes == ("bus", "car", "train") and len(labels(manifest)["train"]) == 6
    assert any(line.startswith("train: taken as a class") for line in lines)


@pytest.mark.parametrize(
    ("names", "pieces"),
    [
        (("val/a/1.jpg", "valid/a/2.jpg", "train/a/1.jpg"), ("val and valid name one split",)),
        (("set/train/a/1.jpg", "set/val/a/1.jpg"), ("set holds train, val", "--source")),
        (("cat/train/1.jpg", "cat/val/1.jpg", "dog/train/1.jpg"), ("cat holds train, val", "folders of classes")),
    ],
)
def test_folders_of_splits_that_do_not_fit(names: tuple[str, ...], pieces: tuple[str, ...], tmp_path: Path) -> None:
    put(tmp_path / "src", *names)
    text = refused(lambda: built(tmp_path / "src"))
    assert all(piece in text for piece in pieces), text


def test_folders_that_look_like_splits_are_named(tmp_path: Path) -> None:
    put(tmp_path / "src", *(f"{part}/{c}/1.jpg" for part in ("train2017", "val2017") for c in "ab"))
    _, lines = built(tmp_path / "src")
    assert any(
        "train2017, val2017: taken as classes" in line and "rename them to one of train" in line for line in lines
    )


def test_folders_of_file_systems_are_no_classes(tmp_path: Path) -> None:
    root = tmp_path / "src"
    put(root, *(f"train/n{n}/{i}.jpg" for n in range(3) for i in range(2)))
    manifest, _ = built(root)
    before = labels(manifest)
    shutil.rmtree(tmp_path / "out")
    put(root, "train/@eaDir/0.jpg/THUMB.jpg", "train/n1/@eaDir/0.jpg/THUMB.jpg", "train/__MACOSX/n0/._0.jpg")
    put(root, "train/lost+found/1.jpg", "train/.cache/x/1.jpg", "train/n0/._0.jpg")
    manifest, lines = built(root)
    assert labels(manifest) == before and manifest.classes == ("n0", "n1", "n2")
    assert any(line.startswith("left out: 4 in folders of a file system") and "train/@eaDir" in line for line in lines)
    assert any(line.startswith("left out: 2 hidden: ") and "train/.cache" in line for line in lines)


def test_classes_without_images_or_in_one_split(tmp_path: Path, lgp: Lgp) -> None:
    root = tmp_path / "src"
    put(root, "train/a/1.jpg", "train/b/1.jpg", "val/a/1.jpg", "val/c/1.jpg")
    (root / "train" / "d").mkdir()
    (root / "train" / "d" / "1.tif").write_bytes(b"II*\0")
    _, lines = built(root)
    wanted = [
        "classes: no images of 1 of 4: 3 d",
        "classes: no images in split train of 1 of 4: 2 c",
        "classes: no images in split validation of 1 of 4: 1 b",
    ]
    assert [line for line in lines if line.startswith("classes: ")] == wanted
    assert lgp("shards", "show", tmp_path / "out").out.splitlines()[-3:] == wanted
    assert any("train/d/1.tif" in line for line in lines)
    assert class_lines({"train": [1, 3], "test": [1]}, ()) == [
        "classes: no images of 2 of 4: 0, 2",
        "classes: no images in split test of 1 of 4: 3",
    ]


def saved(form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(image(3))).save(buffer, form, **options)
    return buffer.getvalue()


def test_other_formats_are_named_all_at_once(tmp_path: Path) -> None:
    root = tmp_path / "src"
    put(root, *(f"train/{c}/{n}.jpg" for c in "ab" for n in range(20)))
    contents = {
        "GIF": saved("GIF"),
        "TIFF": saved("TIFF"),
        "BMP": saved("BMP"),
        "empty": b"",
        "HTML or XML": b"<!DOCTYPE",
    }
    contents |= {"a git-LFS pointer": POINTER}
    for number, content in enumerate(contents.values()):
        (root / "train" / "ab"[number % 2] / f"{number}.jpg").write_bytes(content)
    text = refused(lambda: built(root, per_shard=5))
    assert text.startswith("6 of the source's images are no JPEG, PNG or WebP")
    for number, kind in enumerate(contents):
        assert f"{root}/train/{'ab'[number % 2]}/{number}.jpg (is {kind})" in text
    assert kind_of(saved("WEBP")) == "WEBP" and kind_of(b"nothing known") == ""


def test_truncated_images_are_named_all_at_once(tmp_path: Path) -> None:
    root = tmp_path / "src"
    put(root, *(f"train/a/{n}.jpg" for n in range(9)))
    for number in (2, 7):
        (root / "train" / "a" / f"{number}.jpg").write_bytes(image(number, size=(90, 80))[:-300])
    text = refused(lambda: built(root, per_shard=3, short_side=64))
    assert "a/2.jpg" in text and "a/7.jpg" in text and "2 of the source's images" in text


def grey16(values: np.ndarray) -> bytes:
    """A 16-bit grey PNG, written by its specification."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    parts = [(b"IHDR", struct.pack(">IIBBBBB", *values.shape[::-1], 16, 0, 0, 0, 0)), (b"IDAT", zlib.compress(rows))]
    chunks = [
        struct.pack(">I", len(c)) + n + c + struct.pack(">I", zlib.crc32(n + c)) for n, c in [*parts, (b"IEND", b"")]
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize("channels", [1, 3])
def test_16_bits_become_8(channels: int, tmp_path: Path) -> None:
    values = np.linspace(0, 65_535, 100 * 80).reshape(80, 100).astype(np.uint16)
    high = (values >> 8).astype(np.uint8)
    assert np.array_equal(decode_pixels(grey16(values), channels, "x"), np.repeat(high[..., None], channels, axis=2))
    (tmp_path / "src" / "a").mkdir(parents=True)
    (tmp_path / "src" / "a" / "1.png").write_bytes(grey16(values))
    manifest, _ = built(tmp_path / "src", short_side=40)
    small = Image.open(io.BytesIO(ShardIndex.load(manifest, "train", 1).content(0)))
    wanted = Image.fromarray(high).resize((50, 40), Image.Resampling.LANCZOS)
    assert small.mode == "L" and np.abs(np.asarray(small, float) - np.asarray(wanted, float)).mean() < 4


def timm_numbers(folder: Path) -> dict[str, int]:
    return ReaderImageFolder(str(folder)).class_to_idx


@pytest.mark.parametrize(
    ("classes", "differs"),
    [
        (("a", "b", "c"), False),
        (WNIDS, False),
        (("x1", "x2", "x10"), True),
        (("B", "a", "C"), True),
        (("0", "1", "2", "10"), True),
        (("a 9", "a 10", "a²"), True),
    ],
)
def test_numbers_of_classes_against_timm(classes: tuple[str, ...], differs: bool, tmp_path: Path) -> None:
    """Sorted names, as before; where timm's reader numbers otherwise, the build says so, and --classes gives its."""
    root = tmp_path / "src"
    put(root, *(f"train/{name}/1.jpg" for name in classes))
    manifest, lines = built(root)
    assert manifest.classes == tuple(sorted(classes))
    timm = timm_numbers(root / "train")
    assert (timm != {name: number for number, name in enumerate(manifest.classes)}) == differs
    assert any("timm's reader of folders gives" in line for line in lines) == differs
    order = tmp_path / "classes.txt"
    order.write_text("".join(f"{name}\n" for name in sorted(timm, key=timm.__getitem__)))
    shutil.rmtree(tmp_path / "out")
    manifest, _ = built(root, classes=order)
    assert {key.split("/")[0]: label for key, label in labels(manifest)["train"].items()} == timm
    assert sorted(classes, key=natural) == sorted(classes, key=natural_key)


def test_nested_folders_and_single_splits_against_timm(tmp_path: Path) -> None:
    root = tmp_path / "src"
    put(root, "train/a/x/1.jpg", "train/b/1.jpg", "train/c/1.jpg", "val/b/1.jpg", "val/c/1.jpg")
    _, lines = built(root)
    assert timm_numbers(root / "train") == {"b": 0, "c": 1, "x": 2} and timm_numbers(root / "val") == {"b": 0, "c": 1}
    assert [line.split(" another")[0] for line in lines if "timm's" in line] == [
        "timm's reader of folders gives 3 of 3 images of split train",
        "timm's reader of folders gives 2 of 2 images of split validation",
    ]


@pytest.mark.parametrize("made", [imagefolder, imagenet, kaggle, parquet])
def test_classes_file_orders_every_layout(made: Callable[[Path], object], tmp_path: Path) -> None:
    """The last two classes, reversed: images of the first are left out and counted."""
    source = made(tmp_path / "src")
    order = [source.classes[2], source.classes[1]]
    (tmp_path / "classes.txt").write_text("\n".join(order) + "\n\n", encoding="utf-8")
    manifest, lines = built(tmp_path / "src", made.__name__, classes=tmp_path / "classes.txt")
    assert manifest.classes == tuple(order)
    for split, truth in source.splits.items():
        kept = {key: 2 - label for key, (label, _) in truth.items() if label}
        assert labels(manifest)[split] == kept
        line = (
            f"left out: {len(truth) - len(kept)} of split {split}, whose classes {tmp_path}/classes.txt does not name"
        )
        assert any(found.startswith(line) for found in lines)


def test_classes_file_of_wnids_keeps_the_words(tmp_path: Path) -> None:
    kaggle(tmp_path / "src")
    (tmp_path / "classes.txt").write_text("\n".join(WNIDS[::-1]))
    manifest, _ = built(tmp_path / "src", "kaggle", classes=tmp_path / "classes.txt")
    assert manifest.classes == tuple(f"{wnid} {words}" for wnid, words in zip(WNIDS, WORDS, strict=True))[::-1]


@pytest.mark.parametrize(
    ("text", "piece"), [("a\n\nb\n", "''"), ("a\nb\na\n", "'a'"), ("", "is empty"), (None, "cannot be read")]
)
def test_classes_file_that_is_wrong(text: str | None, piece: str, tmp_path: Path) -> None:
    put(tmp_path / "src", "a/1.jpg", "b/1.jpg")
    if text is not None:
        (tmp_path / "classes.txt").write_text(text)
    said = refused(lambda: built(tmp_path / "src", classes=tmp_path / "classes.txt"))
    assert f"--classes {tmp_path}/classes.txt" in said and piece in said
    (tmp_path / "classes.txt").write_text("x\n")
    assert "names no class of the source, such as a" in refused(
        lambda: built(tmp_path / "src", classes=tmp_path / "classes.txt")
    )


def test_kaggle_and_imagenet_count_the_rest(tmp_path: Path) -> None:
    for number, (made, name) in enumerate(((kaggle, "ILSVRC/Annotations/CLS-LOC/1.xml"), (imagenet, "notes.txt"))):
        root = tmp_path / str(number) / "src"
        made(root)
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("x")
        _, lines = built(root, made.__name__)
        left = [line for line in lines if line.startswith("left out")]
        assert len(left) == 1 and name in left[0] and f"that layout {made.__name__} does not read" in left[0]
    assert lines[0] == "taken: 17 of split train, 7 of split validation"


def test_hidden_members_of_official_tars(tmp_path: Path) -> None:
    root = tmp_path / "src"
    made = imagenet(root)
    images = [(f"{stem}.JPEG", content) for stem, (_, content) in sorted(made.splits["validation"].items())]
    (root / "ILSVRC2012_img_val.tar").write_bytes(tar_of([("./._x.JPEG", b"x"), *images]))
    manifest, lines = built(root, "imagenet")
    assert labels(manifest)["validation"] == {key: label for key, (label, _) in made.splits["validation"].items()}
    assert "left out: 1 hidden in ILSVRC2012_img_val.tar: ./._x.JPEG" in lines


def test_names_of_parquet_files(tmp_path: Path) -> None:
    made = parquet(tmp_path / "src")
    data = tmp_path / "src" / "data"
    (data / "validation-00000-of-00001.parquet").rename(data / "valid-00000-of-00001-70d52db3c749a935.parquet")
    (data / "holdout-00000-of-00001.parquet").write_bytes(b"x")
    manifest, lines = built(tmp_path / "src", "parquet")
    assert labels(manifest) == {s: {k: v for k, (v, _) in truth.items()} for s, truth in made.splits.items()}
    assert any("holdout-00000-of-00001.parquet" in line and line.startswith("left out: 1 ") for line in lines)
    assert "left out: 3 images without labels (-1): split test" in lines


def test_parquet_files_that_are_missing_or_twice(tmp_path: Path) -> None:
    parquet(tmp_path / "src")
    data = tmp_path / "src" / "data"
    shutil.copy(data / "train-00000-of-00002.parquet", data / "train-00000-of-00002-again.parquet")
    assert "are both number 0 of 2 of split train" in refused(lambda: built(tmp_path / "src", "parquet"))
    (data / "train-00000-of-00002-again.parquet").unlink()
    (data / "train-00001-of-00002.parquet").unlink()
    text = refused(lambda: built(tmp_path / "src", "parquet"))
    assert (
        "1 of the 2 parquet files that names of split train count are missing: 1" in text and "--accept-missing" in text
    )
    manifest, lines = built(tmp_path / "src", "parquet", accept_missing=True)
    assert len(labels(manifest)["train"]) == 9 and any("are missing: 1" in line for line in lines)


def test_copies_of_other_parquet_files_are_not_used(tmp_path: Path) -> None:
    """A file that takes another's place in the order does not get its copy."""
    made = parquet(tmp_path / "src")
    data = tmp_path / "src" / "data"
    (data / "train-00000-of-00002.parquet").rename(tmp_path / "later.parquet")
    (data / "z-00000-of-00001.parquet").write_bytes(b"x")
    (data / "validation-00000-of-00001.parquet").write_bytes(b"PAR1 damaged")
    refused(lambda: built(tmp_path / "src", "parquet", accept_missing=True))
    (tmp_path / "later.parquet").rename(data / "train-00000-of-00002.parquet")
    (data / "validation-00000-of-00001.parquet").unlink()
    manifest, _ = built(tmp_path / "src", "parquet")
    assert labels(manifest)["train"] == {key: label for key, (label, _) in made.splits["train"].items()}


@pytest.mark.parametrize("source", ["_info.json", "manifest.json"])
def test_shards_that_were_promised(source: str, tmp_path: Path, lgp: Lgp) -> None:
    """index and build refuse before they write, name the gap in numbers, and take the rest where it is accepted."""
    root = tmp_path / "src"
    webdataset(root)
    index_shards(root, quiet)
    for name in {"_info.json", "manifest.json"} - {source}:
        (root / name).unlink()
    (root / "imagenet1k-train-0001.tar").unlink()
    before = (root / source).read_bytes()
    done = lgp("shards", "index", root)
    assert done.status == 2 and (root / source).read_bytes() == before
    pieces = (
        "1 of the 5 shards that",
        f"{root}/{source} names",
        "imagenet1k-train-0001.tar (5 samples)",
        "--accept-missing",
    )
    assert all(piece in done.sentence for piece in pieces), done.sentence
    assert "imagenet1k-train-0001.tar" in refused(lambda: built(root, "webdataset"))
    manifest, lines = built(root, "webdataset", accept_missing=True)
    assert len(labels(manifest)["train"]) == 10 and any("imagenet1k-train-0001.tar" in line for line in lines)
    done = lgp("shards", "index", root, "--accept-missing")
    assert done.status == 0 and "1 of the numbers of shards of split train are missing: 1" in done.out
    assert verify_shards(root) == [] and len(labels(ShardManifest.load(root))["train"]) == 10


def test_samples_that_were_promised(tmp_path: Path) -> None:
    webdataset(tmp_path)
    index_shards(tmp_path, quiet)
    (tmp_path / "manifest.json").unlink()
    info = json.loads((tmp_path / "_info.json").read_text())
    info["splits"]["train"]["shard_lengths"][2] = 9
    (tmp_path / "_info.json").write_text(json.dumps(info))
    text = refused(lambda: index_shards(tmp_path, quiet))
    assert "imagenet1k-train-0002.tar (3 samples)" in text and not (tmp_path / "manifest.json").exists()
    index_shards(tmp_path, quiet, accept_missing=True)
    for name in ("_info.json", "manifest.json"):  # what cannot be read is said, not replaced in silence
        (tmp_path / name).write_text("{")
        lines: list[str] = []
        index_shards(tmp_path, lines.append)
        assert (
            len([line for line in lines if f"{tmp_path / name}" in line and "neither compared nor kept" in line]) == 1
        )


def test_numbers_of_shards_that_their_names_promise(tmp_path: Path) -> None:
    made = tar_of([("a.jpg", image(1)), ("a.cls", b"0")])
    for number in (0, 3):
        (tmp_path / f"x-train-{number}-of-4.tar").write_bytes(made)
    text = refused(lambda: index_shards(tmp_path, quiet))
    assert "2 of the numbers of shards of split train are missing: 1, 2" in text
    for path in tmp_path.iterdir():
        path.rename(path.with_name(path.name.replace("-of-4", "")))
    lines: list[str] = []
    index_shards(tmp_path, lines.append)
    assert "2 of the numbers of shards of split train are missing: 1, 2" in lines


def test_index_counts_every_file(tmp_path: Path) -> None:
    webdataset(tmp_path)
    (tmp_path / "x_Valid_0.tar").write_bytes(tar_of([("a.jpg", image(1)), ("a.cls", b"0"), ("README", b"x")]))
    for path in tmp_path.glob("*-validation-*"):
        path.unlink()
    (tmp_path / "more").mkdir()
    for name in ("extra-0000.tar", "x-train-0007.tar.gz", "more/x-train-0009.tar", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    lines: list[str] = []
    manifest = index_shards(tmp_path, lines.append)
    assert set(manifest.splits) == {"train", "validation"}
    account = [line for line in lines if line.startswith(("taken", "left out"))]
    assert account[0] == "taken: 15 of split train, 1 of split validation"
    assert account[1].startswith("left out: 4 whose names do not end in -SPLIT-NUMBER.tar: extra-0000.tar, notes.txt")
    assert any("members .json of samples" in line for line in account)
    assert any(line.startswith("left out: 1 members that webdataset skips") and "README" in line for line in account)
    (tmp_path / "x-val-1.tar").write_bytes((tmp_path / "x_Valid_0.tar").read_bytes())
    assert "name one split" in refused(lambda: index_shards(tmp_path, quiet))


PAIR = [("a.jpg", image(1))]


@pytest.mark.parametrize(
    ("members", "reading", "wanted"),
    [
        ([*PAIR, ("a.json", b'{"label": "3"}')], Reading(), 3),
        ([*PAIR, ("a.json", b'{"label": 3.0}')], Reading(), 3),
        ([*PAIR, ("a.json", b'{"label": null, "cls": 2}')], Reading(), 2),
        ([*PAIR, ("a.json", b'{"cls": " 2 "}')], Reading(), 2),
        ([*PAIR, ("a.cls", b"4.0\n")], Reading(), 4),
        ([*PAIR, ("a.json", b'{"label": [0, 1, 0]}')], Reading(), "label '[0, 1, 0]', which is no whole number"),
        ([*PAIR, ("a.json", b'{"label": 2.5}')], Reading(), "label '2.5'"),
        ([*PAIR, ("a.json", b'{"label": true}')], Reading(), "label 'true'"),
        ([*PAIR, ("a.json", b'{"label": {"id": 1}}')], Reading(), "which is no whole number"),
        ([*PAIR, ("a.cls", b"-1")], Reading(), "label is -1, but labels start at 0"),
        ([*PAIR, ("a.cls", b"9" * 21)], Reading(), "no whole number below 10^18"),
        ([*PAIR, ("a.json", b'{"class_id": 3}')], Reading(), "the .json has the fields class_id; name"),
        ([*PAIR, ("a.json", b'{"class_id": 3}')], Reading(label="class_id"), 3),
        (
            [*PAIR, ("a.cls", b"n01443537")],
            Reading(),
            "label 'n01443537', which is no whole number below 10^18: list the classes",
        ),
        ([*PAIR, ("a.cls", b"n01443537")], Reading(classes=WNIDS), 1),
        ([*PAIR, ("a.json", b'{"label": "n01443537"}')], Reading(classes=tuple(f"{w} x" for w in WNIDS)), 1),
        ([*PAIR, ("a.cls", b"cat")], Reading(classes=("dog", "cat")), 1),
        ([*PAIR, ("a.cls", b"cow")], Reading(classes=("dog", "cat")), "none of the 2 classes"),
        ([*PAIR, ("a.cls", b"1")], Reading(classes=("1", "0")), 1),
        ([*PAIR, ("a.txt", b"1")], Reading(), "its files are a.jpg, a.txt; name its ending"),
        ([*PAIR, ("a.txt", b"1")], Reading(label="txt"), 1),
        ([("a.input.jpg", image(1)), ("a.output.cls", b"2")], Reading(), "--image input.jpg"),
        ([("a.input.jpg", image(1)), ("a.output.cls", b"2")], Reading("input.jpg"), "--label output.cls"),
        ([("a.input.jpg", image(1)), ("a.output.cls", b"2")], Reading("Input.jpg", "output.cls"), 2),
        ([("i.0.jpg", b""), ("i.0.cls", b"1"), ("i.1.jpg", b""), ("i.1.cls", b"1")], Reading(), "at the first dot"),
        ([*PAIR, ("a.cls", b"1"), ("a.v2.jpg", b""), ("a.v2.cls", b"1")], Reading(), "holds several samples"),
        ([*PAIR, ("a.cls", b"1"), ("a.seg.png", b""), ("a.cls.txt", b"x")], Reading(), 1),
    ],
)
def test_members_and_labels(
    members: list[tuple[str, bytes]], reading: Reading, wanted: int | str, tmp_path: Path
) -> None:
    (tmp_path / "x-train-0.tar").write_bytes(tar_of(members))
    if isinstance(wanted, str):
        text = refused(lambda: index_shards(tmp_path, quiet, reading=reading))
        assert wanted in text, text
        return
    manifest = index_shards(tmp_path, quiet, reading=reading)
    (tmp_path / "index-train.npz").unlink()  # then the manifest says how the tar is read
    assert labels(ShardManifest.load(tmp_path)) == labels(manifest) == {"train": {"a": wanted}}
    assert verify_shards(tmp_path) == []
    again = build_shards("webdataset", tmp_path, tmp_path / "out", BuildOptions(workers=1), quiet)
    assert labels(again) == labels(manifest)


def test_members_and_labels_by_options(tmp_path: Path, lgp: Lgp) -> None:
    (tmp_path / "src").mkdir()
    members = [("a.input.jpg", image(1)), ("a.output.cls", b"n01443537")]
    (tmp_path / "src" / "x-train-0.tar").write_bytes(tar_of(members))
    (tmp_path / "classes.txt").write_text("\n".join(WNIDS))
    options = ("--image", "input.jpg", "--label", "output.cls", "--classes", tmp_path / "classes.txt")
    done = lgp("shards", "build", "webdataset", "--source", tmp_path / "src", "--out", tmp_path / "out", *options)
    assert done.status == 0, done.err
    assert lgp("shards", "index", tmp_path / "src", *options).status == 0
    for root in (tmp_path / "out", tmp_path / "src"):
        manifest = ShardManifest.load(root)
        assert manifest.classes == WNIDS and labels(manifest) == {"train": {"a": 1}}
    assert "leave them out" in lgp("shards", "build", "kaggle", "--source", "x", "--out", "y", "--image", "a").sentence
    assert (
        "leave it out" in lgp("shards", "build", "kaggle", "--source", "x", "--out", "y", "--accept-missing").sentence
    )


@pytest.mark.parametrize(
    ("layout", "made", "name"),
    [
        ("parquet", parquet, "data/train-00000-of-00002.parquet"),
        ("imagenet", imagenet, "ILSVRC2012_img_train.tar"),
        ("imagenet", imagenet, "ILSVRC2012_devkit_t12.tar.gz"),
        ("kaggle", kaggle, "LOC_val_solution.csv"),
        ("kaggle", kaggle, "LOC_synset_mapping.txt"),
        ("webdataset", webdataset, "imagenet1k-train-0001.tar"),
    ],
)
def test_pointers_of_git_lfs(layout: str, made: Callable[[Path], object], name: str, tmp_path: Path) -> None:
    made(tmp_path / "src")
    (tmp_path / "src" / name).write_bytes(POINTER)
    text = refused(lambda: built(tmp_path / "src", layout))
    assert f"{tmp_path}/src/{name} is a git-LFS pointer" in text and "`git lfs pull`" in text
    if layout == "webdataset":
        assert "is a git-LFS pointer" in refused(lambda: index_shards(tmp_path / "src", quiet))


def test_index_and_manifest_elsewhere(tmp_path: Path, lgp: Lgp) -> None:
    """The tars' folder stays as it was; training, show, verify and reshard read from the other one."""
    root, out = tmp_path / "tars", tmp_path / "deep" / "out"
    webdataset(root)
    before = sorted(path.name for path in root.iterdir())
    truth = labels(index_shards(shutil.copytree(root, tmp_path / "copy"), quiet))
    assert lgp("shards", "index", root, "--out", out).status == 0
    assert sorted(path.name for path in root.iterdir()) == before
    index = open_split(DataConfig(root=str(out), num_classes=3), "train")
    assert dict(zip(index.keys.tolist(), index.label.tolist(), strict=True)) == truth["train"]
    assert len(index.content(0)) == index.size[0] and str(root) in index.describe(0)
    index_file = (out / "index-train.npz").read_bytes()
    (out / "index-train.npz").unlink()
    assert labels(ShardManifest.load(out)) == truth
    (out / "index-train.npz").write_bytes(index_file)
    assert lgp("shards", "show", out).status == 0 and verify_shards(out) == []
    assert labels(build_shards("webdataset", out, tmp_path / "again", BuildOptions(workers=1), quiet)) == truth
    info = json.loads((out / "_info.json").read_text())
    assert all((out / name).is_file() for name in info["splits"]["train"]["filenames"])  # as timm joins them
    (root / "imagenet1k-train-0001.tar").unlink()
    assert "imagenet1k-train-0001.tar is missing" in refused(lambda: open_split(DataConfig(root=str(out)), "train"))
    assert "1 of 3 shards are not as the manifest says" in lgp("shards", "show", out).out
    assert "imagenet1k-train-0001.tar" in lgp("shards", "index", root, "--out", out).sentence


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_to(tmp_path: Path, lgp: Lgp) -> None:
    webdataset(tmp_path / "tars")
    (tmp_path / "tars").chmod(0o555)
    assert "--out" in lgp("shards", "index", tmp_path / "tars").sentence


def test_what_a_terminal_cannot_show_is_escaped(tmp_path: Path) -> None:
    root = tmp_path / "src"
    put(root, "train/Ünïcode/1.jpg", "train/b/1.jpg")
    (root / "train" / "b" / os.fsdecode(b"caf\xe9\x1b.txt")).write_bytes(b"x")
    call = [sys.executable, "-m", "lgp_dist", "shards", "build", "imagefolder", "--source", str(root), "--out"]
    for encoding in ("ascii", "utf-8"):
        environment = {**os.environ, "PYTHONIOENCODING": encoding}
        done = subprocess.run([*call, str(tmp_path / encoding)], capture_output=True, timeout=LIMIT_S, env=environment)
        assert done.returncode == 0, done.stderr.decode()
        name = "Ünïcode" if encoding == "utf-8" else "\\xdcn\\xefcode"
        assert name.encode() in done.stdout and b"caf\\udce9\\x1b.txt" in done.stdout


def test_an_account_is_short() -> None:
    account = Account(Path())
    for number in range(5000):
        account.leave("of a kind", f"f{number}")
    assert account.lines() == ["taken: nothing", "left out: 5,000 of a kind: f0, f1, f2, ..."]


def test_exif_orientation_is_ignored_as_timm_does(tmp_path: Path) -> None:
    picture = Image.open(io.BytesIO(image(5, size=(24, 16))))
    exif = Image.Exif()
    exif[274] = 6  # to be turned by 90 degrees
    path = tmp_path / "a" / "1.jpg"
    path.parent.mkdir()
    picture.save(path, quality=100, exif=exif)
    read, _ = ImageDataset(str(tmp_path))[0]
    assert read.size == (24, 16) and np.array_equal(decode_pixels(path.read_bytes(), 3, "x"), np.asarray(read))


def test_tars_that_have_moved_are_problems(tmp_path: Path) -> None:
    """An index that lies elsewhere: each tar is named, and the folder that is gone ends nothing else."""
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / "x-train-0.tar").write_bytes(tar_of([*PAIR, ("a.cls", b"1")]))
    index_shards(tmp_path / "tars", quiet, out=tmp_path / "index")
    (tmp_path / "tars").rename(tmp_path / "moved")
    problems = verify_shards(tmp_path / "index", workers=1)
    assert any("x-train-0.tar" in problem.shard for problem in problems)
