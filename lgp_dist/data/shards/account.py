"""What of a source is taken, and what is left out and why: nothing is left out in silence."""

import os
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

NAMED = 3
"""Names that a line gives."""
HIDDEN, SYSTEM = "hidden", "in folders of a file system or an archiver"
SYSTEM_FOLDERS = (
    *("@eadir", "__macosx", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "$recycle.bin", "lost+found"),
    *("system volume information", "__pycache__"),
)
"""What storage systems, archivers and Python put next to people's files, in lower case."""
MOST_LABELS = 100_000
"""Labels without names are compared with 0 .. N only up to this N."""


@dataclass
class Account:
    """Counts of what a build or an index takes and leaves out."""

    root: Path
    """Folder of the source; names of files are given below it."""
    taken: Counter[str] = field(default_factory=Counter)
    """Images by split."""
    left: Counter[str] = field(default_factory=Counter)
    """Number of files left out, by reason."""
    entries: dict[str, list[str]] = field(default_factory=dict)
    """The first of them: files, and folders that are left out whole."""
    notes: list[str] = field(default_factory=list)
    """Further lines."""

    def leave(self, reason: str, what: Path | str, count: int = 1) -> None:
        """Counts something that is left out; a folder counts with all files in it."""
        if isinstance(what, Path):
            count = files_in(what) if what.is_dir() and not what.is_symlink() else count
            base = next((base for base in (self.root, self.root.resolve()) if what.is_relative_to(base)), Path())
            what = str(what.relative_to(base))
        self.left[reason] += count
        if len(named := self.entries.setdefault(reason, [])) < NAMED and count and what not in named:
            named.append(what)

    def rest(self, used: Collection[Path], reason: str) -> None:
        """Counts all files below root but the used ones and those in used folders."""
        for folder, folders, files in os.walk(self.root):
            here = Path(folder)
            for name in sorted(folders):
                if why := skipped(name):
                    self.leave(why, here / name)
            folders[:] = sorted(name for name in folders if here / name not in used and not skipped(name))
            for name in sorted([*files, *(name for name in folders if (here / name).is_symlink())]):
                if here / name not in used:
                    self.leave(skipped(name) or reason, here / name)

    def lines(self) -> list[str]:
        """The account: what is taken, then a line for each reason with numbers and the first names, then notes."""
        splits = [f"{count:,} of split {split}" for split, count in self.taken.items()]
        found = [f"taken: {', '.join(splits) or 'nothing'}"]
        for reason, count in self.left.items():
            if count:
                more = ", ..." if count > NAMED else ""
                found.append(f"left out: {count:,} {reason}: {first(self.entries[reason])}{more}")
        return [*found, *dict.fromkeys(self.notes)]


def skipped(name: str) -> str:
    """Why a file or folder of this name is never read; empty for any other."""
    if name.casefold() in SYSTEM_FOLDERS:
        return SYSTEM
    return HIDDEN if name.startswith(".") else ""


def files_in(folder: Path) -> int:
    """Number of files in a tree."""
    return sum(len(files) for _, _, files in os.walk(folder))


def shown(text: str) -> str:
    """A name for a line: what cannot be printed is escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def first(names: Sequence[str]) -> str:
    """The first names of a list, and how many more there are."""
    more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
    return ", ".join(map(shown, names[:NAMED])) + more


def class_lines(labels: Mapping[str, Iterable[int]], classes: Sequence[str]) -> list[str]:
    """A line for the classes that no split has, and for those that a split lacks while another has them.

    labels: split -> its labels, in any order and number.
    """
    present = {split: set(found) for split, found in labels.items()}
    everywhere = set().union(*present.values())
    highest = max(everywhere, default=-1) + 1
    known = set(range(len(classes) or (highest if highest <= MOST_LABELS else 0)))
    rows = [("no images", known - everywhere)]
    rows += [(f"no images in split {split}", everywhere - found) for split, found in present.items() if found]
    names = {n: f"{n} {classes[n]}" if 0 <= n < len(classes) else str(n) for n in known | everywhere}
    return [
        f"classes: {what} of {len(lacking):,} of {len(names):,}: {first([names[label] for label in sorted(lacking)])}"
        for what, lacking in rows
        if lacking
    ]
