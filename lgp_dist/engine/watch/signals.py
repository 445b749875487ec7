"""Requests to leave, by SIGTERM, SIGUSR1, SIGUSR2 or Ctrl-C.

In the training loop a request becomes a flag: the loop finishes its step, saves and ends; a second Ctrl-C ends the
process at once. Signals reach ranks at different times, so ranks agree on the step after which they leave. Elsewhere
there is nothing to finish: the first request raises Preempted where the process is.
"""

import signal
import time
from types import FrameType
from typing import Any

from lgp_dist.errors import Preempted

SENT = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""What schedulers and launchers send before they kill."""

AGAIN_S = 2.0
"""Seconds in which another SIGINT is the launcher's, which passes on what the terminal has sent to all."""

UNANSWERED = "Asked to leave before this, by "
"""Start of the note on an exception that ended a loop which had been asked to leave."""


def asked_before(failure: BaseException) -> bool:
    """Whether the loop that this failure ended had been asked to leave."""
    return any(note.startswith(UNANSWERED) for note in getattr(failure, "__notes__", ()))


class Preemption:
    """A context in which the signals set `asked`; afterwards handlers are as they were.

    It must be opened in the main thread (else ValueError). A rank inside a C call takes note when the call returns. An
    exception that leaves the context after a request gets a note for `asked_before`: nobody answers the request.

    at_once: the first request also raises Preempted, and Ctrl-C keeps its handler. A context of the loop within one
    that is at_once tells it of its request, since the end of a run must not be disturbed by a second one.
    """

    def __init__(self, *, at_once: bool = False) -> None:
        self.at_once = at_once
        self.name = ""
        """The first signal that came, such as SIGUSR1."""
        self._since = 0.0
        self._before: dict[signal.Signals, Any] = {}

    @property
    def asked(self) -> bool:
        """Whether this rank has been asked to leave."""
        return bool(self.name)

    def __enter__(self) -> "Preemption":
        for number in SENT if self.at_once else (*SENT, signal.SIGINT):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, failure: BaseException | None, trace: object) -> None:
        for number, handler in self._before.items():  # also notes signals that wait for their handler
            outer = getattr(handler, "__self__", None)
            if isinstance(outer, Preemption):
                outer.name = outer.name or self.name
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before.clear()
        if self.asked and failure is not None and not isinstance(failure, Preempted):
            failure.add_note(f"{UNANSWERED}{self.name}.")

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGINT and self.name and now > self._since + AGAIN_S:
            raise KeyboardInterrupt
        if not self.name:
            self.name, self._since = signal.Signals(number).name, now
            if self.at_once:
                raise Preempted
