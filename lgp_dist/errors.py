"""What ends a run other than a bug, and the exit status of each end."""

import difflib
from collections.abc import Iterable

# docs/preemption.md says what becomes of these under a launcher.
OK = 0
"""All that was asked for is done."""
BUG = 1
"""A traceback; also what a launcher makes of every status of a rank but 0."""
USER = 2
"""Something a person can put right: one sentence says what."""
HUNG = 70
"""The watchdog ended this rank: `hang.json` names who hangs (EX_SOFTWARE of sysexits)."""
PREEMPTED = 75
"""Asked to leave by a signal, saved and left: start it again (EX_TEMPFAIL of sysexits)."""
INTERRUPTED = 130
"""Ctrl-C."""
OUTPUT_CLOSED = 141
"""Whoever read the output has left, as `head` does when it has enough (128 + SIGPIPE)."""


class UserError(ValueError):
    """Something the person at the keyboard can put right.

    Its text is one sentence that names the file, key and value and says what to do. The command line
    prints it alone and exits with status 2; any other exception is a bug and keeps its traceback.
    """


def nearest(given: str, known: Iterable[str], otherwise: str) -> str:
    """What a sentence advises after a name that is unknown: the known name most like it, or `otherwise`."""
    found = difflib.get_close_matches(given, list(known), 1)
    return f"the nearest is {found[0]}" if found else otherwise


class Preempted(Exception):
    """The run was asked to leave (SIGTERM, SIGUSR1, Ctrl-C); it has saved and can resume."""

    def __init__(self, stage: str, step: int, *, saved: bool):
        what = "has saved: the same command resumes from there" if saved else "could not save: see the log"
        super().__init__(f"Stage {stage} was asked to end at step {step} and {what}.")
        self.stage, self.step, self.saved = stage, step, saved
