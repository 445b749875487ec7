"""The log of a run, to the terminal and to log.txt. Neither can end the run: a line that has no place is counted."""

import contextlib
import io
import logging
import os
import sys
from pathlib import Path
from typing import TextIO

log = logging.getLogger("lgp")


class _Counting(logging.StreamHandler):
    """Counts lines that its stream does not take, and says so once on the handlers that work."""

    def __init__(self, stream: TextIO, place: str, *, own: bool):
        super().__init__(stream)
        self.place, self.own, self.lost = place, own, 0
        self.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  logging's name
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
            return
        self.lost += 1
        if self.lost == 1:
            log.warning("%s cannot be written (%s): the run goes on and counts lost lines", self.place, error.strerror)

    def close(self) -> None:
        if self.own:
            self.stream.close()
        super().close()


def open_log(path: Path) -> None:
    """Sends the log to the terminal and to a file, which is appended to; in place of where it went before."""
    log.setLevel(logging.INFO)
    log.propagate = False
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()
    file = io.TextIOWrapper(io.FileIO(path, "a"), encoding="utf-8", write_through=True)  # unbuffered: lost is lost
    log.addHandler(_Counting(sys.stderr, "The terminal", own=False))
    log.addHandler(_Counting(file, str(path), own=True))


def show(text: str) -> None:
    """Writes to stdout, if it is still there."""
    with contextlib.suppress(OSError):
        sys.stdout.write(text)


def end_log() -> None:
    """Says how many lines were lost, and lets the process end well although its terminal is gone."""
    for handler in log.handlers:
        if isinstance(handler, _Counting) and handler.lost:
            log.warning("%s has lost %d lines of the log", handler.place, handler.lost)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            with contextlib.suppress(OSError):  # Python flushes once more at exit, and would fail
                os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
