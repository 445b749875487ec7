"""metrics.jsonl of a run directory: one JSON object per optimizer step and stage."""

import json
from io import RawIOBase
from pathlib import Path
from typing import Any

from lgp_dist.files import replacing


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; none where it is missing. A line that a kill cut off is left out."""
    lines = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines


class MetricsFile:
    """Appends the lines of one stage from a step on, in place of those of an earlier attempt at it.

    A disk that is full or gone loses lines, whole ones, and ends nothing.
    """

    def __init__(self, path: Path, stage: str, first: int = 0):
        self.path, self.stage, self.first = path, stage, first
        self.lost = 0
        """Lines that could not be written."""
        self._begun = False

    def append(self, lines: list[dict[str, Any]]) -> str:
        """Writes finished steps, in place of an earlier attempt's; the reason if that was not possible, or nothing."""
        try:
            if not self._begun:
                self._begin()
            text = "".join(json.dumps({"stage": self.stage, **line}) + "\n" for line in lines).encode()
            with self.path.open("ab", buffering=0) as file:
                before = file.tell()
                _write(file, text, before)
        except OSError as error:
            self.lost += len(lines)
            return str(error.strerror)
        return ""

    def _begin(self) -> None:
        known, first = read_metrics(self.path), self.first
        kept = [line for line in known if line["stage"] != self.stage or line["step"] < first]
        with replacing(self.path) as partial:
            partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self._begun = True


def _write(file: RawIOBase, text: bytes, before: int) -> None:
    """All of it or nothing; OSError."""
    try:
        while text:
            text = text[file.write(text) :]
    except OSError:
        file.truncate(before)
        raise
