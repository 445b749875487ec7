"""Builds shards from a source: shuffles once, writes in parallel, and continues after a kill."""

import hashlib
import io
import json
import math
import os
import shutil
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from lgp_dist.data.build.fashion import DEFAULT_SOURCE, fashion_mnist
from lgp_dist.data.build.folders import image_folder, kaggle
from lgp_dist.data.build.from_webdataset import web_dataset
from lgp_dist.data.build.imagenet import official
from lgp_dist.data.build.options import BuildOptions, Layout
from lgp_dist.data.build.parquet import parquet
from lgp_dist.data.build.source import Item, Source, reordered
from lgp_dist.data.order import nth_of_class, position_to_sample
from lgp_dist.data.shards.account import Account, class_lines, shown
from lgp_dist.data.shards.classes import read_classes
from lgp_dist.data.shards.decode import BadImage
from lgp_dist.data.shards.formats import extension, kind_of
from lgp_dist.data.shards.index import IndexedShard, index_shard, write_indexes
from lgp_dist.data.shards.manifest import ShardManifest
from lgp_dist.data.shards.sizes import dimensions, shrink
from lgp_dist.data.shards.tar import read_at
from lgp_dist.errors import UserError
from lgp_dist.files import beside, flush, locked, replacing, write_atomic, write_json

READERS: dict[str, Callable[[Path, Path, BuildOptions, Account], Source]] = {
    "imagefolder": lambda root, _, __, account: image_folder(root, account),
    "imagenet": lambda root, _, __, account: official(root, account),
    "kaggle": lambda root, _, __, account: kaggle(root, account),
    "parquet": lambda root, spool, options, account: parquet(root, spool, options.accept_missing, account),
    "webdataset": lambda root, _, options, account: web_dataset(root, options, account),
    "fashion-mnist": lambda root, spool, _, account: fashion_mnist(root, spool, account),
}
"""Layout -> its source from the data set's folder, a folder for unpacked images, options, and who counts."""

RANGES: dict[str, tuple[float, float]] = {"per_shard": (1, math.inf), "short_side": (0, 4096), "quality": (1, 95)}
"""Least and most that an option may be; others are 0 or more."""
LISTED = 10
"""Bad images that a sentence names."""


def build_shards(
    layout: Layout,
    root: Path | None,
    out: Path,
    options: BuildOptions | None = None,
    progress: Callable[[str], None] = print,
) -> ShardManifest:
    """Writes the shards of a data set with manifest, _info.json and indexes to the folder `out`; returns the manifest.

    The same source and options give the same bytes, with any number of workers and after any kill: a build works in
    `.OUT.partial` next to `out` and continues from the shards it finds there. `out` must be missing or empty, and
    appears only when complete. After a UserError, whole shards and copies of parquet files stay for the next try.
    Before the first shard is written, `progress` hears what is taken and what is left out.
    """
    options, out = options or BuildOptions(), Path(out)
    _check(options, out)
    _check_layout(layout, root, options)
    classes = read_classes(options.classes)
    root = Path(os.path.abspath(root or DEFAULT_SOURCE))
    partial = out.parent / f".{out.name}.partial"
    fresh = not partial.exists()
    partial.mkdir(parents=True, exist_ok=True)
    try:
        with locked(beside(out), "--out"):
            account = Account(root)
            source = READERS[layout](root, partial / "spool", options, account)
            if options.classes:
                source = reordered(source, classes, options.classes, account)
            plan = _plan_all(source, options, account, progress)
            _remember(partial, plan, options)
            done = _write(partial, plan, options, progress)
            _finish(partial, out, source, done)
    finally:
        if fresh and not (partial / "plan.json").exists() and not any(partial.glob("spool/*.json")):
            shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(partial, ignore_errors=True)
    return ShardManifest.load(out)


def _check(options: BuildOptions, out: Path) -> None:
    """UserError for options out of range, or a folder that holds something."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not empty: name another folder with --out, or remove it first.")
    for name in ("per_shard", "shards", "shard_mb", "short_side", "quality", "train", "test", "workers"):
        least, most = RANGES.get(name, (0, math.inf))
        if not least <= getattr(options, name) <= most:
            wanted = f"{least} or more" if most == math.inf else f"{least} .. {most}"
            raise UserError(f"--{name.replace('_', '-')} is {getattr(options, name)}: set it to {wanted}.")
    if options.shards and options.shard_mb:
        raise UserError(
            f"--shards {options.shards} and --shard-mb {options.shard_mb} exclude each other: set one to 0."
        )
    if options.short_side and options.shard_mb:
        raise UserError(
            f"--shard-mb {options.shard_mb} counts bytes that --short-side {options.short_side} changes:"
            " set --per-shard or --shards in its place."
        )


def _check_layout(layout: str, root: Path | None, options: BuildOptions) -> None:
    """UserError for an unknown layout, one without its source, and options that it does not have."""
    if layout not in READERS:
        raise UserError(f"shards build has no layout {layout!r}: name one of {', '.join(READERS)}.")
    if root is None and layout != "fashion-mnist":
        raise UserError(f"shards build {layout} has no --source: set it to the folder of the data set.")
    if layout != "webdataset" and (options.image or options.label):
        raise UserError(f"--image and --label name members of tars, which layout {layout} has none of: leave them out.")
    if layout not in ("webdataset", "parquet") and options.accept_missing:
        raise UserError(f"--accept-missing is for webdataset and parquet, not for layout {layout}: leave it out.")


class BadImages(UserError):
    """All images of a source that cannot be taken."""

    def __init__(self, found: list[BadImage]) -> None:
        listed = "; ".join(f"{shown(one.where)} ({one.reason})" for one in found[:LISTED])
        more = f"; and {len(found) - LISTED} more, listed above" if len(found) > LISTED else ""
        super().__init__(
            f"{len(found)} of the source's images are no JPEG, PNG or WebP ({listed}{more}): convert them, copy them"
            f" again{', or fetch pointers with `git lfs pull`' * ('LFS' in listed)}, or remove them."
        )
        self.found = found


def choose(split: str, labels: NDArray[np.int64], count: int, seed: int) -> NDArray[np.int64]:
    """`count` places (0: all) in random order, with equally many of each class, give or take one, while they last."""
    total = len(labels)
    if count > total:
        flag = "--train" if split == "train" else "--test"
        raise UserError(f"{count} images of split {split} were asked for: set {flag} to 1 .. {total}.")
    order = position_to_sample(seed, 0, total)
    if not count:
        return order
    return order[np.sort(np.argsort(nth_of_class(labels[order]), kind="stable")[:count])]


def _plan_all(
    source: Source, options: BuildOptions, account: Account, progress: Callable[[str], None]
) -> dict[str, list[Item]]:
    """Name of each shard -> its items in order; tells what is taken and what is left out."""
    plan: dict[str, list[Item]] = {}
    labels: dict[str, set[int]] = {}
    for split, items in source.splits.items():
        if not items:
            account.notes.append(f"split {split} has no images")
            continue
        shards = _plan(source, split, options)
        account.taken[split] = sum(map(len, shards.values()))
        labels[split] = {item.label for chosen in shards.values() for item in chosen}
        limit = "--train" if split == "train" else "--test"
        account.leave(f"images of split {split}, beyond {limit}", split, len(items) - account.taken[split])
        plan |= shards
    for line in [*account.lines(), *class_lines(labels, source.classes)]:
        progress(line)
    return plan


def _plan(source: Source, split: str, options: BuildOptions) -> dict[str, list[Item]]:
    """Name of each shard of a split -> its items in order."""
    items = source.splits[split]
    labels = np.array([item.label for item in items], dtype=np.int64)
    if len(labels) and (labels.min() < 0 or (source.classes and labels.max() >= len(source.classes))):
        bad = next(item for item in items if not 0 <= item.label < (len(source.classes) or item.label + 1))
        known = f"there are {len(source.classes)} classes" if source.classes else "labels start at 0"
        raise UserError(f"Image {bad.key} of {bad.path} has label {bad.label}, but {known}: correct the source.")
    order = choose(split, labels, options.train if split == "train" else options.test, options.seed)
    chosen = [items[place] for place in order.tolist()]
    ends = _ends(chosen, max(map(len, source.splits.values())), options)
    digits = max(4 if split == "train" else 2, len(str(max(len(ends) - 1, 0))))
    names = [f"{source.name}-{split}-{number:0{digits}d}.tar" for number in range(len(ends))]
    return {name: chosen[first:last] for name, first, last in zip(names, [0, *ends[:-1]], ends, strict=True)}


def _ends(items: list[Item], largest: int, options: BuildOptions) -> list[int]:
    """Where each shard ends."""
    count = len(items)
    if options.shards:
        number = min(max(1, round(options.shards * count / max(largest, 1))), count)
        return [(place + 1) * count // number for place in range(number)]
    if not options.shard_mb:
        return [min(start + options.per_shard, count) for start in range(0, count, options.per_shard)]
    ends, held = [], 0
    for place, item in enumerate(items):
        if held and held + item.size > options.shard_mb * 1_000_000:
            ends.append(place)
            held = 0
        held += item.size
    return [*ends, count] if count else []


def _remember(partial: Path, plan: dict[str, list[Item]], options: BuildOptions) -> None:
    """Records what is built in the folder; UserError if an earlier build there was of something else."""
    digest = hashlib.sha256()
    for name, items in plan.items():
        digest.update(json.dumps([name, [[i.key, i.label, i.path, i.offset, i.size] for i in items]]).encode())
    settings = {"short_side": options.short_side, "quality": options.quality if options.short_side else 0}
    wanted = {"items": digest.hexdigest(), **settings}
    path = partial / "plan.json"
    if path.is_file():
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            stored = None
        if stored != wanted:
            raise UserError(
                f"{partial} holds a build that was interrupted and had another source or other options:"
                " repeat that one, or remove the folder."
            )
    else:
        write_json(path, wanted)


def _write(
    partial: Path, plan: dict[str, list[Item]], options: BuildOptions, progress: Callable[[str], None]
) -> dict[str, IndexedShard]:
    """Writes the missing shards; returns all by name. After a bad image the others are read to the end, and the
    UserError has all that are bad."""
    bad: list[BadImage] = []
    folder = partial / "shards"
    folder.mkdir(exist_ok=True)

    def write(name: str) -> IndexedShard:
        with suppress(UserError):  # an earlier run's shard, whole since it has its name
            if (folder / name).exists():
                return index_shard(folder / name)
        return write_shard(folder / name, plan[name], options.short_side, options.quality)

    with ThreadPoolExecutor(options.workers or len(os.sched_getaffinity(0))) as pool:
        tasks = [pool.submit(write, name) for name in plan]
        try:
            for task in tqdm(as_completed(tasks), total=len(tasks), desc="build", unit="shard", disable=None):
                try:
                    task.result()
                except BadImages as error:
                    bad += error.found
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    for one in bad:
        progress(f"bad image: {shown(one.where)}: {one.reason}")
    if bad:
        raise BadImages(bad)
    return {name: task.result() for name, task in zip(plan, tasks, strict=True)}


def _finish(partial: Path, out: Path, source: Source, done: dict[str, IndexedShard]) -> None:
    """Writes manifest, indexes and texts next to the shards, then gives the folder its name."""
    folder = partial / "shards"
    indexed: dict[str, list[IndexedShard]] = {}
    for name, shard in done.items():
        indexed.setdefault(name.rsplit("-", 2)[1], []).append(shard)
    for path in folder.iterdir():
        if path.name not in done:
            path.unlink()
    splits = {split: tuple(shard.entry for shard in indexed[split]) for split in sorted(indexed)}
    manifest = ShardManifest(folder, source.classes, splits, source.origin, source.licence)
    for name, text in source.texts.items():
        write_atomic(folder / name, text.encode())
    write_indexes(manifest, indexed)
    os.replace(folder, out)


def write_shard(path: Path, items: list[Item], short_side: int = 0, quality: int = 90) -> IndexedShard:
    """Writes a tar of images and .cls files; equal items give equal bytes.

    Images keep their bytes, or become smaller JPEGs: see `shrink`. The tar is read back before it gets its name.
    Raises BadImages, with every file that cannot be read or is no image.
    """
    with replacing(path) as partial:
        bad: list[BadImage] = []
        with tarfile.open(partial, "w") as tar:
            for item in items:
                try:
                    content = _content(item, short_side, quality)
                except BadImage as error:
                    bad.append(error)
                    continue
                _add(tar, f"{item.key}.cls", str(item.label).encode())
                _add(tar, f"{item.key}.{extension(content)}", content)
        if bad:
            raise BadImages(bad)
        made = index_shard(partial)
        if [sample.key for sample in made.samples] != [item.key for item in items]:
            raise RuntimeError(f"{path.name} does not read back as it was written")
        flush(partial)
    return replace(made, entry=replace(made.entry, name=path.name))


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """Adds a file whose owner and time never change."""
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.uname, info.gname = len(content), 0o644, "lgp", "lgp"
    tar.addfile(info, io.BytesIO(content))


def _content(item: Item, short_side: int, quality: int) -> bytes:
    """The bytes of an image in the shard; raises BadImage."""
    where = f"{item.path}, image {item.key}" if item.offset else item.path
    try:
        with open(item.path, "rb") as file:
            content = read_at(file, item.offset, item.size)
    except OSError as error:
        raise BadImage(where, f"cannot be read, {error.strerror}") from error
    if len(content) != item.size:
        raise BadImage(where, f"ends after {len(content)} of {item.size} bytes")
    if not extension(content) or dimensions(content) == (0, 0):
        kind = kind_of(content)
        raise BadImage(where, f"is {kind}" if kind and not extension(content) else "is no image")
    return shrink(content, short_side, quality, where) if short_side else content
