"""Reads everything in a folder of shards and names whatever is wrong, sample by sample."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from lgp_dist.data.shards.decode import ShardFiles, decode_image
from lgp_dist.data.shards.index import (
    COLUMNS,
    ShardIndex,
    join_samples,
    out_of_range,
    read_sidecar,
    sidecar_path,
    tars_in,
)
from lgp_dist.data.shards.manifest import INFO_NAME, ShardEntry, ShardManifest, read_info, with_splits
from lgp_dist.data.shards.scan import Sample, hash_shard, scan_shard, shown_key
from lgp_dist.data.shards.splits import tar_name
from lgp_dist.errors import UserError

LISTED = 10
"""Problems that a sentence spells out."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong."""

    shard: str
    """Name of the shard, or of the index."""
    key: str
    """Of the sample; empty where it is the shard itself."""
    reason: str
    """missing, size, hash, structure, count, sample, lost, changed, extra, twice, label, image, index, unlisted
    or info."""
    sentence: str
    """The same for a person, and what to do."""


@dataclass(frozen=True)
class _Read:
    """What was found in a shard."""

    samples: list[Sample]
    problems: list[Problem]
    whole: bool
    """Whether its bytes are those of the manifest."""


def verify_shards(root: str | Path, workers: int = 1) -> list[Problem]:
    """Reads everything below root and returns all problems; an empty list means all is good.

    Checks size and hash of each shard, its structure, number of samples and unique keys, that labels are in range
    (of the manifest's classes, or not negative where it names none), that each image decodes, and indexes and
    _info.json. Where a shard differs from the manifest and there is an index, names every sample that was lost, moved
    or changed. workers: threads. Raises UserError only where there is no readable manifest.
    """
    manifest = ShardManifest.load(root)
    problems: list[Problem] = []
    for split, entries in manifest.splits.items():
        stored = read_sidecar(manifest, split)
        with ThreadPoolExecutor(max(workers, 1)) as pool:
            found = pool.map(partial(_read, manifest, stored), entries, range(len(entries)))
            reads = list(tqdm(found, f"verify {split}", len(entries), unit="shard", disable=None))
        problems += [problem for read in reads for problem in read.problems]
        problems += _twice(manifest, split, reads)
        if all(read.whole for read in reads):
            problems += _index_problem(manifest, split, stored, reads)
    return [*problems, *_unlisted(manifest), *_info_problem(manifest)]


def summary(root: str | Path, problems: list[Problem]) -> str:
    """The problems as one sentence: how many, in how many samples and files, and the first LISTED of them."""
    bad = len({(problem.shard, problem.key) for problem in problems if problem.key})
    files = len({problem.shard for problem in problems})
    listed = "; ".join(problem.sentence.rstrip(".") for problem in problems[:LISTED])
    more = f"; and {len(problems) - LISTED} more" if len(problems) > LISTED else ""
    return f"{root} has {len(problems)} problem(s), with {bad} bad sample(s) in {files} file(s): {listed}{more}."


def table(problems: list[Problem]) -> str:
    """A line for each problem: shard, key, reason and sentence, separated by tabs."""
    rows = [(problem.shard, shown_key(problem.key), problem.reason, problem.sentence) for problem in problems]
    return "".join("\t".join(row) + "\n" for row in rows)


def _read(manifest: ShardManifest, stored: ShardIndex | None, entry: ShardEntry, number: int) -> _Read:
    """Reads the shard with this number in the index, and finds what is wrong with it."""
    path, wrong_size = manifest.path(entry), manifest.problem(entry)
    if not path.is_file():
        lost = _against_index(path, entry, stored, number, [], set())
        return _Read([], [Problem(entry.name, "", "missing", wrong_size), *lost], False)
    samples, flaws = scan_shard(path, manifest.reading)
    problems = [Problem(entry.name, f.key, "structure" if not f.key else "sample", f.sentence) for f in flaws]
    try:
        digest, samples = hash_shard(path, samples)
    except OSError as error:
        sentence = f"Shard {path} cannot be read ({error.strerror}): copy the file again."
        return _Read([], [*problems, Problem(entry.name, "", "structure", sentence)], False)
    whole = not wrong_size and digest == entry.sha256
    if not whole:
        said = wrong_size or f"Shard {path} has another sha256 than the manifest: copy the file again."
        problems.insert(0, Problem(entry.name, "", "size" if wrong_size else "hash", said))
        problems += _against_index(path, entry, stored, number, samples, {flaw.key for flaw in flaws})
    if len(samples) != entry.samples and (not flaws or stored is None):
        sentence = (
            f"Shard {path} has {len(samples)} samples but the manifest wants {entry.samples}: copy or index it again."
        )
        problems.append(Problem(entry.name, "", "count", sentence))
    if whole:
        problems += _contents(manifest, entry, samples)
    return _Read(samples, problems, whole)


def _against_index(
    path: Path, entry: ShardEntry, stored: ShardIndex | None, number: int, samples: list[Sample], known: set[str]
) -> Iterator[Problem]:
    """Each sample that differs between index and shard. known: keys whose problem is reported already."""
    if stored is None:
        return
    first, last = np.searchsorted(stored.shard, [number, number + 1]).tolist()
    there = {sample.key: sample for sample in samples}
    for i in range(first, last):
        key = str(stored.keys[i])
        sample = there.pop(key, None)
        if key in known:
            continue
        start, reason = f"Shard {path}, sample {shown_key(key)},", "changed"
        if sample is None:
            what, reason = "is lost", "lost"
        elif sample.label != stored.label[i]:
            what = f"has label {sample.label} but the index has {stored.label[i]}"
        elif (sample.offset, sample.size) != (stored.offset[i], stored.size[i]):
            what = "is not where the index has it"
        elif stored.crc[i] >= 0 and sample.crc != stored.crc[i]:
            what = "has other bytes than before"
        else:
            continue
        yield Problem(entry.name, key, reason, f"{start} {what}: copy the file again.")
    for key in there.keys() - known:
        sentence = f"Shard {path}, sample {shown_key(key)}, is not in the index: copy the file again."
        yield Problem(entry.name, key, "extra", sentence)


def _contents(manifest: ShardManifest, entry: ShardEntry, samples: list[Sample]) -> Iterator[Problem]:
    """Labels out of range and images that do not decode."""
    limit = len(manifest.classes) or np.iinfo(np.int64).max
    files = ShardFiles([manifest.path(entry)])
    for sample in samples:
        where = f"shard {manifest.path(entry)}, sample {shown_key(sample.key)}"
        if not 0 <= sample.label < limit:
            yield Problem(entry.name, sample.key, "label", out_of_range(where, sample.label, limit))
        try:
            decode_image(files.read(0, sample.offset, sample.size), 3, where)
        except UserError as error:
            yield Problem(entry.name, sample.key, "image", str(error))


def _twice(manifest: ShardManifest, split: str, reads: list[_Read]) -> Iterator[Problem]:
    """Samples with the same key and content in several shards of a split."""
    seen: dict[tuple[str, int], str] = {}
    for entry, read in zip(manifest.entries(split), reads, strict=True):
        for sample in read.samples:
            first = seen.setdefault((sample.key, sample.crc), entry.name)
            if first != entry.name:
                sentence = (
                    f"Shard {manifest.path(entry)} has sample {shown_key(sample.key)} that {first} has too:"
                    " remove one of the shards, or build them again."
                )
                yield Problem(entry.name, sample.key, "twice", sentence)


def _index_problem(
    manifest: ShardManifest, split: str, stored: ShardIndex | None, reads: Iterable[_Read]
) -> Iterator[Problem]:
    """What is wrong with the index of a split whose shards are whole."""
    path = sidecar_path(manifest.root, split)
    if not path.exists():
        return
    if stored is not None:
        truth = join_samples(manifest, split, [read.samples for read in reads])
        has_sums = bool((stored.crc >= 0).any())  # format 2
        names = [name for name, (_, default) in COLUMNS.items() if has_sums or default is None]
        if all(np.array_equal(getattr(stored, name), getattr(truth, name)) for name in names):
            return
    sentence = f"{path} does not agree with the shards: delete it and run `{manifest.index_command}`."
    yield Problem(path.name, "", "index", sentence)


def _unlisted(manifest: ShardManifest) -> Iterator[Problem]:
    """Shards in the folder that no split of the manifest names, so that nobody reads them."""
    listed = {entry.name for entries in manifest.splits.values() for entry in entries}
    for path in tars_in(manifest.tars):
        if path.name not in listed and tar_name(path.name):
            sentence = f"Shard {path} is not in the manifest: run `{manifest.index_command}`, or remove it."
            yield Problem(path.name, "", "unlisted", sentence)


def _info_problem(manifest: ShardManifest) -> Iterator[Problem]:
    """Whether an existing _info.json differs from the manifest's splits."""
    path, info = manifest.root / INFO_NAME, read_info(manifest.root)
    if path.exists() and info != with_splits(info, manifest):
        sentence = f"{path} does not agree with the manifest: run `{manifest.index_command}`."
        yield Problem(INFO_NAME, "", "info", sentence)
