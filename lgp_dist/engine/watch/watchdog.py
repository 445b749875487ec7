"""A watchdog in every rank: ends a run that makes no progress, and names the ranks that hold up the others.

    FOLDER/rank-N.json          where rank N is (heartbeat.py)
    FOLDER/hang.json            who hangs: the message, the ranks, and where every rank was
    FOLDER/stacks-rank-N.txt    what every thread of rank N was doing

The main thread notes where it is; a thread writes that as a heartbeat. Once the last note is older than half the limit,
the thread watches all heartbeats; once it is as old as the limit and no rank makes progress any more, it judges. The
first to judge writes `hang.json`; the others see it, write their stacks and exit too. A rank that cannot run Python
(stopped, or in a call that keeps the lock) is judged by the others, and its launcher ends it.
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
from typing import Any, TextIO, TypeVar

from lgp_dist.engine.watch.heartbeat import (
    Beat,
    Pulse,
    beat_file,
    judge,
    main_thread,
    read_beats,
    sentence,
)
from lgp_dist.errors import HUNG, UserError
from lgp_dist.files import write_json

log = logging.getLogger("lgp")
Item = TypeVar("Item")

BEATS = 20
"""Heartbeats within the timeout."""
SHORTEST_S = 0.5
"""Least seconds between two heartbeats."""
STILL = 4
"""Heartbeats for which a counter must not move until its rank counts as silent."""
PATIENCE = 10.0
"""Factor of the timeout outside of steps and until a training's second step, while indexes are read, engines built,
kernels compiled, paths measured and artifacts written."""
MOST_S = 3600.0
"""Most seconds that PATIENCE makes of a timeout, unless the timeout itself is longer."""
LAST_WORDS_S = 2.0
"""Seconds for log and terminal, which may hang themselves, before the process exits."""


def longest(timeout_s: float) -> float:
    """Returns the seconds without progress after which the watchdog ends a run outside of steps."""
    return max(timeout_s, min(timeout_s * PATIENCE, MOST_S))


@dataclass(frozen=True)
class Note:
    """Where a rank is. A new one, even an equal one, is a sign of progress."""

    stage: str
    step: int | None
    phase: str
    path: str
    notes: int
    """Notes before it."""


class Watchdog:
    """Watches one rank while it is open, as a context.

    All ranks see its folder. Every rank opens one and takes the same notes. A timeout of 0 turns it off.
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
        """Returns a watchdog that watches nothing."""
        return cls(Path(), 0, 1, 0.0)

    @classmethod
    def launched(cls, folder: Path, timeout_s: float) -> "Watchdog":
        """Returns the watchdog for this rank, which the launcher's environment names before the ranks join."""
        return cls(folder, int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")), timeout_s)

    @property
    def place(self) -> tuple[str, int]:
        """Stage and step at which this rank is, or was last."""
        return self._note.stage, self._note.step or 0

    def note(self, step: int, phase: str, path: str | None = None) -> None:
        """Notes a phase of a step. path: None keeps the last one. Does no I/O."""
        if self._first is None:
            self._first = step
        elif step != self._first:
            self._limit = self.timeout_s
        path = self._note.path if path is None else path
        self._note = Note(self._note.stage, step, phase, path, self._note.notes + 1)

    def begin(self, stage: str) -> None:
        """Notes the beginning of a stage."""
        self._note = replace(self._note, stage=stage, step=None, path="")
        self.phase("begin")

    def phase(self, phase: str, at_most_s: float = math.inf) -> None:
        """Notes a phase outside of steps, or a long one, on every rank. Step and path stay those of the last step.

        at_most_s: seconds after which the phase has failed in any case.
        """
        self._first, self._limit = None, min(longest(self.timeout_s), at_most_s)
        self._note = replace(self._note, phase=phase, notes=self._note.notes + 1)

    def alive(self) -> None:
        """Notes progress within a phase. Other ranks need not do the same."""
        self._note = replace(self._note)

    def over(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yields the items and notes progress for each."""
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
        """The thread: beats until the end, and judges when nothing moves."""
        note, pulse, noted, since, now, last = None, None, 0.0, 0.0, 0.0, time.monotonic()
        while not self._stop.wait(self.interval):
            limit = self._limit
            if stacks := self._open():
                # A thread in C, which writes stacks even if a call keeps Python's lock and this thread stands still.
                faulthandler.dump_traceback_later(limit, file=stacks)
            # `now` leaves out the time in which this process was stopped: a suspended job does not grow old.
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

    def _open(self) -> TextIO | None:
        """The file for stacks, if it can be written. Created at the first beat: a refused run leaves nothing."""
        if self._stacks is None:
            with contextlib.suppress(OSError):
                self.folder.mkdir(parents=True, exist_ok=True)
                self._stacks = (self.folder / f"stacks-rank-{self.rank}.txt").open("w")
        return self._stacks

    def _beat(self, note: Note, age_s: float) -> Beat:
        waits, where = main_thread()
        self._beats += 1
        age: dict[str, Any] = {**vars(note), "age_s": round(age_s, 3), "waits": waits, "where": where}
        beat = Beat(self.rank, self._host, os.getpid(), self._life, self._beats, **age)
        try:
            write_json(beat_file(self.folder, self.rank), asdict(beat))
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
        """The message about the ranks that hold up the others, which `hang.json` records."""
        suspects = judge(pulse.beats, silent)
        text = sentence(suspects, pulse, limit)
        record = {
            "sentence": text,
            "ranks": suspects.ranks,
            "reason": suspects.reason,
            "told_by": self.rank,
            "beats": [asdict(beat) for beat in pulse.beats.values()],
            "lives": [beat.life for beat in pulse.beats.values()],
        }
        with contextlib.suppress(UserError):
            write_json(self.folder / "hang.json", record)
        return text

    def _end(self, text: str) -> None:
        """Writes stacks and the message, and ends the process, whatever its other threads hold."""
        faulthandler.cancel_dump_traceback_later()
        if self._stacks is not None:
            with contextlib.suppress(OSError):
                faulthandler.dump_traceback(file=self._stacks, all_threads=True)
        if text:
            speaker = threading.Thread(target=_say, args=(text,), daemon=True)
            speaker.start()
            speaker.join(LAST_WORDS_S)
        # The others write their stacks before connections close or the launcher ends them.
        time.sleep(2 * self.interval)
        os._exit(HUNG)


def _say(text: str) -> None:
    sys.stderr.write(f"lgp: {text}\n")
    sys.stderr.flush()
    log.error("%s", text)
    for handler in log.handlers:
        handler.flush()
