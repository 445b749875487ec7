"""Folders of image files: one folder per class, and Kaggle's layout of ImageNet."""

import csv
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from lgp_dist.data.build.source import IMAGE_SUFFIXES, Item, Source, items_of, want_folder
from lgp_dist.data.shards.account import Account, first, shown, skipped
from lgp_dist.data.shards.formats import mistaken
from lgp_dist.data.shards.splits import KNOWN, check_words, split_of
from lgp_dist.errors import UserError

NO_IMAGE = "whose ending is no image's (jpg, jpeg, png, webp)"


def image_folder(root: Path, account: Account) -> Source:
    """root/SPLIT/CLASS/... with the splits of splits.py, or root/CLASS/... as split train.

    Classes are the names of the class folders of all splits, sorted. The key is the path below the split's folder,
    without extension. UserError for a split whose images are in no class folder, and two folders of one split.
    """
    want_folder(root)
    splits = _split_folders(root, account)
    classes = sorted({name for folder in splits.values() for name in _folders(folder)})
    if not classes:
        raise UserError(f"{root} has no folders of classes: name the folder above them with --source.")
    labels = {name: label for label, name in enumerate(classes)}
    found = {split: _labelled(folder, labels, account) for split, folder in splits.items()}
    if not any(found.values()):
        raise UserError(f"The class folders of {root} hold no jpg, jpeg, png or webp file: name another --source.")
    if splits != {"train": root}:
        account.rest(set(splits.values()), "that are in no split's folder")
    account.notes += _other_numbers(found, labels)
    names = tuple(name.encode("utf-8", "replace").decode() for name in classes)
    return Source(_plain(root.resolve().name), found, names)


def _split_folders(root: Path, account: Account) -> dict[str, Path]:
    """Folder of each split; root itself as split train where its folders are classes."""
    folders = _folders(root)
    check_words(root, {name: name for name in folders if split_of(name)})
    splits = {split: root / name for name in folders if (split := split_of(name))}
    inner = {name: _folders(root / name) for name in folders}
    flat = {name: _images_in(root / name) for name in folders}
    if not any(inner[path.name] for path in splits.values()):
        siblings = [name for name in folders if not split_of(name) and flat[name]]
        if siblings and splits:
            named = first([path.name for path in splits.values()])
            account.notes.append(f"{named}: taken as a class, since {first(siblings)} hold images of classes, too")
        if siblings or not splits:
            _no_splits_below(root, inner, flat, account)
            return {"train": root}
    for path in splits.values():
        if flat[path.name] and not inner[path.name]:
            raise UserError(
                f"{path} has {flat[path.name]} images outside of class folders, so their classes are unknown: sort them"
                " into folders of classes, build ImageNet with layout kaggle or imagenet (which read the classes from"
                " the solution file or the devkit), or move the folder away."
            )
    return splits


def _no_splits_below(root: Path, inner: dict[str, list[str]], flat: dict[str, int], account: Account) -> None:
    """UserError where folders that would be classes hold splits; a note where they look like splits themselves."""
    nested = {name: below for name, below in inner.items() if below and not flat[name]}
    for name, below in nested.items():
        splits = {split_of(one): one for one in below if split_of(one)}
        if len(splits) > 1 or (splits and len(inner) == 1):
            raise UserError(
                f"{root / name} holds {first(list(splits.values()))}, which are names of splits: name the folder above"
                " the splits with --source, and put the folders of classes into those of the splits."
            )
    times = Counter(one for below in nested.values() for one in below)
    if same := [name for name, below in nested.items() if any(times[one] > 1 for one in below)]:
        account.notes.append(
            f"{first(same)}: taken as classes, though they hold folders of the same names; if they are splits, rename"
            f" them to one of {KNOWN}"
        )


def _images_in(folder: Path) -> int:
    """Number of images directly in a folder."""
    with os.scandir(folder) as entries:
        return sum(_is_image(entry.name) and not skipped(entry.name) and entry.is_file() for entry in entries)


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def _other_numbers(found: dict[str, list[Item]], labels: dict[str, int]) -> list[str]:
    """A note for each split whose classes have other numbers for timm's reader of folders, which numbers the innermost
    folders with images, in natural order, each split by itself."""
    names, notes = list(labels), []
    for split, items in found.items():
        folders = [names[i.label] if i.key.count("/") == 1 else Path(i.path).parent.name for i in items]
        timm = {name: number for number, name in enumerate(sorted(set(folders), key=natural))}
        other = [(item, timm[name]) for item, name in zip(items, folders, strict=True) if timm[name] != item.label]
        if other:
            item, number = other[0]
            notes.append(
                f"timm's reader of folders gives {len(other):,} of {len(items):,} images of split {split} another class"
                f" number, such as {number} for {shown(item.key)}, which is {item.label} here; --classes FILE sets the"
                " order"
            )
    return notes


def natural(name: str) -> list[int | str]:
    """Sorts names as timm does: numbers in them by value, letters without regard to case."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name.lower())]


def kaggle(root: Path, account: Account) -> Source:
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
        items["train"] = _labelled(images / "train", labels, account)
    if (images / "val").is_dir():
        items["validation"] = _solved(images / "val", root / "LOC_val_solution.csv", labels, account)
    texts = {root / "LOC_synset_mapping.txt", root / "LOC_val_solution.csv"}
    account.rest({images / "train", images / "val", *texts}, "that layout kaggle does not read")
    if not any(items.values()):
        raise UserError(f"{images} has no images in train or val: name another folder with --source.")
    classes = tuple(f"{wnid} {words}".strip() for wnid, words in names.items())
    return Source("imagenet1k", items, classes, "https://image-net.org", "ImageNet terms of access")


def _folders(root: Path) -> list[str]:
    """Sorted names of the folders in a folder, without hidden ones and those of file systems."""
    with os.scandir(root) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not skipped(entry.name))


def _files(folder: str, prefix: str, account: Account) -> Iterator[tuple[str, str, int]]:
    """Name below the folder, path and size of all images in a tree, sorted by name; all else goes to the account."""
    with os.scandir(folder) as entries:
        ordered = sorted(entries, key=lambda entry: entry.name)
    for entry in ordered:
        name, path = f"{prefix}{entry.name}", Path(entry.path)
        if why := skipped(entry.name):
            account.leave(why, path)
        elif entry.is_dir(follow_symlinks=False):
            yield from _files(entry.path, f"{name}/", account)
        elif not entry.is_file():
            # A linked folder could lead back here.
            account.leave("that are links to folders, or no files", path)
        elif not _is_image(name):
            account.leave(NO_IMAGE, path)
        else:
            yield name, entry.path, entry.stat().st_size


def _labelled(folder: Path, labels: dict[str, int], account: Account) -> list[Item]:
    """Images of the class folders in a folder."""
    found = []
    for entry in sorted(folder.iterdir()):
        if not entry.is_dir() or skipped(entry.name):
            account.leave(skipped(entry.name) or f"in {folder.name}, outside of class folders", entry)
    for name in _folders(folder):
        for inner, path, size in _files(os.path.realpath(folder / name), f"{name}/", account):
            found.append((os.path.splitext(inner)[0], labels[name], path, 0, size))
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


def _solved(folder: Path, path: Path, labels: dict[str, int], account: Account) -> list[Item]:
    """Images of a flat folder, with their classes from a solution file."""
    solution = {}
    for number, row in enumerate(csv.DictReader(_lines(path)), 2):
        wnid = ((row.get("PredictionString") or "").split() or [""])[0]
        if not row.get("ImageId") or wnid not in labels:
            raise UserError(f"{path}, line {number}, names no image with a known class: copy the file again.")
        solution[row["ImageId"]] = labels[wnid]
    items = []
    for name, image, size in _files(str(folder), "", account):
        stem = os.path.splitext(name)[0]
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
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): copy the file again.") from error
    if text.startswith("version https://git-lfs"):
        raise UserError(mistaken(path, "a list"))
    return text.splitlines()


def _plain(name: str) -> str:
    """A name that suits files."""
    return re.sub(r"[^A-Za-z0-9_]+", "_", name).strip("_") or "images"
