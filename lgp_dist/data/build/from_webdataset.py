"""WebDataset shards as a source: to shuffle, divide or shrink them again."""

from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from lgp_dist.data.build.options import BuildOptions
from lgp_dist.data.build.source import Item, Source, items_of, want_folder
from lgp_dist.data.shards.account import Account
from lgp_dist.data.shards.classes import read_classes
from lgp_dist.data.shards.index import find_shards, own_files, read_sidecar, tars_in
from lgp_dist.data.shards.manifest import MANIFEST_NAME, ShardManifest
from lgp_dist.data.shards.promises import check_promises, missing
from lgp_dist.data.shards.scan import Reading, scan_shard
from lgp_dist.data.shards.splits import check_words, split_of, tar_name
from lgp_dist.errors import UserError


def web_dataset(root: Path, options: BuildOptions, account: Account) -> Source:
    """Images and labels of all shards of a folder.

    With a manifest: its splits, class names, source and licence, from its indexes where they fit. Without one: the
    tars that `lgp shards index` would find, or those in folders called as splits are, or else all tars as split
    train. Raises UserError at the first shard with a problem, and where one is missing.
    """
    reading = Reading(options.image, options.label, read_classes(options.classes))
    if (root / MANIFEST_NAME).is_file():
        manifest = ShardManifest.load(root)
        first = next((entry.name for entries in manifest.splits.values() for entry in entries), "")
        splits = {split: _stored(manifest, split, options, account) for split in manifest.splits}
        source = Source("", splits, manifest.classes, manifest.source, manifest.licence)
        used = {manifest.path(entry) for entries in manifest.splits.values() for entry in entries}
    else:
        found = _tars(root, options, account)
        first = next(path.name for paths in found.values() for path in paths)
        source = Source("", {split: _scanned(split, paths, reading, account) for split, paths in found.items()})
        used = {path for paths in found.values() for path in paths}
    account.rest(used | own_files(root), "that are not shards")
    if not any(source.splits.values()):
        raise UserError(f"{root} has no samples: name another folder.")
    name = parts.prefix if (parts := tar_name(Path(first).name)) else ""
    licence = root / "LICENSE"
    texts = {"LICENSE": licence.read_text(encoding="utf-8", errors="replace")} if licence.is_file() else {}
    return replace(source, name=name or "images", texts=texts)


def _tars(root: Path, options: BuildOptions, account: Account) -> dict[str, list[Path]]:
    """Tars of each split."""
    want_folder(root)
    named = [path for path in sorted(root.iterdir()) if path.is_dir() and split_of(path.name) and tars_in(path)]
    check_words(root, {path.name: path.name for path in named})
    folders = {split_of(path.name): tars_in(path) for path in named}
    plain = tars_in(root)
    if folders and not plain:
        for tars in folders.values():
            check_promises([tars[0].parent], dict.fromkeys(tars), options.accept_missing, account)
        return folders
    if not plain or any(tar_name(path.name) for path in plain):
        return find_shards(root, options.accept_missing, account)
    account.notes.append(f"{root}: all {len(plain)} tars are split train, since no name says another")
    check_promises([root], dict.fromkeys(plain), options.accept_missing, account)
    return {"train": plain}


def _stored(manifest: ShardManifest, split: str, options: BuildOptions, account: Account) -> list[Item]:
    """Items of a split of a manifest, from its index where that fits, else from the tars."""
    wanted = manifest.entries(split)
    entries = [entry for entry in wanted if manifest.path(entry).is_file()]
    gone = [entry.name for entry in wanted if entry not in entries]
    missing(
        f"of the {len(wanted)} shards that the manifest has of split {split}", gone, options.accept_missing, account
    )
    for problem in filter(None, map(manifest.problem, entries)):
        raise UserError(problem)
    kept = manifest.reading
    reading = replace(kept, image=options.image or kept.image, label=options.label or kept.label)
    index = read_sidecar(manifest, split) if reading == kept and not gone else None
    if index is None:
        return _scanned(split, [manifest.path(entry) for entry in entries], reading, account)
    paths = [str(index.root / name) for name in index.shards]
    columns = (index.keys, index.label, index.shard, index.offset, index.size)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return items_of((key, label, paths[shard], offset, size) for key, label, shard, offset, size in rows)


def _scanned(split: str, paths: list[Path], reading: Reading, account: Account) -> list[Item]:
    """Items of tars."""
    rows = []
    for path in tqdm(paths, desc=f"read {split}", unit="shard", disable=None):
        samples, flaws = scan_shard(path, reading, account)
        if flaws:
            raise UserError(flaws[0].sentence)
        rows += [(sample.key, sample.label, str(path), sample.offset, sample.size) for sample in samples]
    return items_of(rows)
