"""metrics.jsonl of a run directory: one JSON object per optimizer step and stage."""

import json
import os
from pathlib import Path
from typing import Any


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
    """Appends the lines of one stage from a step on, in place of those of an earlier attempt at it."""

    def __init__(self, path: Path, stage: str, first: int = 0):
        self.path, self.stage, self.first = path, stage, first
        self._begun = False

    def append(self, lines: list[dict[str, Any]]) -> None:
        """Writes finished steps; the first call drops what an earlier attempt wrote of them."""
        if not self._begun:
            temporary = self.path.with_suffix(".partial")
            known, first = read_metrics(self.path), self.first
            kept = [line for line in known if line["stage"] != self.stage or line["step"] < first]
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
            os.replace(temporary, self.path)
            self._begun = True
        with self.path.open("a") as file:
            file.writelines(json.dumps({"stage": self.stage, **line}) + "\n" for line in lines)
