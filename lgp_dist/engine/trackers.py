"""Trackers of accelerate: others' code, on others' disks and servers, which cannot end a run."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from accelerate import Accelerator

log = logging.getLogger("lgp")


class Tracking:
    """Gives lines to the trackers, and counts those that they do not take."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator, self.lost = accelerator, 0

    def add(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Numbers of finished steps, by name; `step` is one."""
        for line in lines:
            try:
                tracked = {name: value for name, value in line.items() if isinstance(value, float)}
                self.accelerator.log(tracked, step=line["step"])
            except Exception as error:  # noqa: BLE001  whatever a tracker raises
                self.lost += 1
                if self.lost == 1:
                    log.warning("A tracker cannot take a line (%r): the run goes on and counts lost lines", error)


@contextmanager
def harmless(what: str) -> Iterator[None]:
    """An exception inside is named in the log."""
    try:
        yield
    except Exception as error:  # noqa: BLE001  whatever a tracker raises
        log.warning("%s did not end well (%r)", what, error)
