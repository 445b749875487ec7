"""Where every sample of a split lies: built once from the tar headers, kept in a sidecar file beside the shards."""

import io
import re
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lgp_dist.data.decode import ShardFiles, decode_image
from lgp_dist.data.manifest import MANIFEST_NAME, ShardEntry, ShardManifest, hash_file, write_file
from lgp_dist.data.scan import Sample, scan_shard
from lgp_dist.errors import UserError

SIDECAR_FORMAT = 1
_SHARD_NAME = re.compile(r"(?:.*-)?(train|val|validation|test)-\d+\.tar")
"""timm's naming: imagenet1k-train-0000.tar belongs to split train."""


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """All samples of a split, in the order of the manifest's shards and of each tar. Arrays have length n."""

    root: Path
    """Folder of the shards."""
    shards: tuple[str, ...]
    """Names of the tars inside root."""
    shard: NDArray[np.int32]
    """Number of the sample's tar in `shards`."""
    offset: NDArray[np.int64]
    """First byte of the image in its tar."""
    size: NDArray[np.int64]
    """Bytes of the image."""
    label: NDArray[np.int64]
    """Class number."""
    keys: NDArray[np.str_]
    """Name of the sample in its tar."""
    files: ShardFiles
    """Reads the bytes."""

    def __len__(self) -> int:
        return len(self.shard)

    def describe(self, i: int) -> str:
        """Shard and key of sample i, for sentences."""
        return f"shard {self.root / self.shards[self.shard[i]]}, sample {self.keys[i]}"

    @staticmethod
    def load(manifest: ShardManifest, split: str, num_classes: int) -> "ShardIndex":
        """Index of a split, from root/index-SPLIT.npz if that fits the manifest, else from the tars themselves.

        Raises UserError for a sample without image or label, a key that comes twice, a label outside
        0 .. num_classes - 1 and a split without samples. Does not check the shards' sizes: see ShardManifest.check.
        """
        index = read_sidecar(manifest, split) or _scan(manifest, split)
        if not len(index):
            raise UserError(
                f"Split '{split}' of {manifest.root} has no samples: add its shards and run"
                f" `lgp shards index {manifest.root}`."
            )
        wrong = np.flatnonzero((index.label < 0) | (index.label >= num_classes))
        if len(wrong):
            raise UserError(_out_of_range(index.describe(wrong[0]), int(index.label[wrong[0]]), num_classes))
        return index


def sidecar_path(root: Path, split: str) -> Path:
    """Where the index of a split is kept."""
    return root / f"index-{split}.npz"


def index_shards(root: str | Path, progress: Callable[[str], None] = print) -> ShardManifest:
    """Makes manifest.json and the sidecars of a folder of shards from elsewhere; returns the manifest.

    Shards are the tars directly in root whose names end as in timm's `imagenet1k-train-0000.tar`; other tars are
    named to `progress` and left out. Class names, source and licence of a manifest that is there are kept.
    Raises UserError at the first shard with a problem; then nothing is written.
    """
    root = Path(root)
    found = _find_shards(root, progress)
    try:
        before = ShardManifest.load(root)
    except UserError:
        before = ShardManifest(root=root, classes=(), splits={})
    splits: dict[str, tuple[ShardEntry, ...]] = {}
    scans: dict[str, list[list[Sample]]] = {}
    for split, paths in found.items():
        entries, scans[split] = [], []
        for path in paths:
            samples, problems = scan_shard(path)
            if problems:
                more = f" (problems in this shard: {len(problems)})." if len(problems) > 1 else "."
                raise UserError(problems[0].removesuffix(".") + more)
            entries.append(ShardEntry(path.name, len(samples), path.stat().st_size, hash_file(path)))
            scans[split].append(samples)
            progress(f"{path.name}: {len(samples)} samples of {split}")
        splits[split] = tuple(entries)
    manifest = ShardManifest(root, before.classes, splits, before.source, before.licence)
    for split in splits:
        _write_sidecar(manifest, split, _join(manifest, split, scans[split]))
    manifest.write()
    return manifest


def verify_shards(root: str | Path, progress: Callable[[str], None] = lambda line: None) -> list[str]:
    """Reads everything below root and returns one sentence for each problem; an empty list means all is good.

    Checks size and hash of each shard, its structure, number of samples and unique keys, that labels are in range
    (of the manifest's classes, or not negative where it names none), that each image decodes, and the sidecars.
    Raises UserError only where there is no readable manifest.
    """
    manifest = ShardManifest.load(root)
    problems: list[str] = []
    for split, entries in manifest.splits.items():
        scans = []
        for entry in entries:
            samples, found = _verify_shard(manifest, entry)
            problems += found
            scans.append(samples)
            progress(f"{entry.name}: {len(samples)} samples, {len(found)} problems")
        stored = read_sidecar(manifest, split)
        exists = sidecar_path(manifest.root, split).exists()
        if exists and (stored is None or not _same(stored, _join(manifest, split, scans))):
            problems.append(
                f"{sidecar_path(manifest.root, split)} does not agree with the shards: delete it and run"
                f" `lgp shards index {manifest.root}`."
            )
    return problems


def _verify_shard(manifest: ShardManifest, entry: ShardEntry) -> tuple[list[Sample], list[str]]:
    """Samples of a shard and its problems."""
    path, problem = manifest.path(entry), manifest.problem(entry)
    if problem:
        return [], [problem]
    if hash_file(path) != entry.sha256:
        return [], [f"Shard {path} has another sha256 than the manifest: copy the file again."]
    samples, problems = scan_shard(path)
    if len(samples) != entry.samples and not problems:
        problems.append(f"Shard {path} has {len(samples)} samples but the manifest wants {entry.samples}: index again.")
    limit = len(manifest.classes) or np.iinfo(np.int64).max
    files = ShardFiles([path])
    for sample in samples:
        where = f"shard {path}, sample {sample.key}"
        if not 0 <= sample.label < limit:
            problems.append(_out_of_range(where, sample.label, limit))
        try:
            decode_image(files.read(0, sample.offset, sample.size), 3, where)
        except UserError as error:
            problems.append(str(error))
    return samples, problems


def _out_of_range(where: str, label: int, num_classes: int) -> str:
    """The sentence for a label that is no class."""
    return (
        f"In {where}, the label is {label} but labels must be 0 .. {num_classes - 1}:"
        " set data.num_classes to the number of classes in the shards, or build the shard again."
    )


def _find_shards(root: Path, progress: Callable[[str], None]) -> dict[str, list[Path]]:
    """Tars of each split, sorted by name; raises UserError if there are none."""
    if not root.is_dir():
        raise UserError(f"There is no folder {root}: name the folder that holds the tars.")
    found: dict[str, list[Path]] = {}
    for path in sorted(root.glob("*.tar")):
        match = _SHARD_NAME.fullmatch(path.name)
        if match:
            found.setdefault(match[1], []).append(path)
        else:
            progress(f"{path.name}: left out, its name does not end in -train-NUMBER.tar or the like")
    if not found:
        raise UserError(
            f"{root} has no shard whose name ends in train-NUMBER.tar, val-NUMBER.tar, validation-NUMBER.tar or"
            " test-NUMBER.tar: name the folder that holds the tars, or rename them."
        )
    return found


def _scan(manifest: ShardManifest, split: str) -> ShardIndex:
    """Index from the tars; raises UserError at the first problem."""
    scans = []
    for entry in manifest.entries(split):
        samples, problems = scan_shard(manifest.path(entry))
        if problems:
            raise UserError(problems[0])
        if len(samples) != entry.samples:
            raise UserError(
                f"Shard {manifest.path(entry)} has {len(samples)} samples but {manifest.root / MANIFEST_NAME} wants"
                f" {entry.samples}: run `lgp shards index {manifest.root}`."
            )
        scans.append(samples)
    return _join(manifest, split, scans)


def _join(manifest: ShardManifest, split: str, scans: Sequence[Sequence[Sample]]) -> ShardIndex:
    """Index of a split from the samples of each of its shards."""
    flat = [sample for samples in scans for sample in samples]
    return _index(
        manifest,
        split,
        np.repeat(np.arange(len(scans), dtype=np.int32), [len(samples) for samples in scans]),
        np.array([sample.offset for sample in flat], dtype=np.int64),
        np.array([sample.size for sample in flat], dtype=np.int64),
        np.array([sample.label for sample in flat], dtype=np.int64),
        np.array([sample.key for sample in flat], dtype=np.str_),
    )


def _index(
    manifest: ShardManifest,
    split: str,
    shard: NDArray[np.int32],
    offset: NDArray[np.int64],
    size: NDArray[np.int64],
    label: NDArray[np.int64],
    keys: NDArray[np.str_],
) -> ShardIndex:
    """Index of a split from its arrays."""
    entries = manifest.entries(split)
    files = ShardFiles([manifest.path(entry) for entry in entries])
    names = tuple(entry.name for entry in entries)
    return ShardIndex(manifest.root, names, shard, offset, size, label, keys, files)


def _write_sidecar(manifest: ShardManifest, split: str, index: ShardIndex) -> None:
    """Writes root/index-SPLIT.npz; the same index always gives the same bytes."""
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        format=np.int64(SIDECAR_FORMAT),
        fingerprint=np.str_(manifest.fingerprint(split)),
        shard=index.shard,
        offset=index.offset,
        size=index.size,
        label=index.label,
        keys=index.keys,
    )
    write_file(sidecar_path(manifest.root, split), buffer.getvalue())


def read_sidecar(manifest: ShardManifest, split: str) -> ShardIndex | None:
    """Index from the sidecar, or None if there is none, it is of other shards, or it cannot be right."""
    fingerprint, entries = manifest.fingerprint(split), manifest.entries(split)
    try:
        with open(sidecar_path(manifest.root, split), "rb") as stream, np.load(stream, allow_pickle=False) as stored:
            if int(stored["format"]) != SIDECAR_FORMAT or str(stored["fingerprint"]) != fingerprint:
                return None
            arrays = [stored[name] for name in ("shard", "offset", "size", "label", "keys")]
    except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    shard, offset, size, label, keys = arrays
    if [array.dtype.kind for array in arrays] != list("iiiiU") or {array.shape for array in arrays} != {shard.shape}:
        return None
    samples = np.array([entry.samples for entry in entries], dtype=np.int64)
    if shard.ndim != 1 or not np.array_equal(shard, np.repeat(np.arange(len(entries)), samples)):
        return None
    ends = np.array([entry.bytes for entry in entries], dtype=np.int64)[shard]
    if not bool(((offset >= 0) & (size >= 0) & (offset + size <= ends)).all()):
        return None
    return _index(manifest, split, shard, offset, size, label, keys)


def _same(left: ShardIndex, right: ShardIndex) -> bool:
    """Whether two indexes agree in every sample."""
    names = ("shard", "offset", "size", "label", "keys")
    return all(np.array_equal(getattr(left, name), getattr(right, name)) for name in names)


def read_image(index: ShardIndex, i: int, channels: int) -> Image.Image:
    """Image of sample i, as decode_image gives it."""
    content = index.files.read(int(index.shard[i]), int(index.offset[i]), int(index.size[i]))
    return decode_image(content, channels, index.describe(i))
