"""Folders of image files: one folder per class, and Kaggle's layout of ImageNet."""

import csv
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from lgp_dist.data.build.source import IMAGE_SUFFIXES, Item, Source, items_of, want_folder
from lgp_dist.errors import UserError

SPLIT_FOLDERS = {
    "train": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
}
"""Name of a split's folder -> name of the split."""


def image_folder(root: Path, progress: Callable[[str], None] = print) -> Source:
    """root/SPLIT/CLASS/... with splits train, val (or validation) and test, or root/CLASS/... as split train.

    Classes are the names of the class folders of all splits, sorted. The key is the path below the split's folder,
    without extension. Files that are no jpg, jpeg, png or webp are ignored, and `progress` hears how many.
    """
    want_folder(root)
    found = {SPLIT_FOLDERS[name]: root / name for name in _folders(root) if name in SPLIT_FOLDERS}
    splits = found or {"train": root}
    classes = sorted({name for folder in splits.values() for name in _folders(folder)})
    if not classes:
        raise UserError(f"{root} has no folders of classes: name the folder above them with --source.")
    labels = {name: label for label, name in enumerate(classes)}
    items = {split: _labelled(folder, labels, progress) for split, folder in splits.items()}
    if not any(items.values()):
        raise UserError(f"The class folders of {root} hold no jpg, jpeg, png or webp file: name another --source.")
    names = tuple(name.encode("utf-8", "replace").decode() for name in classes)
    return Source(_plain(root.resolve().name), items, names)


def kaggle(root: Path, progress: Callable[[str], None] = print) -> Source:
    """ImageNet as Kaggle has it: ILSVRC/Data/CLS-LOC/{train,val}, LOC_val_solution.csv and LOC_synset_mapping.txt.

    Labels are the line numbers of LOC_synset_mapping.txt, which agree with the sorted names of the class folders.
    """
    want_folder(root)
    places = [root / part for part in ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC", "CLS-LOC")]
    images = next((place for place in places if place.is_dir()), None)
    if images is None:
        raise UserError(f"{root} has no folder ILSVRC/Data/CLS-LOC: name the folder above it with --source.")
    names = _synsets(root / "LOC_synset_mapping.txt")
    labels = {wnid: label for label, wnid in enumerate(names)}
    items: dict[str, list[Item]] = {}
    if (images / "train").is_dir():
        unknown = sorted(set(_folders(images / "train")) - labels.keys())
        if unknown:
            raise UserError(
                f"{root / 'LOC_synset_mapping.txt'} does not name the class {unknown[0]} of {images / 'train'}:"
                " copy the file again."
            )
        items["train"] = _labelled(images / "train", labels, progress)
    if (images / "val").is_dir():
        items["validation"] = _solved(images / "val", root / "LOC_val_solution.csv", labels)
    if not any(items.values()):
        raise UserError(f"{images} has no images in train or val: name another folder with --source.")
    classes = tuple(f"{wnid} {words}".strip() for wnid, words in names.items())
    return Source("imagenet1k", items, classes, "https://image-net.org", "ImageNet terms of access")


def _folders(root: Path) -> list[str]:
    """Sorted names of the folders in a folder, without hidden ones."""
    with os.scandir(root) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def _files(folder: str, prefix: str) -> Iterator[tuple[str, str, int]]:
    """Name below the folder, path and size of all files in a tree but the hidden ones, sorted by name."""
    with os.scandir(folder) as entries:
        ordered = sorted(entries, key=lambda entry: entry.name)
    for entry in ordered:
        if entry.name.startswith("."):
            continue
        name = f"{prefix}{entry.name}"
        if entry.is_dir(follow_symlinks=False):
            yield from _files(entry.path, f"{name}/")
        elif entry.is_file():
            yield name, entry.path, entry.stat().st_size
        else:
            yield f"{name}/", entry.path, 0  # a linked folder could lead back here: counted as ignored


def _labelled(folder: Path, labels: dict[str, int], progress: Callable[[str], None]) -> list[Item]:
    """Images of the class folders in a folder."""
    found, ignored = [], 0
    for name in _folders(folder):
        for inner, path, size in _files(os.path.realpath(folder / name), f"{name}/"):
            if os.path.splitext(inner)[1].lower() in IMAGE_SUFFIXES:
                found.append((os.path.splitext(inner)[0], labels[name], path, 0, size))
            else:
                ignored += 1
    if ignored:
        progress(f"{folder}: ignored {ignored} that are no jpg, jpeg, png or webp file")
    return items_of(found)


def _synsets(path: Path) -> dict[str, str]:
    """wnid -> words, in the order of the file."""
    found: dict[str, str] = {}
    for number, line in enumerate(_lines(path), 1):
        match = re.fullmatch(r"(n\d{8})(?: (.*))?", line.strip())
        if not match or match[1] in found:
            raise UserError(
                f"{path}, line {number}, is {line[:60]!r} but must be a new wnid and its words: copy it again."
            )
        found[match[1]] = match[2] or ""
    return found


def _solved(folder: Path, path: Path, labels: dict[str, int]) -> list[Item]:
    """Images of a flat folder, with their classes from a solution file."""
    solution = {}
    for number, row in enumerate(csv.DictReader(_lines(path)), 2):
        wnid = ((row.get("PredictionString") or "").split() or [""])[0]
        if not row.get("ImageId") or wnid not in labels:
            raise UserError(f"{path}, line {number}, names no image with a known class: copy the file again.")
        solution[row["ImageId"]] = labels[wnid]
    items = []
    for name, image, size in _files(str(folder), ""):
        stem, suffix = os.path.splitext(name)
        if suffix.lower() not in IMAGE_SUFFIXES:
            continue
        if stem not in solution:
            raise UserError(f"{path} has no class for {name} of {folder}: copy both again.")
        items.append(Item(stem, solution[stem], image, 0, size))
    missing = len(solution) - len(items)
    if missing:
        raise UserError(f"{folder} has {len(items)} images but {path} has {len(solution)}: copy the missing ones.")
    return items


def _lines(path: Path) -> list[str]:
    """Lines of a text file; raises UserError."""
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): copy the file again.") from error


def _plain(name: str) -> str:
    """A name that suits files."""
    return re.sub(r"[^A-Za-z0-9_]+", "_", name).strip("_") or "images"
