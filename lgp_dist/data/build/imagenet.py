"""ImageNet's official tars as a source: a tar of one tar per class, a flat validation tar and the devkit."""

import io
import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

from lgp_dist.data.build.source import Item, Source, clean_key, items_of, optional, want_folder
from lgp_dist.data.shards.account import Account, skipped
from lgp_dist.data.shards.formats import mistaken
from lgp_dist.data.shards.tar import Member, TarError, walk
from lgp_dist.errors import UserError

TRAIN, VALIDATION = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12"
META, TRUTH = "data/meta.mat", "data/ILSVRC2012_validation_ground_truth.txt"
MAX_DEVKIT_FILE = 1 << 26
"""Largest file of the devkit that is read."""


def official(root: Path, account: Account) -> Source:
    """The folder of ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12(.tar.gz).

    Either tar may be missing. Labels number the sorted wnids. The ground truth of the validation images has the
    devkit's own class numbers, which its meta.mat maps to wnids. Nothing is unpacked. Raises UserError.
    """
    want_folder(root)
    has_devkit = (root / f"{DEVKIT}.tar.gz").is_file() or (root / DEVKIT).is_dir()
    synsets = _synsets(root) if has_devkit else {}
    read = {root / name for name in (TRAIN, VALIDATION, DEVKIT, f"{DEVKIT}.tar.gz")}
    account.rest(read, "that layout imagenet does not read")
    inner = list(_members(root / TRAIN, account)) if (root / TRAIN).is_file() else []
    wnids = sorted({Path(member.name).stem for member in inner} | {wnid for wnid, _ in synsets.values()})
    for wnid in wnids:
        if not re.fullmatch(r"n\d{8}", wnid):
            raise UserError(f"{root / TRAIN} holds {wnid!r}, which is no tar of a class: copy the file again.")
    labels = {wnid: label for label, wnid in enumerate(wnids)}
    items: dict[str, list[Item]] = {}
    if inner:
        items["train"] = _train(root / TRAIN, inner, labels, account)
    if (root / VALIDATION).is_file():
        items["validation"] = _validation(root, synsets, labels, account)
    if not items:
        raise UserError(f"{root} has neither {TRAIN} nor {VALIDATION}: name the folder of the tars with --source.")
    words = dict(synsets.values())
    classes = tuple(f"{wnid} {words.get(wnid, '')}".strip() for wnid in wnids)
    return Source("imagenet1k", items, classes, "https://image-net.org", "ImageNet terms of access")


def _members(path: Path, account: Account, start: int = 0, end: int | None = None) -> Iterator[Member]:
    """Files of a tar, or of a tar within it, without hidden ones; UserError where it is damaged."""
    try:
        with path.open("rb") as tar:
            for member in walk(tar, start, os.fstat(tar.fileno()).st_size if end is None else end):
                if why := next((why for part in Path(member.name).parts if part != "." and (why := skipped(part))), ""):
                    account.leave(f"{why} in {path.name}", member.name)
                else:
                    yield member
    except (OSError, TarError) as error:
        said = mistaken(path, "a tar") or f"{path} cannot be read as a tar ({error}): copy the file again."
        raise UserError(said) from error


def _train(path: Path, inner: list[Member], labels: dict[str, int], account: Account) -> list[Item]:
    """Images of the class tars, ordered by class and then by name."""
    items = []
    for member in sorted(inner, key=lambda member: member.name):
        wnid = Path(member.name).stem
        found = _members(path, account, member.offset, member.offset + member.size)
        images = sorted(found, key=lambda image: image.name)
        items += items_of(
            (f"{wnid}/{os.path.splitext(image.name)[0]}", labels[wnid], str(path), image.offset, image.size)
            for image in images
        )
    return items


def _validation(
    root: Path, synsets: dict[int, tuple[str, str]], labels: dict[str, int], account: Account
) -> list[Item]:
    """Images of the flat tar; image n has the class in line n of the ground truth."""
    path = root / VALIDATION
    if not synsets:
        raise UserError(f"{path} needs the classes of its images: put {DEVKIT}.tar.gz next to it.")
    truth = [line.strip() for line in _devkit_file(root, TRUTH).decode("ascii", "replace").splitlines() if line.strip()]
    images = sorted(_members(path, account), key=lambda image: image.name)
    if len(images) != len(truth):
        raise UserError(f"{path} has {len(images)} images but {TRUTH} has {len(truth)} classes: copy both again.")
    items = []
    for number, image in enumerate(images, 1):
        match = re.search(r"_(\d+)\.\w+$", image.name)
        if not match or int(match[1]) != number:
            raise UserError(f"{path} has {ascii(image.name[:80])} where image {number} should be: copy it again.")
        said = truth[number - 1]
        if not said.isdecimal() or len(said) > 9 or int(said) not in synsets:
            raise UserError(
                f"Line {number} of {TRUTH} is {ascii(said[:40])}, no class of meta.mat: copy the devkit again."
            )
        key = clean_key(os.path.splitext(image.name)[0])
        items.append(Item(key, labels[synsets[int(said)][0]], str(path), image.offset, image.size))
    return items


def _synsets(root: Path) -> dict[int, tuple[str, str]]:
    """The devkit's class number -> wnid and words, for the classes of the challenge: those without children."""
    loadmat = optional("scipy.io", "Reading the devkit's meta.mat").loadmat
    try:
        table = loadmat(io.BytesIO(_devkit_file(root, META)), squeeze_me=True)["synsets"]
        rows = [
            (int(row["ILSVRC2012_ID"]), str(row["WNID"]), str(row["words"]), int(row["num_children"])) for row in table
        ]
    except UserError:
        raise
    except Exception as error:  # scipy's reader raises many kinds on bad bytes
        raise UserError(f"The devkit's {META} in {root} cannot be read ({error}): copy the devkit again.") from error
    return {number: (wnid, words) for number, wnid, words, children in rows if children == 0}


def _devkit_file(root: Path, name: str) -> bytes:
    """A file of the devkit, from its folder or its tar.gz; raises UserError."""
    folder, packed = root / DEVKIT, root / f"{DEVKIT}.tar.gz"
    try:
        if folder.is_dir():
            if said := mistaken(folder / name, f"the devkit's {name}"):
                raise UserError(said)
            return (folder / name).read_bytes()
        with tarfile.open(packed, "r:gz") as tar:
            member = tar.getmember(f"{DEVKIT}/{name}")
            if not member.isreg() or member.issparse() or member.size > MAX_DEVKIT_FILE:
                raise KeyError(f"{name} is no plain file")
            content = tar.extractfile(member)
            return content.read() if content else b""
    except UserError:
        raise
    except (OSError, KeyError, EOFError, tarfile.TarError, ValueError) as error:
        where = folder if folder.is_dir() else packed
        said = f"{where} has no {name} that can be read ({error}): copy the devkit again."
        raise UserError(mistaken(where, "gzip") or said) from error
