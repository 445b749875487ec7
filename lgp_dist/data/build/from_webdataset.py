"""WebDataset shards as a source: to shuffle, divide or shrink them again."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from lgp_dist.data.build.folders import SPLIT_FOLDERS
from lgp_dist.data.build.source import Item, Source, items_of, want_folder
from lgp_dist.data.shards.index import SHARD_NAME, find_shards, read_sidecar
from lgp_dist.data.shards.manifest import MANIFEST_NAME, ShardManifest
from lgp_dist.data.shards.scan import scan_shard
from lgp_dist.errors import UserError


def web_dataset(root: Path, progress: Callable[[str], None] = print) -> Source:
    """Images and labels of all shards of a folder.

    With a manifest: its splits, class names, source and licence, from its indexes where they fit. Without one: the
    tars that `lgp shards index` would find, or those in folders train, val, validation and test, or else all tars
    as split train. Raises UserError at the first shard with a problem.
    """
    if (root / MANIFEST_NAME).is_file():
        manifest = ShardManifest.load(root)
        for split in manifest.splits:
            manifest.check(split)
        splits = {split: _stored(manifest, split) for split in manifest.splits}
        first = next((entry.name for entries in manifest.splits.values() for entry in entries), "")
        source = Source("", splits, manifest.classes, manifest.source, manifest.licence)
    else:
        found = _tars(root, progress)
        first = next(path.name for paths in found.values() for path in paths)
        source = Source("", {split: _scanned(split, paths) for split, paths in found.items()})
    if not any(source.splits.values()):
        raise UserError(f"{root} has no samples: name another folder.")
    match = SHARD_NAME.fullmatch(Path(first).name)
    name = (match[1] or "").rstrip("-") if match else ""
    licence = root / "LICENSE"
    texts = {"LICENSE": licence.read_text(encoding="utf-8", errors="replace")} if licence.is_file() else {}
    return replace(source, name=name or "images", texts=texts)


def _tars(root: Path, progress: Callable[[str], None]) -> dict[str, list[Path]]:
    """Tars of each split."""
    want_folder(root)
    folders = {
        SPLIT_FOLDERS[name]: sorted((root / name).glob("*.tar")) for name in SPLIT_FOLDERS if (root / name).is_dir()
    }
    plain = sorted(root.glob("*.tar"))
    if any(folders.values()) and not plain:
        return {split: paths for split, paths in folders.items() if paths}
    if not plain or any(SHARD_NAME.fullmatch(path.name) for path in plain):
        return find_shards(root, progress)
    progress(f"{root}: all {len(plain)} tars are split train, since no name says another")
    return {"train": plain}


def _stored(manifest: ShardManifest, split: str) -> list[Item]:
    """Items of a split of a manifest, from its index where that fits, else from the tars."""
    index = read_sidecar(manifest, split)
    if index is None:
        return _scanned(split, [manifest.path(entry) for entry in manifest.entries(split)])
    paths = [str(index.root / name) for name in index.shards]
    columns = (index.keys, index.label, index.shard, index.offset, index.size)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return items_of((key, label, paths[shard], offset, size) for key, label, shard, offset, size in rows)


def _scanned(split: str, paths: list[Path]) -> list[Item]:
    """Items of tars."""
    rows = []
    for path in tqdm(paths, desc=f"read {split}", unit="shard", disable=None):
        samples, flaws = scan_shard(path)
        if flaws:
            raise UserError(flaws[0].sentence)
        rows += [(sample.key, sample.label, str(path), sample.offset, sample.size) for sample in samples]
    return items_of(rows)
