"""Heartbeats: a small file per rank that says where it is, and from all of them who holds up the others.

Clocks of machines differ, so times of two ranks are never compared: a rank reports the age of its own note, and whether
another rank lives shows in its counter, watched for a while by the reader's clock.
"""

import contextlib
import json
import os
import sys
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

COMMUNICATION = (f"{os.sep}torch{os.sep}distributed{os.sep}", f"{os.sep}deepspeed{os.sep}comm{os.sep}")
"""Folders of code in which a call waits for other ranks."""


@dataclass(frozen=True)
class Beat:
    """What a rank reports about itself."""

    rank: int
    host: str
    pid: int
    life: str
    """Random, drawn at start: tells this process from an earlier one with the same pid."""
    beat: int
    """Counts the beats."""
    stage: str
    notes: int
    """Notes taken in this run. All ranks take the same notes, so this is a rank's place in the run."""
    step: int | None
    """The last step of this stage; None before the first."""
    phase: str
    path: str
    age_s: float
    """Seconds since the note."""
    waits: bool
    """Whether its main thread is in a call that waits for other ranks."""
    where: str
    """File, line and function of its main thread."""

    @property
    def name(self) -> str:
        """For a message."""
        return f"Rank {self.rank} ({self.host}, pid {self.pid})"

    @property
    def moment(self) -> str:
        """Step and phase."""
        return f"phase {self.phase}" if self.step is None else f"step {self.step}, phase {self.phase}"

    def __str__(self) -> str:
        stage = f"stage {self.stage}, " if self.stage else ""
        step = "" if self.step is None else f"step {self.step}, "
        path = f"path {self.path}, " if self.path else ""
        return f"{stage}{step}{path}phase {self.phase}"


def main_thread() -> tuple[bool, str]:
    """Returns whether the main thread waits for other ranks, and where it is."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    if frame is None:
        return False, "ended"
    file = os.sep.join(frame.f_code.co_filename.split(os.sep)[-2:])
    where, depth = f"{file}:{frame.f_lineno} {frame.f_code.co_name}", 0
    while frame is not None and depth < 4:  # a wrapper or two stand between c10d's function and its logger
        if any(folder in frame.f_code.co_filename for folder in COMMUNICATION):
            return True, where
        frame, depth = frame.f_back, depth + 1
    return False, where


def beat_file(folder: Path, rank: int) -> Path:
    """The file of a rank's heartbeat."""
    return folder / f"rank-{rank}.json"


def read_beats(folder: Path, world: int) -> dict[int, Beat]:
    """Returns the newest beat of every rank whose file can be read."""
    found = {}
    for rank in range(world):
        with contextlib.suppress(OSError, ValueError, TypeError):
            found[rank] = Beat(**json.loads(beat_file(folder, rank).read_text()))
    return found


class Pulse:
    """Which ranks' counters move, by this rank's own clock."""

    def __init__(self, world: int, now: float):
        self.world = world
        self.beats: dict[int, Beat] = {}
        self._moved: dict[int, tuple[object, float]] = {rank: (None, now) for rank in range(world)}

    def see(self, beats: Mapping[int, Beat], now: float) -> None:
        """Adds heartbeats that were read."""
        self.beats |= beats
        for rank, beat in beats.items():
            mark = (beat.life, beat.beat)
            if self._moved[rank][0] != mark:
                self._moved[rank] = (mark, now)

    def silent(self, now: float, span: float) -> list[int]:
        """Returns the ranks whose counter has not moved for this many seconds."""
        return [rank for rank in range(self.world) if now - self._moved[rank][1] >= span]


@dataclass(frozen=True)
class Suspects:
    """Who holds up the others, and why they are suspected."""

    ranks: tuple[int, ...]
    """Empty if no rank stands out."""
    reason: str
    """silent, busy, apart, behind or together."""


def judge(beats: Mapping[int, Beat], silent: Sequence[int]) -> Suspects:
    """Finds who holds up the others: silent ranks, else ranks that alone do not wait, else ranks at another place.

    If all wait, the rare place is to blame, and of equally rare ones the furthest: it left out the call in which the
    others wait. If none is seen to wait (a GPU's queue hides that), the ranks that are behind hold up the others.
    """
    if silent:
        return Suspects(tuple(silent), "silent")
    busy = [rank for rank, beat in beats.items() if not beat.waits]
    if busy and len(busy) < len(beats):
        return Suspects(tuple(busy), "busy")
    places = Counter(beat.notes for beat in beats.values())
    if len(places) == 1:
        return Suspects((), "together")
    if busy:
        odd, reason = min(places), "behind"
    else:
        odd, reason = min(places, key=lambda place: (places[place], -place)), "apart"
    return Suspects(tuple(rank for rank, beat in beats.items() if beat.notes == odd), reason)


def listed(ranks: Sequence[int]) -> str:
    """Returns `rank 1` or `ranks 0, 2`."""
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


def sentence(suspects: Suspects, pulse: Pulse, limit_s: float) -> str:
    """Returns the message: which ranks, for how long, where, and who waits for them."""
    beats = pulse.beats
    others = [rank for rank in range(pulse.world) if rank not in suspects.ranks]
    if not suspects.ranks:
        rank, beat = min(beats.items())
        who = f"{beat.name} has" if pulse.world == 1 else f"All {pulse.world} ranks have"
        return f"{who} made no progress for {limit_s:g} s: {beat}, rank {rank} at {beat.where}."
    held = ""
    if others:
        them = "it" if len(suspects.ranks) == 1 else "them"
        held = f"; {listed(others)} wait{'s' * (len(others) == 1)} for {them}"
        if suspects.reason != "behind" and len({beats[rank].notes for rank in others}) == 1:
            held += f" in {beats[others[0]].moment}"
    return "; ".join(_charge(rank, beats.get(rank), suspects.reason) for rank in suspects.ranks) + held + "."


def _charge(rank: int, beat: Beat | None, reason: str) -> str:
    if beat is None:
        return f"Rank {rank} has given no sign of life"
    if reason == "silent":
        causes = "stopped, dead, cut off, or in a call that keeps Python's lock"
        return f"{beat.name} gives no sign of life ({causes}): last seen in {beat}"
    did = "is ahead and has left out what others wait in" if reason == "apart" else "has made no progress"
    return f"{beat.name} {did} for {beat.age_s:.0f} s: {beat}, at {beat.where}"
