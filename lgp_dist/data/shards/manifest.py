"""manifest.json: the shards of a folder, their sizes and hashes; `_info.json`: the same as timm's reader expects it."""

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from lgp_dist.data.shards.formats import mistaken
from lgp_dist.data.shards.scan import Reading
from lgp_dist.errors import UserError
from lgp_dist.files import write_atomic

MANIFEST_NAME, INFO_NAME = "manifest.json", "_info.json"
FORMAT = 1
OPTIONAL = ("folder", "image", "label")
"""Keys that are stored only where they have a value."""


@dataclass(frozen=True)
class ShardEntry:
    """One tar file."""

    name: str
    """Path of the tar inside the root, with forward slashes."""
    samples: int
    """Number of images."""
    bytes: int
    """Size of the tar."""
    sha256: str
    """Hash of the whole tar, 64 hex digits."""


@dataclass(frozen=True)
class ShardManifest:
    """All splits below one root."""

    root: Path
    """Folder of the shards; not stored in the file."""
    classes: tuple[str, ...]
    """Names of labels 0, 1, ...; empty where unknown."""
    splits: dict[str, tuple[ShardEntry, ...]]
    """Shards of each split, in the order of the index."""
    source: str = ""
    """Where the images come from."""
    licence: str = ""
    """Licence of the images."""
    folder: str = ""
    """Folder of the tars, where they are not in root."""
    image: str = ""
    """Ending of the members that are images; empty for the usual ones."""
    label: str = ""
    """Ending of the members that are labels, or a field of .json; empty for the usual ones."""

    @property
    def tars(self) -> Path:
        """Folder of the tars."""
        return self.root / self.folder

    @property
    def reading(self) -> Reading:
        """How samples are found in the tars."""
        return Reading(self.image, self.label, self.classes)

    @property
    def index_command(self) -> str:
        """What makes manifest and indexes again."""
        return f"lgp shards index {self.tars}" + (f" --out {self.root}" if self.folder else "")

    @staticmethod
    def load(root: str | Path) -> "ShardManifest":
        """Reads root/manifest.json; UserError if it is missing or invalid, or names a file outside root."""
        root = Path(root)
        path = root / MANIFEST_NAME
        if not root.is_dir():
            advice = f"put shards there and run `lgp shards index {root}`, or set data.root"
            if root == Path("shards/sample"):
                advice = "`lgp shards sample` makes it"
            raise UserError(f"There is no folder {root}: {advice}.")
        if not path.is_file():
            raise UserError(f"{path} does not exist: `lgp shards index {root}` makes it from the tars in the folder.")
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            said = f"{path} cannot be read ({error}): `lgp shards index {root}` makes it again from the tars."
            raise UserError(mistaken(path, "a manifest") or said) from error
        return _parse(root, path, stored)

    def write(self) -> Path:
        """Writes root/manifest.json and returns its path."""
        stored = {
            "format": FORMAT,
            "source": self.source,
            "licence": self.licence,
            "classes": list(self.classes),
            "splits": {split: [asdict(entry) for entry in entries] for split, entries in self.splits.items()},
        }
        stored |= {name: value for name in OPTIONAL if (value := getattr(self, name))}
        path = self.root / MANIFEST_NAME
        write_atomic(path, (json.dumps(stored, indent=2, ensure_ascii=False) + "\n").encode())
        return path

    def entries(self, split: str) -> tuple[ShardEntry, ...]:
        """Shards of a split; the UserError for an unknown split names the known ones."""
        if split not in self.splits:
            there = ", ".join(sorted(self.splits)) or "none"
            raise UserError(
                f"{self.root / MANIFEST_NAME} has no split '{split}': set data.train_split and data.val_split"
                f" to one of those it has ({there})."
            )
        return self.splits[split]

    def path(self, entry: ShardEntry) -> Path:
        """File of a shard."""
        return self.tars / entry.name

    def problem(self, entry: ShardEntry) -> str:
        """What is wrong with a shard's size, as one sentence; empty if it is right."""
        path = self.path(entry)
        try:
            found = path.stat().st_size
        except OSError:
            return f"Shard {path} is missing: the manifest wants {entry.bytes} bytes, so copy the file again."
        if found != entry.bytes:
            return (
                f"Shard {path} has {found} bytes but the manifest wants {entry.bytes}: copy the file again,"
                f" or run `{self.index_command}` if it was changed on purpose."
            )
        return ""

    def check(self, split: str) -> None:
        """UserError unless every shard of the split exists and has the manifest's size. Reads no contents."""
        for entry in self.entries(split):
            problem = self.problem(entry)
            if problem:
                raise UserError(problem)

    def fingerprint(self, split: str) -> str:
        """Hash of the names and hashes of a split's shards, in order: 64 hex digits."""
        lines = "".join(f"{entry.sha256} {entry.name}\n" for entry in self.entries(split))
        return hashlib.sha256(lines.encode()).hexdigest()


def _parse(root: Path, path: Path, stored: Any) -> ShardManifest:
    """A manifest from parsed JSON; UserError at the first invalid value."""
    _want(isinstance(stored, dict), path, "the file", stored, "an object")
    _want(stored.get("format") == FORMAT, path, "format", stored.get("format"), f"{FORMAT}")
    classes, splits = stored.get("classes", []), stored.get("splits")
    texts = {key: stored.get(key, "") for key in ("source", "licence", *OPTIONAL)}
    for key, value in texts.items():
        _want(isinstance(value, str), path, key, value, "a text")
    good = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
    _want(good, path, "classes", classes, "a list of names")
    _want(isinstance(splits, dict), path, "splits", splits, "an object")
    parsed = {}
    for split, entries in splits.items():
        _want(bool(re.fullmatch(r"\w+", split)), path, "splits", split, "a name of letters, digits and underscores")
        _want(isinstance(entries, list), path, f"splits.{split}", entries, "a list")
        parsed[split] = tuple(_entry(path, f"splits.{split}.{place}", item) for place, item in enumerate(entries))
        names = [entry.name for entry in parsed[split]]
        _want(len(set(names)) == len(names), path, f"splits.{split}", names, "a list that names each shard once")
    return ShardManifest(root=root, classes=tuple(classes), splits=parsed, **texts)


def _entry(path: Path, key: str, item: Any) -> ShardEntry:
    """One shard of the JSON, checked."""
    _want(isinstance(item, dict), path, key, item, "an object")
    name, sha256 = item.get("name"), item.get("sha256")
    _want(_inside(name), path, f"{key}.name", name, "a relative path inside the folder, without '..'")
    for number in ("samples", "bytes"):
        value = item.get(number)
        _want(type(value) is int and value >= 0, path, f"{key}.{number}", value, "a whole number, 0 or more")
    good = isinstance(sha256, str) and re.fullmatch(r"[0-9a-f]{64}", sha256)
    _want(bool(good), path, f"{key}.sha256", sha256, "64 hex digits")
    return ShardEntry(name=name, samples=item["samples"], bytes=item["bytes"], sha256=sha256)


def _inside(name: Any) -> bool:
    """Whether a name stays inside the folder it is relative to."""
    if not isinstance(name, str) or not name or "\\" in name or "\0" in name:
        return False
    pure = PurePosixPath(name)
    return not pure.is_absolute() and bool(pure.parts) and ".." not in pure.parts


def _want(good: bool, path: Path, key: str, value: Any, wanted: str) -> None:
    """UserError with file, key, value and what is wanted, unless `good`."""
    if good:
        return
    shown = repr(value) if len(repr(value)) <= 80 else repr(value)[:77] + "..."
    raise UserError(f"In {path}, {key} is {shown} but must be {wanted}: `lgp shards index {path.parent}` makes it new.")


def write_info(manifest: ShardManifest) -> None:
    """Writes root/_info.json with the manifest's splits; keeps the other entries of an existing one."""
    info = with_splits(read_info(manifest.root), manifest)
    write_atomic(manifest.root / INFO_NAME, (json.dumps(info, indent=2, ensure_ascii=False) + "\n").encode())


def read_info(root: Path) -> dict[str, Any]:
    """root/_info.json; nothing if it is missing or no object."""
    try:
        stored = json.loads((root / INFO_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return stored if isinstance(stored, dict) else {}


def with_splits(info: dict[str, Any], manifest: ShardManifest) -> dict[str, Any]:
    """The entries of an _info.json with the manifest's splits."""
    before = info.get("splits")
    kept = before if isinstance(before, dict) else {}
    splits = {
        split: {
            **(kept[split] if isinstance(kept.get(split), dict) else {}),
            "name": split,
            "num_samples": sum(entry.samples for entry in entries),
            "filenames": [str(manifest.path(entry)) if manifest.folder else entry.name for entry in entries],
            "shard_lengths": [entry.samples for entry in entries],
        }
        for split, entries in manifest.splits.items()
    }
    return info | {"splits": splits}
