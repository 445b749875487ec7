"""metrics.jsonl of a run directory: one JSON object per optimizer step, in the order of stages and steps.

It is appended to, and read from its end where a stage begins: a run of ImageNet writes half a million lines.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NotRequired, TypedDict

from lgp_dist.config.flat import STAGES

BLOCK = 1 << 16
"""Bytes that are read at a time."""


class MetricsLine(TypedDict):
    """One optimizer step. Next to these a line holds the task's other losses, `top1/KEY` of each path that was
    measured, counts of the step's batches and what the step filter says."""

    stage: str
    step: int
    """Optimizer steps of the stage before this one."""
    epoch: float
    lr: float
    world: int
    """Ranks."""
    accumulate: int
    """Micro-steps of each rank."""
    path: NotRequired[list[str]]
    """Keys of the paths: rank 0's micro-steps, then rank 1's."""
    loss: float | None
    """Mean over ranks and micro-steps; None if it was not finite."""
    grad_norm: NotRequired[float]
    """Of the whole gradient before clipping; left out if it was not finite."""
    images_per_s: float
    """Of all ranks."""
    data_wait_s: float
    step_time_s: float


def read_metrics(path: Path, stage: str) -> Iterator[MetricsLine]:
    """One stage's lines of a metrics file, in order; none if the file is missing."""
    return (line for line in read_lines(path) if line["stage"] == stage)


def read_lines(path: Path) -> Iterator[Any]:
    """The values of a file of JSON lines, in order; none if the file is missing. Skips a line that a kill cut off."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        for line in file:
            try:
                yield json.loads(line)
            except ValueError:
                continue


class MetricsFile:
    """Appends the lines of one stage from a step on, in place of those of an earlier attempt.

    A full or missing disk loses whole lines and ends nothing.
    """

    def __init__(self, path: Path, stage: str, first: int = 0):
        self.path, self.stage, self.first = path, stage, first
        self.later = STAGES[STAGES.index(stage) + 1 :] if stage in STAGES else ()
        self.lost = 0
        """Lines that could not be written."""
        self._begun = False

    def append(self, lines: Sequence[Mapping[str, Any]]) -> str:
        """Writes finished steps. Returns why that failed, or nothing."""
        text = "".join(json.dumps({"stage": self.stage, **line}) + "\n" for line in lines).encode()
        try:
            self.path.touch()
            with self.path.open("r+b", buffering=0) as file:
                _write(file, text, file.seek(0, os.SEEK_END) if self._begun else self._cut(file))
        except OSError as error:
            self.lost += len(lines)
            return str(error.strerror)
        self._begun = True
        return ""

    def _cut(self, file: BinaryIO) -> int:
        """Where the lines of an earlier attempt begin: those from the first step on, those of later stages, which were
        trained on its result, and a line that a kill cut off.

        The file is in the order of stages and steps, so they are its last lines: reading backwards ends before them.
        """
        lines = _backwards(file)
        cut, _ = next(lines)  # after the last line that is whole
        for offset, line in lines:
            if self._precedes(line):
                break
            cut = offset
        return cut

    def _precedes(self, text: bytes) -> bool:
        """Whether a line is of an earlier step or another stage, and not of a later one."""
        try:
            line = json.loads(text)
        except ValueError:
            return False
        return line["step"] < self.first if line["stage"] == self.stage else line["stage"] not in self.later


def _backwards(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Offset and text of what follows the last line break, then of each line, last first."""
    start, known = file.seek(0, os.SEEK_END), list[bytes]()  # known: a line's blocks so far, last first
    while start:
        size = min(BLOCK, start)
        start -= size
        file.seek(start)
        first, *rest = file.read(size).split(b"\n")
        end = start + size
        for piece in reversed(rest):
            end -= len(piece)
            yield end, b"".join([piece, *reversed(known)])
            known, end = [], end - 1
        known.append(first)
    yield 0, b"".join(reversed(known))


def _write(file: BinaryIO, text: bytes, start: int) -> None:
    """Makes the text the end of the file, from an offset on. OSError if there is no room: then the file ends at the
    offset, or is as before if nothing could be written."""
    file.seek(start)
    try:
        while text:
            text = text[file.write(text) :]
    except OSError:
        if file.tell() > start:
            file.truncate(start)
        raise
    file.truncate()
