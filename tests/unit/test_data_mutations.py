"""Mutated tars: no crash, no hang, and every sample that a reader would lose or read changed is named.

What a reader would get is asked of others: Python's tarfile as webdataset uses it (from the start, in order), and the
bytes at the places of the index, as our own reader takes them.
"""

import io
import os
import random
import shutil
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from shard_helpers import image, quiet, tar_of

from lgp_dist.config.run_config import DataConfig
from lgp_dist.data.loader import Loader, Plan
from lgp_dist.data.shards.index import ShardIndex, index_shards, sidecar_path
from lgp_dist.data.shards.manifest import ShardManifest
from lgp_dist.data.shards.scan import scan_shard
from lgp_dist.data.shards.verify import Problem, summary, verify_shards
from lgp_dist.errors import UserError

COUNT = int(os.environ.get("LGP_MUTATIONS", "10000"))
"""Of the slow run."""
SAMPLES = 20
DATA = DataConfig(image_size=8, channels=3, mean=(0.5,) * 3, std=(0.5,) * 3, max_bad=SAMPLES, threads=0)
KINDS = ("flip", "cut", "zero", "duplicate", "swap", "insert", "delete")
SHARD = "x-train-0000.tar"


@dataclass(frozen=True)
class Case:
    """A good shard of SAMPLES samples in a folder with manifest and index."""

    root: Path
    content: bytes
    index: ShardIndex
    truth: dict[str, tuple[bytes, bytes]]
    """Key -> label and image."""
    starts: dict[str, tuple[int, int]]
    """Key -> first and last byte of its part of the tar."""

    @property
    def path(self) -> Path:
        return self.root / SHARD


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    root = tmp_path_factory.mktemp("mutations")
    members, truth = [], {}
    for n in range(SAMPLES):
        key = f"s{n:02d}" if n % 7 else f"a/{'long' * 30}/s{n:02d}"
        truth[key] = (str(n % 3).encode(), image(n))
        members += [(f"{key}.cls", truth[key][0]), (f"{key}.jpg", truth[key][1])]
    content = tar_of(members)
    (root / SHARD).write_bytes(content)
    index = ShardIndex.load(index_shards(root, quiet), "train", 3)
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        found = [(member.name.rsplit(".", 1)[0], member.offset) for member in tar]
    first = {key: min(offset for other, offset in found if other == key) for key in truth}
    bounds = sorted(first.values())
    starts = {key: (at, min([b for b in bounds if b > at], default=len(content))) for key, at in first.items()}
    return Case(root, content, index, truth, starts)


def mutate(content: bytes, draw: random.Random) -> bytes:
    """One to three changes, half of them to the blocks of headers."""
    data = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        kind = draw.choice(KINDS)
        block = draw.randrange(max(len(data) // 512, 1)) * 512
        at = block + draw.choice((draw.randrange(512), draw.choice((0, 100, 124, 135, 148, 156, 257, 345))))
        size = draw.choice((1, 7, 100, 512, 512, 1024, draw.randrange(1, 5000)))
        start = draw.choice((at, block))
        part = bytes(data[start : start + size])
        if kind == "flip" and at < len(data):
            data[at] ^= 1 << draw.randrange(8)
        elif kind == "cut":
            del data[start:]
        elif kind == "zero":
            data[start : start + size] = bytes(len(part))
        elif kind == "duplicate":
            data[start:start] = part
        elif kind == "swap":
            other = draw.randrange(max(len(data) // 512, 1)) * 512
            one, two = bytes(data[block : block + 512]), bytes(data[other : other + 512])
            if len(one) == len(two):
                data[block : block + 512], data[other : other + 512] = two, one
        elif kind == "insert":
            data[start:start] = draw.randbytes(size) if draw.random() < 0.5 else bytes(size)
        elif kind == "delete":
            del data[start : start + size]
    return bytes(data)


def by_tarfile(content: bytes) -> dict[str, tuple[bytes, bytes]]:
    """Whole samples for a reader that takes files in order and silently stops where tarfile does."""
    groups: list[tuple[str, dict[str, bytes]]] = []
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r|") as tar:
            for member in tar:
                key, dot, extension = member.name.partition(".")
                if not member.isreg() or member.issparse() or not dot or member.size > len(content):
                    continue
                stream = tar.extractfile(member)
                if not groups or groups[-1][0] != key or extension in groups[-1][1]:
                    groups.append((key, {}))
                groups[-1][1][extension] = stream.read() if stream else b""
    except (tarfile.TarError, OSError, EOFError, ValueError, OverflowError, MemoryError):
        pass
    return {key: (parts["cls"], parts["jpg"]) for key, parts in groups if {"cls", "jpg"} <= parts.keys()}


def changed_for_readers(case: Case, content: bytes) -> set[str]:
    """Keys of samples that tarfile reads changed or not at all, or that are not where the index has them."""
    read = by_tarfile(content)
    lost = {key for key, parts in case.truth.items() if read.get(key) != parts}
    for i, key in enumerate(case.index.keys.tolist()):
        start = int(case.index.offset[i])
        if content[start : start + int(case.index.size[i])] != case.truth[key][1]:
            lost.add(key)
    return lost


def check(case: Case, seed: int) -> tuple[set[str], list[Problem]]:
    """Verifies one mutated shard; returns the samples that readers would lose and the problems found."""
    content = mutate(case.content, random.Random(seed))
    case.path.write_bytes(content)
    problems = verify_shards(case.root)
    named = {problem.key for problem in problems}
    lost = changed_for_readers(case, content)
    assert lost <= named, f"seed {seed}: {sorted(lost - named)} lost and not named"
    if content == case.content:
        assert not problems, seed
        return lost, problems
    assert problems and problems[0].shard == SHARD and problems[0].reason in ("size", "hash"), seed
    first = next((i for i, (a, b) in enumerate(zip(content, case.content, strict=False)) if a != b), len(content))
    before = {key for key, (_, end) in case.starts.items() if end <= first}
    twice = {problem.key for problem in problems if problem.reason == "sample"}
    assert not (named - twice) & before, f"seed {seed}: named but untouched"
    text = summary(case.root, problems)
    assert "\n" not in text and text.isprintable()
    return lost, problems


def run(case: Case, seeds: range) -> str:
    counted = tars = named = 0
    try:
        for seed in seeds:
            lost, problems = check(case, seed)
            counted, tars = counted + len(lost), tars + bool(lost)
            named += len({problem.key for problem in problems} & case.truth.keys())
    finally:
        case.path.write_bytes(case.content)
    assert counted > len(seeds)
    assert verify_shards(case.root) == []
    return f"{len(seeds)} tars, {tars} of which lose samples for some reader: {counted} samples, {named} named"


@pytest.mark.slow
def test_mutated_tars(case: Case) -> None:
    run(case, range(400))


@pytest.mark.skipif("LGP_MUTATIONS" not in os.environ, reason="set LGP_MUTATIONS=10000 for the long run")
def test_many_mutated_tars(case: Case) -> None:
    print(run(case, range(1000, 1000 + COUNT)))


def read_for_training(case: Case, seed: int) -> int:
    """Reads a mutated shard whose size fits its manifest as a run does; how many samples have other bytes.

    Each of them must be counted as bad and named, and no other.
    """
    content = mutate(case.content, random.Random(seed))
    if len(content) != len(case.content):
        return 0  # refused at the start
    case.path.write_bytes(content)
    places = zip(case.index.offset.tolist(), case.index.size.tolist(), strict=True)
    changed = {n for n, (at, size) in enumerate(places) if content[at : at + size] != case.content[at : at + size]}
    loader = Loader(case.index, DATA, torch.device("cpu"))
    (found,) = loader.load([Plan(np.arange(SAMPLES), replaces=False)])
    assert {sample for sample, _ in found.bad} == changed, f"seed {seed}"
    assert all(case.index.describe(sample) in str(reason) for sample, reason in found.bad)
    assert set(found.samples.tolist()) - {-1} == set(range(SAMPLES)) - changed
    return len(changed)


def test_training_takes_no_changed_image(case: Case) -> None:
    """This holds for bytes that still decode, such as another sample's."""
    try:
        assert sum(read_for_training(case, seed) for seed in range(400)) > 100
    finally:
        case.path.write_bytes(case.content)


@pytest.mark.skipif("LGP_MUTATIONS" not in os.environ, reason="set LGP_MUTATIONS=10000 for the long run")
def test_training_takes_no_changed_image_of_many(case: Case) -> None:
    try:
        print(sum(read_for_training(case, seed) for seed in range(1000, 1000 + COUNT)), "samples changed")
    finally:
        case.path.write_bytes(case.content)


def index_alone(case: Case, seed: int, folder: Path) -> tuple[int, int]:
    """Indexes a mutated tar as new: refused with a sentence, or every sample that is indexed is where the index says,
    and what tarfile reads there; samples that were taken, and those whose bytes no longer are the truth."""
    folder.mkdir(parents=True)
    content = mutate(case.content, random.Random(seed))
    (folder / SHARD).write_bytes(content)
    try:
        manifest = index_shards(folder, quiet)
    except UserError as error:
        assert str(folder / SHARD) in str(error) and "\n" not in str(error), seed
        assert [path.name for path in folder.iterdir()] == [SHARD], seed
        return 0, 0
    read = by_tarfile(content)
    samples, _ = scan_shard(folder / SHARD)
    assert {sample.key for sample in samples} == read.keys(), seed
    for sample in samples:
        assert content[sample.offset : sample.offset + sample.size] == read[sample.key][1], seed
        assert sample.label == int(read[sample.key][0]), seed
    assert manifest.entries("train")[0].samples == len(samples)
    return len(samples), sum(read[sample.key] != case.truth.get(sample.key) for sample in samples)


def index_many(case: Case, seeds: range, root: Path) -> str:
    taken = wrong = tars = 0
    for seed in seeds:
        folder = root / str(seed)
        found = index_alone(case, seed, folder)
        tars, taken, wrong = tars + bool(found[0]), taken + found[0], wrong + found[1]
        shutil.rmtree(folder)
    return f"{len(seeds)} tars without manifest, {tars} taken: {wrong} of {taken} samples have other bytes or labels"


def test_mutated_tars_without_manifest(case: Case, tmp_path: Path) -> None:
    index_many(case, range(0, 400, 10), tmp_path)


@pytest.mark.skipif("LGP_MUTATIONS" not in os.environ, reason="set LGP_MUTATIONS=10000 for the long run")
def test_many_mutated_tars_without_manifest(case: Case, tmp_path: Path) -> None:
    print(index_many(case, range(1000, 1000 + COUNT), tmp_path))


@pytest.mark.parametrize("kind", ["header zeroed", "two tars in one", "cut after a sample", "no end mark"])
def test_silent_ends_are_refused_without_manifest(case: Case, kind: str, tmp_path: Path) -> None:
    """tarfile, and so webdataset, silently stops here."""
    start = case.starts["s05"][0]
    whole = case.content
    content = {
        "header zeroed": whole[:start] + bytes(512) + whole[start + 512 :],
        "two tars in one": whole + whole,
        "cut after a sample": whole[:start],
        "no end mark": whole.rstrip(b"\0") + bytes(-len(whole.rstrip(b"\0")) % 512),
    }[kind]
    assert 0 < len(by_tarfile(content)) <= SAMPLES
    (tmp_path / SHARD).write_bytes(content)
    with pytest.raises(UserError, match="damaged or cut off"):
        index_shards(tmp_path, quiet)


def test_without_an_index_the_shard_is_named_and_counted(case: Case, tmp_path: Path) -> None:
    (tmp_path / SHARD).write_bytes(case.content)
    index_shards(tmp_path, quiet)
    sidecar_path(tmp_path, "train").unlink()
    start, end = case.starts["s05"]
    (tmp_path / SHARD).write_bytes(case.content[:start] + case.content[end:])
    found = verify_shards(tmp_path)
    assert [problem.reason for problem in found] == ["size", "count"]
    assert f"has {SAMPLES - 1} samples but the manifest wants {SAMPLES}" in found[1].sentence


@pytest.mark.parametrize(
    ("kind", "size"),
    [(b"0", 2**60), (b"0", -1), (b"x", 2**40), (b"L", 2**40), (b"S", 512), (b"g", 2**40), (b"5", 2**60)],
)
def test_traps_end_at_once(kind: bytes, size: int, tmp_path: Path) -> None:
    """Sizes that make tarfile loop or fill the memory, a sparse file, a directory with a size."""
    header = bytearray(tar_of([("s.jpg", image(1))])[:512])
    header[124:136] = b"\x80" + size.to_bytes(11, "big") if size >= 0 else b"\xff" * 12
    header[156:157] = kind
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / SHARD).write_bytes(bytes(header) + bytes(1024))
    samples, flaws = scan_shard(tmp_path / SHARD)
    assert not samples and (len(flaws) == 1 or kind == b"5")
    assert ShardManifest(tmp_path, (), {}).root == tmp_path


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_of_all_kinds_agree_with_tarfile(form: int, tmp_path: Path) -> None:
    names = ["a.cls", "ü/é.cls", f"{'d' * 90}/{'f' * 90}.cls", "dir.x/k.cls"]
    if form != tarfile.USTAR_FORMAT:
        names += ["long" * 60 + ".cls", "ß" * 120 + ".cls"]
    path = tmp_path / "t.tar"
    with tarfile.open(path, "w", format=form) as tar:
        tar.addfile(tarfile.TarInfo("folder/"))
        link = tarfile.TarInfo("link.cls")
        link.type, link.linkname = tarfile.SYMTYPE, "l" * (80 if form == tarfile.USTAR_FORMAT else 200)
        tar.addfile(link)
        for n, name in enumerate(names):
            for member, content in ((name, b"%d" % n), (name[:-3] + "png", image(n, "PNG"))):
                info = tarfile.TarInfo(member)
                info.size, info.mtime = len(content), 1.5 if form == tarfile.PAX_FORMAT else 1
                tar.addfile(info, io.BytesIO(content))
    samples, flaws = scan_shard(path)
    assert flaws == [] and [sample.key for sample in samples] == [name[:-4] for name in names]
    with tarfile.open(path) as tar:
        wanted = [(member.offset_data, member.size) for member in tar if member.name.endswith("png")]
    assert [(sample.offset, sample.size) for sample in samples] == wanted
    assert np.unique([sample.width for sample in samples]).tolist() == [20]


@pytest.mark.skipif(shutil.which("tar") is None, reason="there is no tar command")
@pytest.mark.parametrize("form", ["v7", "oldgnu", "gnu", "ustar", "posix"])
def test_tars_of_the_tar_command(form: str, tmp_path: Path) -> None:
    """Tars as people make them: sub-folders, and names over 100 bytes where the format allows them."""
    long = "n" * (60 if form == "v7" else 120)
    names = ["a", "sub.d/b", *([] if form in ("v7", "ustar") else [f"{long}/{long}/c"]), f"sub.d/{long[:90]}"]
    for number, name in enumerate(names):
        path = tmp_path / "in" / f"{name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image(number))
        (path.parent / f"{path.name[:-4]}.cls").write_text(str(number))
    files = [f"{name}.{ending}" for name in names for ending in ("jpg", "cls")]
    options = [f"--format={form}", "-cf", str(tmp_path / SHARD), "-C", str(tmp_path / "in")]
    subprocess.run(["tar", *options, *files], check=True)
    samples, flaws = scan_shard(tmp_path / SHARD)
    assert flaws == [] and [(sample.key, sample.label) for sample in samples] == [(n, i) for i, n in enumerate(names)]
    content = (tmp_path / SHARD).read_bytes()
    assert all(content[s.offset : s.offset + s.size] == image(i) for i, s in enumerate(samples))
