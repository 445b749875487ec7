"""Every bad input gives one sentence that names file, key and value and says what to do."""

import dataclasses
import io
import json
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lgp_dist.config.run_config import AugmentConfig, DataConfig, TrainConfig
from lgp_dist.data.shards.decode import decode_image
from lgp_dist.data.shards.index import ShardIndex, index_shards
from lgp_dist.data.shards.manifest import ShardManifest
from lgp_dist.data.stream import TrainStream, evaluation_batches, open_split
from lgp_dist.errors import UserError


def png(side: int = 8) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(side).integers(0, 256, (side, side), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def samples(count: int, **changed: bytes) -> list[tuple[str, bytes]]:
    """Samples s0, s1, ... of two classes, some with replaced images."""
    members = []
    for number in range(count):
        members += [(f"s{number}.png", changed.get(f"s{number}", png())), (f"s{number}.cls", b"%d" % (number % 2))]
    return members


def data_for(root: Path, **changes: object) -> DataConfig:
    plain = DataConfig(
        root=str(root), image_size=8, channels=1, num_classes=2, mean=(0.5,), std=(0.5,), threads=0, crop_pct=1.0
    )
    return dataclasses.replace(plain, **{"augment": AugmentConfig(), **changes})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two good shards of six samples."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for number in range(2):
        write_tar(folder / f"mine-train-{number}.tar", samples(6))
    index_shards(folder, lambda line: None)
    return folder


def sentence(call: object, *arguments: object) -> str:
    """The text of the UserError that a call raises: one sentence."""
    with pytest.raises(UserError) as caught:
        call(*arguments)  # type: ignore[operator]
    text = str(caught.value)
    assert "\n" not in text and text.endswith(".") and ":" in text, text
    return text


def edit(root: Path, **changes: object) -> None:
    """Changes the first training shard's entry, or top-level keys, of the manifest."""
    stored = json.loads((root / "manifest.json").read_text())
    for key, value in changes.items():
        (stored if key in stored else stored["splits"]["train"][0])[key] = value
    (root / "manifest.json").write_text(json.dumps(stored))


def test_missing_folder_and_manifest(tmp_path: Path) -> None:
    text = sentence(open_split, data_for(tmp_path / "nowhere"), "train")
    assert "no folder" in text and "nowhere" in text and "data.root" in text
    text = sentence(open_split, data_for(tmp_path), "train")
    assert f"{tmp_path}/manifest.json does not exist" in text and f"lgp shards index {tmp_path}" in text


def test_unknown_split_names_those_there_are(root: Path) -> None:
    text = sentence(open_split, data_for(root), "validation")
    assert "no split 'validation'" in text and "(train)" in text and "data.val_split" in text


@pytest.mark.parametrize(
    ("changes", "pieces"),
    [
        ({"name": "/etc/passwd"}, ("splits.train.0.name", "'/etc/passwd'", "inside the folder")),
        ({"name": "../other.tar"}, ("splits.train.0.name", "'../other.tar'")),
        ({"name": "a/../../b.tar"}, ("splits.train.0.name",)),
        ({"name": 3}, ("splits.train.0.name", "is 3")),
        ({"name": "mine-train-1.tar"}, ("splits.train", "each shard once")),
        ({"bytes": -1}, ("splits.train.0.bytes", "-1")),
        ({"samples": True}, ("splits.train.0.samples", "True")),
        ({"sha256": "abc"}, ("splits.train.0.sha256", "'abc'", "64 hex digits")),
        ({"format": 9}, ("format", "9")),
        ({"splits": {"../x": []}}, ("splits", "'../x'")),
        ({"splits": []}, ("splits", "[]")),
        ({"classes": [1]}, ("classes", "[1]")),
    ],
)
def test_manifest_values(root: Path, changes: dict, pieces: tuple[str, ...]) -> None:
    edit(root, **changes)
    text = sentence(ShardManifest.load, root)
    assert all(piece in text for piece in (*pieces, str(root / "manifest.json"))), text


def test_manifest_that_is_no_json(root: Path) -> None:
    (root / "manifest.json").write_text('{"format": 1,')
    assert "manifest.json cannot be read" in sentence(ShardManifest.load, root)


def test_missing_shard(root: Path) -> None:
    (root / "mine-train-1.tar").unlink()
    text = sentence(open_split, data_for(root), "train")
    assert f"{root}/mine-train-1.tar is missing" in text and "copy" in text


def test_truncated_shard(root: Path) -> None:
    path = root / "mine-train-1.tar"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-512])
    text = sentence(open_split, data_for(root), "train")
    assert str(path) in text and f"has {size - 512} bytes" in text and f"wants {size}" in text


@pytest.mark.parametrize("keep", [1000, 512 * 5, 512 * 4])
def test_truncated_shard_is_not_indexed(root: Path, keep: int) -> None:
    before = (root / "manifest.json").read_bytes()
    path = root / "mine-train-1.tar"
    path.write_bytes(path.read_bytes()[:keep])
    text = sentence(index_shards, root, lambda line: None)
    assert str(path) in text and "copy the file again" in text
    assert (root / "manifest.json").read_bytes() == before


def test_shard_cut_while_running(root: Path) -> None:
    data = data_for(root)
    index = open_split(data, "train")
    path = root / "mine-train-0.tar"
    path.write_bytes(path.read_bytes()[:700])
    text = sentence(list, evaluation_batches(index, data, 4, 0, 1))
    assert str(path) in text and "ends before byte" in text
    (root / "mine-train-1.tar").unlink()
    index = dataclasses.replace(index, **{name: getattr(index, name)[6:] for name in ("shard", "offset", "size")})
    text = sentence(list, evaluation_batches(index, data, 4, 0, 1))
    assert "mine-train-1.tar cannot be read (No such file" in text


@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize("content", [b"these are no pixels", png()[:-30]])
def test_undecodable_image_with_and_without_threads(root: Path, threads: int, content: bytes) -> None:
    path = root / "mine-train-1.tar"
    write_tar(path, samples(6, s3=content))
    index_shards(root, lambda line: None)
    data = data_for(root, threads=threads)
    stream = TrainStream(open_split(data, "train"), data, TrainConfig(batch_size=4), 0, 0, 1)
    reason = "truncated" if content[:4] == png()[:4] else "no image"
    for batches in (stream.batches(0, 3), evaluation_batches(stream.index, data, 4, 0, 1)):
        text = sentence(list, batches)
        assert f"shard {path}, sample s3 cannot be decoded" in text and reason in text and "Traceback" not in text


@pytest.mark.parametrize(("side", "reason"), [(9000, "9000 x 9000 pixels are more"), (20000, "400000000 pixels")])
def test_giant_image_is_refused_before_it_is_decoded(side: int, reason: str) -> None:
    def chunk(name: bytes, body: bytes) -> bytes:
        return len(body).to_bytes(4, "big") + name + body + zlib.crc32(name + body).to_bytes(4, "big")

    header = side.to_bytes(4, "big") * 2 + bytes([8, 0, 0, 0, 0])
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    text = sentence(decode_image, content, 1, "shard x.tar, sample s")
    assert "shard x.tar, sample s cannot be decoded" in text and reason in text
    assert "data.channels is 4" in sentence(decode_image, png(), 4, "shard x.tar, sample s")


def test_label_out_of_range(root: Path) -> None:
    path = root / "mine-train-1.tar"
    write_tar(path, [*samples(2), ("s2.png", png()), ("s2.cls", b"5")])
    manifest = index_shards(root, lambda line: None, accept_missing=True)
    for _ in range(2):
        text = sentence(ShardIndex.load, manifest, "train", 2)
        assert f"shard {path}, sample s2, the label is 5" in text and "0 .. 1" in text and "data.num_classes" in text
        (root / "index-train.npz").unlink(missing_ok=True)


def test_number_of_classes_differs(root: Path) -> None:
    edit(root, classes=["a", "b"])
    text = sentence(open_split, data_for(root, num_classes=1000), "train")
    assert "has 2 classes but data.num_classes is 1000" in text and "set data.num_classes to 2" in text


@pytest.mark.parametrize(
    ("members", "pieces"),
    [
        ([("a.cls", b"0")], ("sample a", "has no image")),
        ([("a.png", png())], ("sample a", "has no label")),
        ([("a.png", png()), ("a.cls", b"cat")], ("sample a", "'cat'", "whole number")),
        ([("a.png", png()), ("a.jpg", png()), ("a.cls", b"0")], ("sample a", "more than once")),
        ([*samples(2), *samples(1)], ("sample s0", "more than once")),
    ],
)
def test_bad_samples(root: Path, members: list[tuple[str, bytes]], pieces: tuple[str, ...]) -> None:
    path = root / "mine-train-1.tar"
    write_tar(path, members)
    for call in (
        lambda: index_shards(root, lambda line: None),
        lambda: ShardIndex.load(dataclasses.replace(ShardManifest.load(root)), "train", 2),
    ):
        (root / "index-train.npz").unlink(missing_ok=True)
        text = sentence(call)
        assert all(piece in text for piece in (*pieces, str(path))), text


@pytest.mark.parametrize("content", [b"", bytes(10240), b"no tar at all"])
def test_shard_without_samples(root: Path, content: bytes) -> None:
    before = (root / "manifest.json").read_bytes()
    path = root / "mine-train-1.tar"
    path.write_bytes(content)
    text = sentence(index_shards, root, lambda line: None)
    assert str(path) in text and "copy the file again" in text
    assert (root / "manifest.json").read_bytes() == before


def test_index_of_a_folder_without_shards(tmp_path: Path) -> None:
    assert f"{tmp_path} has no shard whose name ends in" in sentence(index_shards, tmp_path, print)
    assert "no folder" in sentence(index_shards, tmp_path / "x", print)


@pytest.mark.parametrize(
    ("train", "world", "pieces"),
    [
        (TrainConfig(batch_size=10), 4, ("batch_size 10", "world size 4", "accumulate 1", "set batch_size to 8 or 12")),
        (TrainConfig(batch_size=10, accumulate=3), 2, ("accumulate 3", "set batch_size to 6 or 12")),
        (TrainConfig(batch_size=11), 4, ("set batch_size to 8 or 12",)),
        (TrainConfig(batch_size=3), 4, ("set batch_size to 4",)),
        (TrainConfig(batch_size=12), 13, ("use fewer ranks",)),
        (TrainConfig(batch_size=12, mixup=0.8), 4, ("even parts", "mixup", "set batch_size to 8")),
        (TrainConfig(batch_size=16), 2, ("12 images cannot feed a batch of 16", "world size 2", "12 or less")),
    ],
)
def test_batch_that_does_not_fit(root: Path, train: TrainConfig, world: int, pieces: tuple[str, ...]) -> None:
    data = data_for(root)
    text = sentence(TrainStream, open_split(data, "train"), data, train, 0, 0, world)
    assert all(piece in text for piece in pieces), text


def test_threads_and_evaluation_batch(root: Path) -> None:
    data = data_for(root, threads=-1)
    index = open_split(data, "train")
    assert "data.threads is -1" in sentence(list, evaluation_batches(index, data, 4, 0, 1))
    assert "batch_size is 0" in sentence(list, evaluation_batches(index, data, 0, 0, 1))
