"""Names of classes: a file of them, and the numbers that they stand for."""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from lgp_dist.errors import UserError


def read_classes(path: Path | None) -> tuple[str, ...]:
    """The lines of a file of classes, in order; none for None. UserError where it cannot be read or repeats one."""
    if path is None:
        return ()
    try:
        names = tuple(line.strip() for line in path.read_text(encoding="utf-8-sig").rstrip().splitlines())
    except (OSError, ValueError) as error:
        said = f"--classes {path} cannot be read ({error}): name a text file with a class in each line."
        raise UserError(said) from error
    if not names:
        raise UserError(f"--classes {path} is empty: give each class a line.")
    wrong = next((name for name, times in Counter(names).items() if times > 1 or not name), None)
    if wrong is not None:
        raise UserError(f"--classes {path} has the line {wrong!r} not once: give each line the name of another class.")
    return names


def class_numbers(classes: Sequence[str]) -> dict[str, int]:
    """Name -> number; `n01440764 tench` is found by its wnid, too."""
    wnids = {wnid: number for number, name in enumerate(classes) if (wnid := wnid_of(name))}
    return wnids | {name: number for number, name in enumerate(classes)}


def wnid_of(name: str) -> str:
    """The wnid at the start of a class's name, or an empty string."""
    match = re.match(r"n\d{8}\b", name)
    return match[0] if match else ""
