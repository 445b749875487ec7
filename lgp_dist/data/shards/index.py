"""Where every sample of a split lies: built once from the tar headers, kept in a sidecar file next to the shards."""

import io
import os
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lgp_dist.data.shards.account import Account, class_lines
from lgp_dist.data.shards.decode import ShardFiles, decode_image
from lgp_dist.data.shards.manifest import INFO_NAME, MANIFEST_NAME, ShardEntry, ShardManifest, write_info
from lgp_dist.data.shards.promises import check_promises
from lgp_dist.data.shards.scan import USUAL, Reading, Sample, hash_shard, scan_shard, shown_key
from lgp_dist.data.shards.splits import KNOWN, check_words, tar_name
from lgp_dist.errors import UserError
from lgp_dist.files import existing, write_atomic

SIDECAR_FORMAT = 2
"""Format 1 has no width, height and crc; it is still read."""
COLUMNS: dict[str, tuple[type, int | None]] = {
    "shard": (np.int32, None),
    "offset": (np.int64, None),
    "size": (np.int64, None),
    "label": (np.int64, None),
    "keys": (np.str_, None),
    "width": (np.int32, 0),
    "height": (np.int32, 0),
    "crc": (np.int64, -1),
}
"""Arrays of a sidecar: type, and the value where format 1 has no such array."""


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
    width: NDArray[np.int32]
    """Pixels of the stored image; 0 where unknown."""
    height: NDArray[np.int32]
    """Likewise."""
    crc: NDArray[np.int64]
    """CRC-32 of the image's bytes; -1 where unknown."""
    files: ShardFiles
    """Reads the bytes."""

    def __len__(self) -> int:
        return len(self.shard)

    def content(self, i: int) -> bytes:
        """Bytes of the image of sample i; raises UserError."""
        return self.files.read(int(self.shard[i]), int(self.offset[i]), int(self.size[i]))

    def describe(self, i: int) -> str:
        """Shard and key of sample i, for sentences."""
        return f"shard {self.root / self.shards[self.shard[i]]}, sample {shown_key(str(self.keys[i]))}"

    @staticmethod
    def load(manifest: ShardManifest, split: str, num_classes: int) -> "ShardIndex":
        """Index of a split, from root/index-SPLIT.npz if that fits the manifest, else from the tars themselves.

        Raises UserError for a sample without image or label, a key that comes twice, a label outside
        0 .. num_classes - 1 and a split without samples. ShardManifest.check compares the shards' sizes.
        """
        index = read_sidecar(manifest, split) or _scan(manifest, split)
        if not len(index):
            raise UserError(
                f"Split '{split}' of {manifest.root} has no samples: add its shards and run `{manifest.index_command}`."
            )
        wrong = np.flatnonzero((index.label < 0) | (index.label >= num_classes))
        if len(wrong):
            raise UserError(out_of_range(index.describe(wrong[0]), int(index.label[wrong[0]]), num_classes))
        return index


@dataclass(frozen=True)
class IndexedShard:
    """A whole shard."""

    entry: ShardEntry
    """For the manifest."""
    samples: tuple[Sample, ...]
    """In the order of the tar, with checksums."""


def sidecar_path(root: Path, split: str) -> Path:
    """File of a split's index."""
    return root / f"index-{split}.npz"


def index_shards(
    root: str | Path,
    progress: Callable[[str], None] = print,
    out: str | Path | None = None,
    reading: Reading = USUAL,
    accept_missing: bool = False,
) -> ShardManifest:
    """Writes manifest.json, _info.json and the indexes of a folder of shards from elsewhere; returns the manifest.

    Shards are the tars directly in root whose names end as in timm's `imagenet1k-train-0000.tar`; `progress` hears
    what was taken and what was left out. Class names, source and licence of an existing manifest are kept. out: folder
    for what is written, where it shall not lie next to the shards. Raises UserError at the first shard with a problem,
    and where an earlier manifest or _info.json has more than there is; then nothing is written.
    """
    root, out = Path(root), Path(out or root)
    account = Account(root)
    found = find_shards(root, accept_missing, account, out)
    _want_writable(out)
    try:
        before = ShardManifest.load(out)
    except UserError:
        before = ShardManifest(root=out, classes=(), splits={})
    given = zip((reading.image, reading.label), (before.image, before.label), strict=True)
    reading = Reading(*(new or old for new, old in given), reading.classes or before.classes)
    indexed: dict[str, list[IndexedShard]] = {split: [] for split in found}
    for split, paths in found.items():
        for path in paths:
            indexed[split].append(index_shard(path, reading, account))
            account.taken[split] += len(indexed[split][-1].samples)
            progress(f"{path.name}: {len(indexed[split][-1].samples)} samples of {split}")
    counts = {root / shard.entry.name: len(shard.samples) for shards in indexed.values() for shard in shards}
    check_promises({root, out}, counts, accept_missing, account)
    splits = {split: tuple(shard.entry for shard in shards) for split, shards in indexed.items()}
    folder = "" if out.resolve() == root.resolve() else str(root.resolve())
    parts = (before.source, before.licence, folder, reading.image, reading.label)
    manifest = ShardManifest(out, reading.classes, splits, *parts)
    write_indexes(manifest, indexed)
    labels = {split: {one.label for shard in shards for one in shard.samples} for split, shards in indexed.items()}
    for line in [*account.lines(), *class_lines(labels, manifest.classes)]:
        progress(line)
    return manifest


def _want_writable(out: Path) -> None:
    """UserError where no index can be written, before all shards are read."""
    there = existing(out)
    if not os.access(there, os.W_OK):
        raise UserError(
            f"{there} cannot be written to: name a folder for manifest and indexes with --out, and set data.root to it."
        )


def index_shard(path: Path, reading: Reading = USUAL, account: Account | None = None) -> IndexedShard:
    """Reads a whole shard; raises UserError if anything is wrong with it."""
    samples, flaws = scan_shard(path, reading, account)
    if flaws:
        more = f" (problems in this shard: {len(flaws)})." if len(flaws) > 1 else "."
        raise UserError(flaws[0].sentence.removesuffix(".") + more)
    for sample in samples:
        if sample.label < 0:
            raise UserError(out_of_range(f"shard {path}, sample {shown_key(sample.key)}", sample.label, 0))
    if not samples:
        raise UserError(f"Shard {path} has no samples: copy the file again, or remove it.")
    try:
        digest, samples = hash_shard(path, samples)
        size = path.stat().st_size
    except OSError as error:
        raise UserError(f"Shard {path} cannot be read ({error.strerror}): copy the file again.") from error
    return IndexedShard(ShardEntry(path.name, len(samples), size, digest), tuple(samples))


def write_indexes(manifest: ShardManifest, indexed: dict[str, list[IndexedShard]]) -> None:
    """Writes the index of each split and _info.json, then the manifest, which makes them valid."""
    for split, shards in indexed.items():
        _write_sidecar(manifest, split, join_samples(manifest, split, [shard.samples for shard in shards]))
    write_info(manifest)
    manifest.write()


def out_of_range(where: str, label: int, num_classes: int) -> str:
    """The sentence for a label that is no class."""
    if label < 0:
        return f"In {where}, the label is {label}, but labels start at 0: build the shard again."
    return (
        f"In {where}, the label is {label} but labels must be 0 .. {num_classes - 1}:"
        " set data.num_classes to the number of classes in the shards, or build the shard again."
    )


def tars_in(root: Path) -> list[Path]:
    """The tars directly in a folder, sorted by name; none where there is no folder."""
    there = root.iterdir() if root.is_dir() else ()
    return sorted(path for path in there if path.suffix.lower() == ".tar" and not path.name.startswith("."))


def own_files(root: Path) -> set[Path]:
    """What lies next to shards and is no source of images."""
    return {root / name for name in (MANIFEST_NAME, INFO_NAME, "LICENSE")} | set(root.glob("index-*.npz"))


def find_shards(root: Path, accept_missing: bool, account: Account, out: Path | None = None) -> dict[str, list[Path]]:
    """Tars of each split, sorted by name; UserError if the folder holds no tar, or lacks one that a file promises.

    out: another folder with such files.
    """
    if not root.is_dir():
        raise UserError(f"There is no folder {root}: name the folder that holds the tars.")
    named = {path: parts for path in tars_in(root) if (parts := tar_name(path.name))}
    if not named:
        raise UserError(
            f"{root} has no shard whose name ends in -SPLIT-NUMBER.tar, such as imagenet1k-train-0000.tar, where SPLIT"
            f" is one of {KNOWN}: name the folder that holds the tars, or rename them."
        )
    check_words(root, {path.name: parts.word for path, parts in named.items()})
    account.rest({*named, *own_files(root)}, "whose names do not end in -SPLIT-NUMBER.tar")
    check_promises({root, out or root}, dict.fromkeys(named), accept_missing, account)
    found: dict[str, list[Path]] = {}
    for path, parts in named.items():
        found.setdefault(parts.split, []).append(path)
    return found


def join_samples(manifest: ShardManifest, split: str, shards: Sequence[Sequence[Sample]]) -> ShardIndex:
    """Index of a split from the samples of each of its shards."""
    flat = [sample for samples in shards for sample in samples]
    lengths = np.array([len(samples) for samples in shards], dtype=np.int64)
    arrays: dict[str, NDArray[Any]] = {"shard": np.repeat(np.arange(len(shards), dtype=np.int32), lengths)}
    for name, (dtype, _) in COLUMNS.items():
        if name != "shard":
            attribute = "key" if name == "keys" else name
            arrays[name] = np.array([getattr(sample, attribute) for sample in flat], dtype=dtype)
    return _index(manifest, split, arrays)


def _scan(manifest: ShardManifest, split: str) -> ShardIndex:
    """Index from the tars; raises UserError at the first problem."""
    scans = []
    for entry in manifest.entries(split):
        samples, flaws = scan_shard(manifest.path(entry), manifest.reading)
        if flaws:
            raise UserError(flaws[0].sentence)
        if len(samples) != entry.samples:
            raise UserError(
                f"Shard {manifest.path(entry)} has {len(samples)} samples but {manifest.root / MANIFEST_NAME} wants"
                f" {entry.samples}: run `{manifest.index_command}`."
            )
        scans.append(samples)
    return join_samples(manifest, split, scans)


def _index(manifest: ShardManifest, split: str, arrays: dict[str, NDArray[Any]]) -> ShardIndex:
    entries = manifest.entries(split)
    files = ShardFiles([manifest.path(entry) for entry in entries])
    return ShardIndex(root=manifest.tars, shards=tuple(entry.name for entry in entries), files=files, **arrays)


def _write_sidecar(manifest: ShardManifest, split: str, index: ShardIndex) -> None:
    """Writes root/index-SPLIT.npz; the same index always gives the same bytes."""
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        format=np.int64(SIDECAR_FORMAT),
        fingerprint=np.str_(manifest.fingerprint(split)),
        **{name: getattr(index, name) for name in COLUMNS},
    )
    write_atomic(sidecar_path(manifest.root, split), buffer.getvalue())


def read_sidecar(manifest: ShardManifest, split: str) -> ShardIndex | None:
    """Index from the sidecar; None if the file is missing, of other shards, or has impossible values."""
    fingerprint, entries = manifest.fingerprint(split), manifest.entries(split)
    try:
        with open(sidecar_path(manifest.root, split), "rb") as stream, np.load(stream, allow_pickle=False) as stored:
            form = int(stored["format"])
            if form not in (1, SIDECAR_FORMAT) or str(stored["fingerprint"]) != fingerprint:
                return None
            arrays = {name: stored[name] for name, (_, default) in COLUMNS.items() if form > 1 or default is None}
    except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError):
        return None
    shard = arrays["shard"]
    for name, (dtype, default) in COLUMNS.items():
        if name not in arrays:
            arrays[name] = np.full(shard.shape, default, dtype=dtype)
        if arrays[name].dtype.kind != np.dtype(dtype).kind or arrays[name].shape != shard.shape:
            return None
    samples = np.array([entry.samples for entry in entries], dtype=np.int64)
    if shard.ndim != 1 or not np.array_equal(shard, np.repeat(np.arange(len(entries)), samples)):
        return None
    ends = np.array([entry.bytes for entry in entries], dtype=np.int64)[shard]
    offset, size = arrays["offset"], arrays["size"]
    if not bool(((offset >= 0) & (size >= 0) & (offset + size <= ends)).all()):
        return None
    return _index(manifest, split, arrays)


def read_image(index: ShardIndex, i: int, channels: int) -> Image.Image:
    """Image of sample i, as decode_image gives it."""
    return decode_image(index.content(i), channels, index.describe(i))
