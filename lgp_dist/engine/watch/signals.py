"""A request to leave, by SIGTERM or SIGUSR1, becomes a flag: the loop finishes its step, saves and ends.

Handlers only take a note. Signals reach ranks at different times, so that when to leave is for ranks to agree on.
"""

import signal
from types import FrameType
from typing import Any

from lgp_dist.errors import Preempted

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""What schedulers and launchers send before they kill."""

UNANSWERED = "Asked to leave before this, by "
"""Begins the note on an exception that ended a loop which had been asked to leave."""


def asked_before(failure: BaseException) -> bool:
    """Whether the loop that this failure ended had been asked to leave, which nobody answers any more."""
    return any(note.startswith(UNANSWERED) for note in getattr(failure, "__notes__", ()))


class Preemption:
    """While it is open, the signals set `asked`, once and for all; afterwards handlers are as they were.

    To be opened in the main thread; ValueError elsewhere. A rank within a call of C takes note when that returns.
    An exception that leaves it says whether it was asked, for `asked_before`: the request has had no effect.
    """

    def __init__(self) -> None:
        self.name = ""
        """The first signal that came, e.g. SIGUSR1; empty before."""
        self._before: dict[signal.Signals, Any] = {}

    @property
    def asked(self) -> bool:
        """Whether this rank has been asked to leave."""
        return bool(self.name)

    def __enter__(self) -> "Preemption":
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, failure: BaseException | None, trace: object) -> None:
        for number, handler in self._before.items():  # notes those that have come and wait for their handler
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before.clear()
        if self.asked and failure is not None and not isinstance(failure, Preempted):
            failure.add_note(f"{UNANSWERED}{self.name}.")

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.name = self.name or signal.Signals(number).name
