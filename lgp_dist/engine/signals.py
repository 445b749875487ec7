"""A request to leave, by SIGTERM or SIGUSR1, becomes a flag: the loop finishes its step, saves and ends.

Handlers only take a note. Signals reach ranks at different times, so that when to leave is for ranks to agree on.
"""

import signal
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""What schedulers and launchers send before they kill."""


class Preemption:
    """While it is open, the signals set `asked`, once and for all; afterwards handlers are as they were.

    To be opened in the main thread; ValueError elsewhere. A rank within a call of C takes note when that returns.
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

    def __exit__(self, *failure: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.name = self.name or signal.Signals(number).name
