"""Shards, manifest and index against webdataset and the original idx files."""

import gzip
import io
import json
import shutil
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image
from shard_helpers import idx_files

from lgp_dist.data.build.build import BuildOptions, build_shards
from lgp_dist.data.build.fashion import CLASSES, DEFAULT_SOURCE
from lgp_dist.data.shards.index import ShardIndex, index_shards, read_image, sidecar_path
from lgp_dist.data.shards.manifest import ShardManifest
from lgp_dist.data.shards.verify import summary, table, verify_shards
from lgp_dist.errors import UserError

SAMPLE = Path(__file__).parents[2] / "shards" / "sample"


def quiet(line: str) -> None:
    """No progress."""


def build(source: Path, out: Path, **options: int) -> ShardManifest:
    return build_shards("fashion-mnist", source, out, BuildOptions(**options, workers=1), quiet)


def encoded(pixels: np.ndarray, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=form)
    return buffer.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def foreign_shards(root: Path) -> dict[str, np.ndarray]:
    """Two training shards and a validation shard as other tools write them; returns pixels by key."""
    root.mkdir()
    pixels = {}
    generator = np.random.default_rng(1)
    for name, start in (("train-0000", 0), ("train-0001", 5), ("validation-00", 10)):
        members = []
        for number in range(start, start + 5):
            key = f"n{number % 3:08d}/img_{number}"
            pixels[key] = generator.integers(0, 256, (6 + number, 9, 3), dtype=np.uint8)
            members.append((f"{key}.json", b"{}"))
            members.append((f"{key}.{'WEBP' if number % 2 else 'png'}", b""))
            form = {"lossless": True} if number % 2 else {}
            buffer = io.BytesIO()
            Image.fromarray(pixels[key]).save(buffer, format="WEBP" if number % 2 else "PNG", **form)
            members[-1] = (members[-1][0], buffer.getvalue())
            members.append((f"{key}.cls", f" {number % 3}\n".encode()))
        write_tar(root / f"imagenet1k-{name}.tar", members)
    return pixels


def source_images(source: Path, prefix: str) -> tuple[np.ndarray, np.ndarray]:
    images = gzip.decompress((source / f"{prefix}-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((source / f"{prefix}-labels-idx1-ubyte.gz").read_bytes())
    return np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28), np.frombuffer(labels, np.uint8, offset=8)


def test_sample_has_what_the_brief_says() -> None:
    manifest = ShardManifest.load(SAMPLE)
    assert manifest.classes == CLASSES and manifest.licence == "MIT"
    for split, count in (("train", 10_000), ("test", 2_000)):
        manifest.check(split)
        index = ShardIndex.load(manifest, split, 10)
        assert np.bincount(index.label).tolist() == [count // 10] * 10
        assert len(set(index.keys.tolist())) == count
    assert "Zalando SE" in (SAMPLE / "LICENSE").read_text()


@pytest.mark.parametrize(("split", "shards"), [("test", 2), ("train", 2)])
def test_sample_index_equals_webdataset(split: str, shards: int) -> None:
    index = ShardIndex.load(ShardManifest.load(SAMPLE), split, 10)
    paths = [str(SAMPLE / name) for name in index.shards[:shards]]
    read = list(webdataset.WebDataset(paths, shardshuffle=False))
    assert len(read) == 1000 * shards
    for i, sample in enumerate(read):
        assert index.keys[i] == sample["__key__"]
        assert index.label[i] == int(sample["cls"])
        assert index.files.read(int(index.shard[i]), int(index.offset[i]), int(index.size[i])) == sample["png"]


@pytest.mark.skipif(not DEFAULT_SOURCE.is_dir(), reason="package dataset-fashion-mnist is not installed")
def test_sample_pixels_equal_the_original() -> None:
    images, labels = source_images(DEFAULT_SOURCE, "t10k")
    index = ShardIndex.load(ShardManifest.load(SAMPLE), "test", 10)
    for i in range(len(index)):
        place = int(str(index.keys[i]).removeprefix("test-"))
        image = read_image(index, i, 1)
        assert image.mode == "L" and index.label[i] == labels[place]
        assert np.array_equal(np.asarray(image), images[place])


def test_build_reads_back_by_webdataset(tmp_path: Path) -> None:
    source, out = tmp_path / "idx", tmp_path / "out" / "shards"
    idx_files(source)
    manifest = build(source, out, train=95, per_shard=40)
    assert [entry.samples for entry in manifest.entries("train")] == [40, 40, 15]
    assert manifest == ShardManifest.load(out)
    assert manifest.entries("train")[0].name == "fashion-mnist-train-0000.tar"
    assert manifest.entries("test")[0].name == "fashion-mnist-test-00.tar"
    for split, prefix, count in (("train", "train", 95), ("test", "t10k", 40)):
        images, labels = source_images(source, prefix)
        paths = [str(out / entry.name) for entry in manifest.entries(split)]
        read = list(webdataset.WebDataset(paths, shardshuffle=False).decode("l8"))
        keys = [sample["__key__"] for sample in read]
        assert len(keys) == len(set(keys)) == count and keys != sorted(keys)
        assert set(np.bincount([int(sample["cls"]) for sample in read])) <= {count // 10, -(-count // 10)}
        for sample in read:
            place = int(sample["__key__"].split("-")[1])
            assert int(sample["cls"]) == labels[place] and np.array_equal(sample["png"], images[place])
    assert verify_shards(out) == []
    assert [path.name for path in out.parent.iterdir()] == ["shards"]


def test_build_gives_the_same_bytes(tmp_path: Path) -> None:
    source = tmp_path / "idx"
    idx_files(source)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        build(source, tmp_path / name, per_shard=100, seed=seed)
    contents = [{p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in "abc"]
    assert contents[0] == contents[1] and len(contents[0]) == 8
    assert contents[0]["fashion-mnist-train-0000.tar"] != contents[2]["fashion-mnist-train-0000.tar"]


def test_build_refuses(tmp_path: Path) -> None:
    source = tmp_path / "idx"
    with pytest.raises(
        UserError, match="idx/train-images-idx3-ubyte.gz does not exist: install.*dataset-fashion-mnist"
    ):
        build(source, tmp_path / "out")
    idx_files(source)
    with pytest.raises(UserError, match=r"--train to 1 \.\. 200"):
        build(source, tmp_path / "out", train=201)
    (source / "t10k-labels-idx1-ubyte.gz").write_bytes(b"no gzip")
    with pytest.raises(UserError, match="t10k-labels-idx1-ubyte.gz cannot be read as an idx file"):
        build(source, tmp_path / "out")
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="full exists and is not empty"):
        build(source, full)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "idx"]


def test_foreign_shards_are_indexed(tmp_path: Path) -> None:
    root = tmp_path / "imagenet"
    pixels = foreign_shards(root)
    write_tar(root / "other.tar", [])
    lines: list[str] = []
    manifest = index_shards(root, lines.append)
    assert any(line.startswith("left out: 1 ") and "other.tar" in line for line in lines)
    assert {split: sum(e.samples for e in entries) for split, entries in manifest.splits.items()} == {
        "train": 10,
        "validation": 5,
    }
    assert manifest == ShardManifest.load(root) and verify_shards(root) == []
    for split in manifest.splits:
        index = ShardIndex.load(manifest, split, 3)
        paths = [str(root / name) for name in index.shards]
        read = list(webdataset.WebDataset(paths, shardshuffle=False))
        assert [sample["__key__"] for sample in read] == index.keys.tolist()
        assert [int(sample["cls"]) for sample in read] == index.label.tolist()
        for i in range(len(index)):
            assert np.array_equal(np.asarray(read_image(index, i, 3)), pixels[str(index.keys[i])])
            grey = Image.fromarray(pixels[str(index.keys[i])]).convert("L")
            assert np.array_equal(np.asarray(read_image(index, i, 1)), np.asarray(grey))


def test_sidecar_is_used_only_if_it_fits(tmp_path: Path) -> None:
    root = tmp_path / "imagenet"
    foreign_shards(root)
    manifest = index_shards(root, quiet)
    sidecar = sidecar_path(root, "train")
    good = sidecar.read_bytes()
    arrays = dict(np.load(io.BytesIO(good), allow_pickle=False))
    truth = ShardIndex.load(manifest, "train", 3)

    def label_with(**changes: object) -> list[int]:
        np.savez(sidecar, **{**arrays, **changes})
        return ShardIndex.load(manifest, "train", 3).label.tolist()

    swapped = 2 - arrays["label"]
    assert label_with(label=swapped) == swapped.tolist() != truth.label.tolist()  # it is really read
    assert any("index-train.npz does not agree" in line.sentence for line in verify_shards(root))
    assert label_with(label=swapped, fingerprint="0" * 64) == truth.label.tolist()
    assert label_with(label=swapped, offset=arrays["offset"] + 10**9) == truth.label.tolist()
    assert label_with(label=swapped[:-1]) == truth.label.tolist()
    assert label_with(label=swapped, shard=arrays["shard"][::-1]) == truth.label.tolist()
    for content in (b"", b"not a zip", good[: len(good) // 2]):
        sidecar.write_bytes(content)
        assert ShardIndex.load(manifest, "train", 3).keys.tolist() == truth.keys.tolist()
    sidecar.unlink()
    assert ShardIndex.load(manifest, "train", 3).offset.tolist() == truth.offset.tolist()


def test_verify_names_every_problem(tmp_path: Path) -> None:
    root = tmp_path / "shards"
    root.mkdir()
    image = encoded(np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8))
    for number in range(4):
        names = [f"a{number}", f"b{number}"]
        write_tar(
            root / f"x-train-{number}.tar", [(f"{k}.{e}", c) for k in names for e, c in (("png", image), ("cls", b"1"))]
        )
    write_tar(root / "x-train-4.tar", [("k.png", image[:-30]), ("k.cls", b"7"), ("m.png", b"zip"), ("m.cls", b"9")])
    shutil.copy(root / "x-train-0.tar", root / "x-train-5.tar")
    manifest = index_shards(root, quiet)
    stored = json.loads((root / "manifest.json").read_text())
    stored["classes"] = ["zero", "one"]
    (root / "manifest.json").write_text(json.dumps(stored))
    (root / "x-train-1.tar").unlink()
    (root / "x-train-2.tar").write_bytes((root / "x-train-2.tar").read_bytes()[:-100])
    changed = bytearray((root / "x-train-3.tar").read_bytes())
    changed[600] ^= 1
    (root / "x-train-3.tar").write_bytes(changed)
    shutil.copy(root / "x-train-0.tar", root / "x-train-6.tar")
    (root / "_info.json").write_text("{}")
    size = manifest.entries("train")[1].bytes
    wanted = [
        ("x-train-1.tar", "", "missing", (f"{root}/x-train-1.tar is missing", str(size))),
        ("x-train-1.tar", "a1", "lost", ("sample a1", "lost")),
        ("x-train-1.tar", "b1", "lost", ("sample b1", "lost")),
        ("x-train-2.tar", "", "size", (f"has {size - 100} bytes", f"wants {size}")),
        ("x-train-3.tar", "", "hash", ("x-train-3.tar has another sha256",)),
        ("x-train-3.tar", "a3", "changed", ("sample a3", "other bytes")),
        ("x-train-4.tar", "k", "label", ("x-train-4.tar, sample k", "label is 7", "0 .. 1")),
        ("x-train-4.tar", "k", "image", ("x-train-4.tar, sample k", "cannot be decoded", "truncated")),
        ("x-train-4.tar", "m", "label", ("x-train-4.tar, sample m", "label is 9")),
        ("x-train-4.tar", "m", "image", ("x-train-4.tar, sample m", "cannot be decoded", "no image")),
        ("x-train-5.tar", "a0", "twice", ("sample a0", "x-train-0.tar has too")),
        ("x-train-5.tar", "b0", "twice", ("sample b0", "x-train-0.tar has too")),
        ("x-train-6.tar", "", "unlisted", (f"{root}/x-train-6.tar is not in the manifest",)),
        ("_info.json", "", "info", (f"{root}/_info.json does not agree",)),
    ]
    for workers in (1, 2):
        found = verify_shards(root, workers=workers)
        assert [(p.shard, p.key, p.reason) for p in found] == [row[:3] for row in wanted]
        for problem, (*_, pieces) in zip(found, wanted, strict=True):
            assert all(piece in problem.sentence for piece in pieces), problem
    text = summary(root, found)
    assert "has 14 problem(s), with 7 bad sample(s) in 7 file(s)" in text and "\n" not in text and ".;" not in text
    assert "; and 4 more." in text and found[9].sentence.rstrip(".") in text and found[10].sentence not in text
    assert table(found).count("\n") == 14 and "x-train-3.tar\ta3\tchanged\tShard" in table(found)
    assert found[5].key == "a3"


def test_an_index_of_format_1_is_still_read(tmp_path: Path) -> None:
    root = tmp_path / "imagenet"
    foreign_shards(root)
    manifest = index_shards(root, quiet)
    path = sidecar_path(root, "train")
    arrays = dict(np.load(io.BytesIO(path.read_bytes()), allow_pickle=False))
    old = {name: arrays[name] for name in ("fingerprint", "shard", "offset", "size", "label", "keys")}
    old["label"] = 2 - old["label"]
    np.savez(path, format=np.int64(1), **old)
    index = ShardIndex.load(manifest, "train", 3)
    assert index.label.tolist() == old["label"].tolist() and index.width.tolist() == [0] * 10
    assert index.crc.tolist() == [-1] * 10
    old["label"] = 2 - old["label"]
    np.savez(path, format=np.int64(1), **old)
    assert verify_shards(root) == []


def test_index_has_sizes_and_sums(tmp_path: Path) -> None:
    root = tmp_path / "imagenet"
    pixels = foreign_shards(root)
    index = ShardIndex.load(index_shards(root, quiet), "train", 3)
    for i, key in enumerate(index.keys.tolist()):
        content = index.files.read(int(index.shard[i]), int(index.offset[i]), int(index.size[i]))
        assert index.crc[i] == zlib.crc32(content)
        assert (index.height[i], index.width[i]) == pixels[key].shape[:2]


def test_fingerprint_follows_names_and_hashes() -> None:
    manifest = ShardManifest.load(SAMPLE)
    first, second = manifest.entries("test")
    prints = {
        ShardManifest(SAMPLE, (), {"test": entries}).fingerprint("test")
        for entries in ((first, second), (second, first), (first,), (first, type(first)("b", 1, 1, first.sha256)))
    }
    assert len(prints) == 4 and manifest.fingerprint("test") in prints
