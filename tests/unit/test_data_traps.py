"""Shards from strangers: every kind of key has one outcome, names touch no files, bombs take little memory."""

import gzip
import io
import json
import os
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from run_helpers import LIMIT_S, snapshot
from shard_helpers import image, quiet, tar_of

from lgp_dist.config.run_config import DataConfig, TrainConfig
from lgp_dist.data.shards.index import ShardIndex, index_shards
from lgp_dist.data.shards.verify import verify_shards
from lgp_dist.data.stream import TrainStream, open_split
from lgp_dist.errors import UserError

SHARD = "x-train-0000.tar"
A, B, LABEL, OTHER = image(1), image(2), b"1", b"2"
KEYS: dict[str, tuple[list[tuple[str, bytes]], list[tuple[str, int, bytes]] | str]] = {
    "plain": ([("a.jpg", A), ("a.cls", LABEL)], [("a", 1, A)]),
    "label first": ([("a.cls", LABEL), ("a.jpg", A)], [("a", 1, A)]),
    "twice, adjacent": ([("a.jpg", A), ("a.cls", LABEL)] * 2, "sample a more than once"),
    "twice, far apart": (
        [("a.jpg", A), ("a.cls", LABEL), ("b.jpg", B), ("b.cls", OTHER), ("a.jpg", B), ("a.cls", LABEL)],
        "sample a more than once",
    ),
    "interleaved": ([("a.jpg", A), ("b.jpg", B), ("a.cls", LABEL), ("b.cls", OTHER)], "sample a more than once"),
    "dotted": ([("img.v1.jpg", A), ("img.v1.cls", LABEL)], "sample img, has no image"),
    "dotted folder": ([("v1.0/a.jpg", A), ("v1.0/a.cls", LABEL)], [("v1.0/a", 1, A)]),
    "case of key": (
        [("a.jpg", A), ("a.cls", LABEL), ("A.jpg", B), ("A.cls", OTHER)],
        [("a", 1, A), ("A", 2, B)],
    ),
    "case of extension": ([("a.JPG", A), ("a.CLS", LABEL)], [("a", 1, A)]),
    "two images": ([("a.jpg", A), ("a.png", B), ("a.cls", LABEL)], "sample a more than once"),
    "two labels": ([("a.jpg", A), ("a.cls", LABEL), ("a.cls", OTHER)], "sample a more than once"),
    "hidden and other files": (
        [("__meta__", b"x"), ("README", b"x"), ("a.jpg", A), ("a.cls", LABEL), ("a.txt", b"x")],
        [("a", 1, A)],
    ),
    "same name in two folders": (
        [("n1/a.jpg", A), ("n1/a.cls", LABEL), ("n2/a.jpg", B), ("n2/a.cls", OTHER)],
        [("n1/a", 1, A), ("n2/a", 2, B)],
    ),
}
"""Members, and the samples (key, label, image) or a piece of the sentence."""


@pytest.mark.parametrize("kind", KEYS)
def test_keys_have_one_outcome(tmp_path: Path, kind: str) -> None:
    """A sample of the tar is never silently left out."""
    members, expected = KEYS[kind]
    (tmp_path / SHARD).write_bytes(tar_of(members))
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected):
            index_shards(tmp_path, quiet)
        return
    index = ShardIndex.load(index_shards(tmp_path, quiet), "train", 3)
    found = [(str(index.keys[i]), int(index.label[i]), index.content(i)) for i in range(len(index))]
    assert found == expected


NAMES = [
    "../../outside/x",
    "/etc/passwd",
    "../x",
    "a/../../x",
    "~/x",
    "C:\\x",
    "x\ny",
    "pipe:touch ran; x",
    "$(touch ran)",
]


def test_names_of_members_lead_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A member's name is a key, not a path: indexing, verifying, reading and naming it touch no file."""
    root = tmp_path / "a" / "b"
    root.mkdir(parents=True)
    monkeypatch.chdir(root)
    members = [(f"{name}.{part}", content) for name in NAMES for part, content in (("jpg", A), ("cls", LABEL))]
    (root / SHARD).write_bytes(tar_of(members))
    index_shards(root, quiet)
    before = snapshot(tmp_path)
    data = DataConfig(root=str(root), num_classes=3, image_size=16, threads=0)
    index = open_split(data, "train")
    assert len(index) == len(NAMES) and verify_shards(root) == []
    stream = TrainStream(index, data, TrainConfig(batch_size=len(NAMES)), 0, 0, 1)
    assert len(next(stream.batches(0, 1)).images) == len(NAMES)
    for i in range(len(index)):
        assert index.describe(i).isprintable()
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE])
def test_members_that_are_no_files_are_no_samples(tmp_path: Path, kind: bytes) -> None:
    """A link to /etc/passwd, a device or a pipe is no image: the sample that has nothing else is named."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in (("a.jpg", A), ("a.cls", LABEL), ("b.cls", OTHER)):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        trap = tarfile.TarInfo("b.jpg")
        trap.type, trap.linkname = kind, "/etc/passwd"
        tar.addfile(trap)
    (tmp_path / SHARD).write_bytes(buffer.getvalue())
    with pytest.raises(UserError, match="sample b, has no image"):
        index_shards(tmp_path, quiet)


def test_shard_that_vanishes_or_empties_between_steps_is_named(tmp_path: Path) -> None:
    """With data.max_bad 0 the run stops there; within a limit they are counted (test_data_stream.py)."""
    for number in range(2):
        members = [(f"s{number}{n}.{p}", c) for n in range(6) for p, c in (("jpg", image(n)), ("cls", LABEL))]
        (tmp_path / f"x-train-{number:04d}.tar").write_bytes(tar_of(members))
    index_shards(tmp_path, quiet)
    data = DataConfig(root=str(tmp_path), num_classes=3, image_size=16, threads=0)
    for damage, piece in (
        (lambda path: path.write_bytes(b""), "ends before byte"),
        (lambda path: path.unlink(), "No such file"),
    ):
        stream = TrainStream(open_split(data, "train"), data, TrainConfig(batch_size=4), 0, 0, 1)
        damage(tmp_path / SHARD)
        with pytest.raises(UserError) as caught:
            list(stream.batches(0, 6))
        assert str(tmp_path / SHARD) in str(caught.value) and piece in str(caught.value)
        (tmp_path / SHARD).write_bytes(
            tar_of([(f"s0{n}.{p}", c) for n in range(6) for p, c in (("jpg", image(n)), ("cls", LABEL))])
        )


def png_bomb(side: int) -> bytes:
    """A true PNG of side x side black pixels."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return len(body).to_bytes(4, "big") + name + body + zlib.crc32(name + body).to_bytes(4, "big")

    packer, rows = zlib.compressobj(9), bytes(100 * (side + 1))
    body = b"".join(packer.compress(rows) for _ in range(side // 100)) + packer.flush()
    header = side.to_bytes(4, "big") * 2 + bytes([8, 0, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def jpeg_bomb() -> bytes:
    """A JPEG whose header claims 65,500 x 65,500 pixels."""
    content = bytearray(A)
    frame = content.index(b"\xff\xc0")
    content[frame + 5 : frame + 9] = (65_500).to_bytes(2, "big") * 2
    return bytes(content)


CHILD = """
import json, resource, sys
from pathlib import Path
from lgp_dist.data.shards.decode import decode_image
from lgp_dist.data.shards.index import index_shards
from lgp_dist.errors import UserError

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

decode_image((Path(sys.argv[1]) / "good.jpg").read_bytes(), 3, "good")
found, before = {}, peak()
for path in sorted(Path(sys.argv[1]).iterdir()):
    try:
        if path.is_dir():
            index_shards(path, lambda line: None)
        else:
            decode_image(path.read_bytes(), 3, path.name)
        found[path.name] = ""
    except UserError as error:
        found[path.name] = str(error)
print(json.dumps({"rise": peak() - before, "found": found}))
"""


@pytest.mark.slow
def test_bombs_stay_small(tmp_path: Path) -> None:
    """Compressed tars, empty tars and images of hundreds of megapixels are refused within 200 MB of memory."""
    (tmp_path / "good.jpg").write_bytes(A)
    for side in (9_000, 13_000, 20_000):
        (tmp_path / f"{side}.png").write_bytes(png_bomb(side))
    (tmp_path / "65500.jpg").write_bytes(jpeg_bomb())
    for name, size in (("gzip", 1 << 29), ("sparse", 0)):
        (tmp_path / name).mkdir()
        with (tmp_path / name / SHARD).open("wb") as file:
            if size:
                with gzip.GzipFile(fileobj=file, mode="wb", compresslevel=1) as packed:
                    for _ in range(size >> 20):
                        packed.write(bytes(1 << 20))
            else:
                file.truncate(1 << 29)
    call = [sys.executable, "-c", CHILD, str(tmp_path)]
    child = subprocess.run(call, capture_output=True, text=True, timeout=LIMIT_S)
    assert child.returncode == 0, child.stderr
    result = json.loads(child.stdout)
    refused = {name: text for name, text in result["found"].items() if name != "good.jpg"}
    assert result["found"]["good.jpg"] == "" and all(refused.values()), refused
    assert all("cannot be decoded" in text or "copy the file again" in text for text in refused.values()), list(
        refused.values()
    )
    assert result["rise"] < 200, result


@pytest.mark.slow
def test_a_great_many_tiny_members(tmp_path: Path) -> None:
    """Each of many small members is read; LGP_MEMBERS=1000000 makes a shard of 1 GB."""
    count = int(os.environ.get("LGP_MEMBERS", "20000"))
    header = np.frombuffer(tar_of([("s0000000.cls", b"1")])[:512], dtype=np.uint8)
    blocks = np.zeros((count, 2, 512), dtype=np.uint8)
    blocks[:, 0], blocks[:, 1, 0] = header, ord("1")
    digits = np.array([list(f"{n:07d}".encode()) for n in range(count)], dtype=np.uint8)
    blocks[:, 0, 1:8] = digits
    total = header.astype(np.int64).sum() - header[148:156].sum() + 8 * 32 - header[1:8].sum() + digits.sum(1)
    blocks[:, 0, 148:156] = np.array([list(f"{int(n):06o}\0 ".encode()) for n in total], dtype=np.uint8)
    (tmp_path / SHARD).write_bytes(blocks.tobytes() + bytes(1024))
    with pytest.raises(UserError, match="sample s0000000, has no image"):
        index_shards(tmp_path, quiet)
