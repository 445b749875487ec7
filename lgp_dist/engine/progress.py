"""How far work of known length is: rank 0 shows a bar on a terminal, and otherwise lines in the log."""

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from tqdm import tqdm

log = logging.getLogger("lgp")
Item = TypeVar("Item")

LINE_S = 20.0
"""Seconds between two lines: work that is done sooner has none."""


def new_bar(main: bool, **options: Any) -> "tqdm[Any]":
    """tqdm's bar with these options; silent unless this is rank 0 with a terminal."""
    return tqdm(disable=not (main and sys.stderr.isatty()), dynamic_ncols=True, **options)


@contextlib.contextmanager
def progress(main: bool, what: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """A function that takes the number of units done so far, of `total`. unit: such as batch, or B for bytes.

    main: whether this is rank 0, which shows it.
    """
    with new_bar(main, total=total, desc=what, unit=unit, unit_scale=unit == "B", leave=False) as bar:
        began = told = time.monotonic()

        def at(done: int) -> None:
            nonlocal told
            bar.update(done - bar.n)
            now = time.monotonic()
            if main and bar.disable and 0 < done < total and now - told >= LINE_S:
                told, left = now, (now - began) / done * (total - done)
                said = f"{unit} {done}/{total}"
                if unit == "B":
                    said = f"{tqdm.format_sizeof(done)}B of {tqdm.format_sizeof(total)}B written"
                log.info("%s  %s  left %ds", what, said, left)

        yield at


def shown(items: Iterable[Item], main: bool, what: str, total: int, unit: str) -> Iterator[Item]:
    """Yields the items, of which there are `total`, and shows how many are done."""
    with progress(main, what, total, unit) as at:
        for done, item in enumerate(items, 1):
            yield item
            at(done)
