"""accelerate's trackers: other people's code, on other disks and servers, which must not end a run."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from accelerate import Accelerator

log = logging.getLogger("lgp")


class Tracking:
    """Passes lines to the trackers, and counts those that they do not take."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator, self.lost = accelerator, 0

    def add(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Passes the numbers of finished steps, by name. Each line has a `step`."""
        for line in lines:
            try:
                tracked = {name: value for name, value in line.items() if isinstance(value, float)}
                self.accelerator.log(tracked, step=line["step"])
            except Exception as error:  # noqa: BLE001  whatever a tracker raises
                self.lost += 1
                if self.lost == 1:
                    log.warning("A tracker cannot take a line (%r): the run continues, lines are lost", error)

    def close(self) -> None:
        """Ends the trackers."""
        for tracker in self.accelerator.trackers:
            try:
                tracker.finish()
            except Exception as error:  # noqa: BLE001  whatever a tracker raises
                log.warning("Tracker %s did not end well (%r)", tracker.name, error)
