"""Reads everything in a folder of shards and names whatever is wrong, sample by sample."""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from lgp_dist.data.shards.decode import ShardFiles, decode_image
from lgp_dist.data.shards.index import SHARD_NAME, ShardIndex, join_samples, out_of_range, read_sidecar, sidecar_path
from lgp_dist.data.shards.manifest import ShardEntry, ShardManifest
from lgp_dist.data.shards.scan import Sample, hash_shard, scan_shard, shown_key
from lgp_dist.data.shards.timm_info import INFO_NAME
from lgp_dist.errors import UserError
from lgp_dist.files import write_json

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

    samples: tuple[Sample, ...]
    sums: tuple[int, ...]
    problems: tuple[Problem, ...]
    whole: bool
    """Whether its bytes are those of the manifest."""


def verify_shards(
    root: str | Path, progress: Callable[[str], None] = lambda line: None, workers: int = 1
) -> list[Problem]:
    """Reads everything below root and returns all problems; an empty list means all is good.

    Checks size and hash of each shard, its structure, number of samples and unique keys, that labels are in range
    (of the manifest's classes, or not negative where it names none), that each image decodes, and indexes and
    _info.json. Where a shard is not what the manifest says and there is an index, every sample of it that is lost,
    moved or changed is named. workers: threads. Raises UserError only where there is no readable manifest.
    """
    manifest = ShardManifest.load(root)
    problems: list[Problem] = []
    for split, entries in manifest.splits.items():
        stored = read_sidecar(manifest, split)
        with ThreadPoolExecutor(max(workers, 1)) as pool:
            tasks = [pool.submit(_read, manifest, entry, stored, place) for place, entry in enumerate(entries)]
            reads = []
            for entry, task in zip(
                entries, tqdm(tasks, desc=f"verify {split}", unit="shard", disable=None), strict=True
            ):
                reads.append(task.result())
                problems += reads[-1].problems
                progress(f"{entry.name}: {len(reads[-1].samples)} samples, {len(reads[-1].problems)} problems")
        problems += _twice(manifest, split, reads)
        if all(read.whole for read in reads) and (problem := _index_problem(manifest, split, stored, reads)):
            problems.append(problem)
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


def write_problems(problems: list[Problem], path: Path) -> None:
    """Writes a JSON list of objects with the fields of Problem."""
    write_json(path, [asdict(problem) for problem in problems])


def _read(manifest: ShardManifest, entry: ShardEntry, stored: ShardIndex | None, place: int) -> _Read:
    """One shard, and what is wrong with it."""
    path, found = manifest.path(entry), manifest.problem(entry)
    problems: list[Problem] = []
    if not path.is_file():
        problems.append(Problem(entry.name, "", "missing", found))
        return _Read((), (), (*problems, *_against_index(path, entry, stored, place, [], [], set())), False)
    samples, flaws = scan_shard(path)
    problems += [Problem(entry.name, f.key, "structure" if not f.key else "sample", f.sentence) for f in flaws]
    try:
        digest, sums = hash_shard(path, samples)
    except OSError as error:
        sentence = f"Shard {path} cannot be read ({error.strerror}): copy the file again."
        return _Read((), (), (*problems, Problem(entry.name, "", "structure", sentence)), False)
    whole = not found and digest == entry.sha256
    if not whole:
        said = found or f"Shard {path} has another sha256 than the manifest: copy the file again."
        problems.insert(0, Problem(entry.name, "", "size" if found else "hash", said))
        named = {flaw.key for flaw in flaws}
        problems += _against_index(path, entry, stored, place, samples, sums, named)
    if len(samples) != entry.samples and (not flaws or stored is None):
        sentence = (
            f"Shard {path} has {len(samples)} samples but the manifest wants {entry.samples}: copy or index it again."
        )
        problems.append(Problem(entry.name, "", "count", sentence))
    if whole:
        problems += _contents(manifest, entry, samples)
    return _Read(tuple(samples), tuple(sums), tuple(problems), whole)


def _against_index(
    path: Path,
    entry: ShardEntry,
    stored: ShardIndex | None,
    place: int,
    samples: list[Sample],
    sums: list[int],
    named: set[str],
) -> Iterator[Problem]:
    """Each sample that the index has and the shard has not, or not as it was; those in `named` are known already."""
    if stored is None:
        return
    first, last = np.searchsorted(stored.shard, [place, place + 1]).tolist()
    there = {sample.key: (sample, value) for sample, value in zip(samples, sums, strict=True)}
    for i in range(first, last):
        key = str(stored.keys[i])
        sample, value = there.pop(key, (None, 0))
        if key in named:
            continue
        start = f"Shard {path}, sample {shown_key(key)},"
        if sample is None:
            yield Problem(entry.name, key, "lost", f"{start} is lost: copy the file again.")
        elif sample.label != stored.label[i]:
            sentence = f"{start} has label {sample.label} but the index has {stored.label[i]}: copy the file again."
            yield Problem(entry.name, key, "changed", sentence)
        elif (sample.offset, sample.size) != (stored.offset[i], stored.size[i]):
            sentence = f"{start} is not where the index has it: copy the file again."
            yield Problem(entry.name, key, "changed", sentence)
        elif stored.crc[i] >= 0 and value != stored.crc[i]:
            yield Problem(entry.name, key, "changed", f"{start} has other bytes than before: copy the file again.")
    for key in there.keys() - named:
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
    """Samples of one key and one content in several shards of a split."""
    seen: dict[tuple[str, int], str] = {}
    for entry, read in zip(manifest.entries(split), reads, strict=True):
        for sample, value in zip(read.samples, read.sums, strict=True):
            first = seen.setdefault((sample.key, value), entry.name)
            if first != entry.name:
                sentence = (
                    f"Shard {manifest.path(entry)} has sample {shown_key(sample.key)} that {first} has too:"
                    " remove one of the shards, or build them again."
                )
                yield Problem(entry.name, sample.key, "twice", sentence)


def _index_problem(
    manifest: ShardManifest, split: str, stored: ShardIndex | None, reads: list[_Read]
) -> Problem | None:
    """What is wrong with the index of a split whose shards are whole."""
    path = sidecar_path(manifest.root, split)
    if not path.exists():
        return None
    if stored is not None and len(stored) == sum(len(read.samples) for read in reads):
        truth = join_samples(manifest, split, [read.samples for read in reads], [read.sums for read in reads])
        names = ["shard", "offset", "size", "label", "keys"]
        names += ["width", "height", "crc"] if bool((stored.crc >= 0).any()) else []
        if all(np.array_equal(getattr(stored, name), getattr(truth, name)) for name in names):
            return None
    sentence = f"{path} does not agree with the shards: delete it and run `lgp shards index {manifest.root}`."
    return Problem(path.name, "", "index", sentence)


def _unlisted(manifest: ShardManifest) -> Iterator[Problem]:
    """Shards in the folder that no split of the manifest names, so that nobody reads them."""
    listed = {entry.name for entries in manifest.splits.values() for entry in entries}
    for path in sorted(manifest.root.glob("*.tar")):
        if path.name not in listed and SHARD_NAME.fullmatch(path.name):
            sentence = f"Shard {path} is not in the manifest: run `lgp shards index {manifest.root}`, or remove it."
            yield Problem(path.name, "", "unlisted", sentence)


def _info_problem(manifest: ShardManifest) -> list[Problem]:
    """Whether an _info.json that is there says the same of the manifest's splits."""
    path = manifest.root / INFO_NAME
    if not path.exists():
        return []
    try:
        splits = json.loads(path.read_text(encoding="utf-8"))["splits"]
        said = {
            split: list(zip(splits[split]["filenames"], splits[split]["shard_lengths"], strict=True))
            for split in manifest.splits
        }
        wanted = {split: [(e.name, e.samples) for e in entries] for split, entries in manifest.splits.items()}
        good = said == wanted and all(
            splits[split]["num_samples"] == sum(count for _, count in said[split]) for split in said
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        good = False
    sentence = f"{path} does not agree with the manifest: run `lgp shards index {manifest.root}`."
    return [] if good else [Problem(INFO_NAME, "", "info", sentence)]
