"""A watchdog in every rank: ends a run in which nothing moves any more, and says who holds it up.

    FOLDER/rank-N.json          where rank N is (engine/heartbeat.py)
    FOLDER/hang.json            who hangs: the sentence, the ranks and where every rank was
    FOLDER/stacks-rank-N.txt    what every thread of rank N was doing

A rank whose own note has grown old reads what all ranks say. While one of them still makes progress it goes on waiting.
The first to judge writes `hang.json`; the others see it, write their stacks and end too. A rank that cannot run Python
(stopped, or in a call that keeps the lock) is judged by the others, which wait for it; the launcher ends it.
"""

import contextlib
import faulthandler
import json
import logging
import math
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TextIO, TypeVar

from lgp_dist.engine.watch.heartbeat import (
    Beat,
    Pulse,
    judge,
    main_thread,
    read_beats,
    sentence,
    write_beat,
)
from lgp_dist.errors import HUNG, UserError
from lgp_dist.files import write_json

log = logging.getLogger("lgp")
Item = TypeVar("Item")

BEATS = 20
"""Beats within the timeout."""
SHORTEST_S = 0.5
"""Least seconds between two beats."""
STILL = 4
"""Beats that a counter stands still before its rank counts as silent."""
PATIENCE = 10.0
"""How much longer the timeout is outside of steps and until a second one begins: indexes are read, engines made,
kernels compiled, paths measured, artifacts written."""
MOST_S = 3600.0
"""What this makes of a timeout at most, seconds, unless the timeout itself is longer."""
LAST_WORDS_S = 2.0
"""Seconds for log and terminal, which may hang themselves, before the process ends."""


def longest(timeout_s: float) -> float:
    """Seconds without progress after which the watchdog ends a run outside of steps."""
    return max(timeout_s, min(timeout_s * PATIENCE, MOST_S))


@dataclass(frozen=True)
class Note:
    """Where a rank is. A new one, though equal, is a sign of progress."""

    stage: str
    step: int | None
    phase: str
    path: str
    number: int
    """Notes before it."""


class Watchdog:
    """Watches over one rank while it is open.

    The folder lies where all ranks see it. Every rank opens one and takes the same notes. A timeout of 0 turns it off.
    """

    def __init__(self, folder: Path, rank: int, world: int, timeout_s: float):
        self.folder, self.rank, self.world, self.timeout_s = folder, rank, world, timeout_s
        self.interval = max(SHORTEST_S, timeout_s / BEATS)
        self._note, self._limit = Note("", None, "start", "", 0), longest(timeout_s)
        self._first: int | None = None
        self._life, self._host, self._beats = secrets.token_hex(8), socket.gethostname(), 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._stacks: TextIO | None = None
        self._failed = False

    @classmethod
    def off(cls) -> "Watchdog":
        """One that watches nothing."""
        return cls(Path(), 0, 1, 0.0)

    @classmethod
    def launched(cls, folder: Path, timeout_s: float) -> "Watchdog":
        """That of this process as its launcher has numbered it, before it has joined the others."""
        return cls(folder, int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")), timeout_s)

    def note(self, step: int, phase: str, path: str | None = None) -> None:
        """A step is here; path: None for that of before. Costs no I/O."""
        if self._first is None:
            self._first = step
        elif step != self._first:
            self._limit = self.timeout_s
        path = self._note.path if path is None else path
        self._note = Note(self._note.stage, step, phase, path, self._note.number + 1)

    def begin(self, stage: str) -> None:
        """A stage begins."""
        self._note = replace(self._note, stage=stage, step=None, path="")
        self.phase("begin")

    def phase(self, phase: str, at_most_s: float = math.inf) -> None:
        """Something outside of steps, or long, begins on every rank. Step and path stay those of the last step.

        at_most_s: after which it has failed anyhow, if that is earlier.
        """
        self._first, self._limit = None, min(longest(self.timeout_s), at_most_s)
        self._note = replace(self._note, phase=phase, number=self._note.number + 1)

    def alive(self) -> None:
        """Progress within a phase, which other ranks need not make."""
        self._note = replace(self._note)

    def over(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items, of which each that comes is progress within a phase."""
        for item in items:
            self.alive()
            yield item

    def __enter__(self) -> "Watchdog":
        if self.timeout_s:
            with contextlib.suppress(OSError):
                for name in ("hang.json",) * (self.rank == 0) + (f"rank-{self.rank}.json",):
                    (self.folder / name).unlink(missing_ok=True)
            self._thread.start()
        return self

    def __exit__(self, *failure: object) -> None:
        if self.timeout_s:
            self._stop.set()
            self._thread.join(self.timeout_s)
            faulthandler.cancel_dump_traceback_later()
            if self._stacks is not None:
                self._stacks.close()
            if any(failure):
                return
            with contextlib.suppress(OSError):
                for name in (f"rank-{self.rank}.json", f"stacks-rank-{self.rank}.txt"):
                    (self.folder / name).unlink(missing_ok=True)

    def _watch(self) -> None:
        note, pulse, noted, since, now, last = None, None, 0.0, 0.0, 0.0, time.monotonic()
        while not self._stop.wait(self.interval):
            limit = self._limit
            if self._open():
                # In a thread of C: it also writes where a call keeps Python's lock and this thread stands still.
                faulthandler.dump_traceback_later(limit, file=self._stacks)
            # `now` does not count the time in which this process was stopped: a suspended job does not grow old.
            now, last = now + min(time.monotonic() - last, 2 * self.interval), time.monotonic()
            if note is not self._note:
                note, noted = self._note, now
            beat = self._beat(note, now - noted)
            if beat.age_s < limit / 2:
                pulse = None
                continue
            if pulse is None:
                pulse, since = Pulse(self.world, now), now
            pulse.see(read_beats(self.folder, self.world) | {self.rank: beat}, now)
            if self._told():
                self._end("")
            if beat.age_s >= limit and now - since >= STILL * self.interval:
                silent = [rank for rank in pulse.silent(now, (STILL - 1) * self.interval) if rank != self.rank]
                if all(rank in silent or other.age_s >= limit / 2 for rank, other in pulse.beats.items()):
                    self._end(self._accuse(pulse, silent, limit))

    def _open(self) -> bool:
        """Whether the folder is there and takes stacks; made at the first beat, so that what is refused at once leaves
        nothing."""
        if self._stacks is None:
            with contextlib.suppress(OSError):
                self.folder.mkdir(parents=True, exist_ok=True)
                self._stacks = (self.folder / f"stacks-rank-{self.rank}.txt").open("w")
        return self._stacks is not None

    def _beat(self, note: Note, age_s: float) -> Beat:
        waits, where = main_thread()
        self._beats += 1
        beat = Beat(
            *(self.rank, self._host, os.getpid(), self._life, self._beats),
            *(note.stage, note.number, note.step, note.phase, note.path, round(age_s, 3), waits, where),
        )
        try:
            write_beat(self.folder, beat)
        except UserError as error:
            if not self._failed:
                log.warning("The heartbeat of rank %d is not written: %s", self.rank, error)
            self._failed = True
        return beat

    def _told(self) -> bool:
        """Whether another rank of this start has named who hangs."""
        try:
            return self._life in json.loads((self.folder / "hang.json").read_text())["lives"]
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def _accuse(self, pulse: Pulse, silent: list[int], limit: float) -> str:
        verdict = judge(pulse.beats, silent)
        text = sentence(verdict, pulse, limit)
        record = {
            "sentence": text,
            "ranks": verdict.ranks,
            "reason": verdict.reason,
            "told_by": self.rank,
            "beats": [asdict(beat) for beat in pulse.beats.values()],
            "lives": [beat.life for beat in pulse.beats.values()],
        }
        with contextlib.suppress(UserError):
            write_json(self.folder / "hang.json", record)
        return text

    def _end(self, text: str) -> None:
        """Stacks, last words, and the end of the process, whatever its other threads hold."""
        faulthandler.cancel_dump_traceback_later()
        if self._stacks is not None:
            with contextlib.suppress(OSError):
                faulthandler.dump_traceback(file=self._stacks, all_threads=True)
        if text:
            speaker = threading.Thread(target=_say, args=(text,), daemon=True)
            speaker.start()
            speaker.join(LAST_WORDS_S)
        time.sleep(
            2 * self.interval
        )  # the others write their stacks before connections close or the launcher ends them
        os._exit(HUNG)


def _say(text: str) -> None:
    sys.stderr.write(f"lgp: {text}\n")
    sys.stderr.flush()
    log.error("%s", text)
    for handler in log.handlers:
        handler.flush()
