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


def first_line(error: Exception) -> str:
    """What an exception of a library says first, for a sentence; its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")


def nearest(given: str, known: Iterable[str], otherwise: str) -> str:
    """What a sentence advises after a name that is unknown: the known name most like it, or `otherwise`."""
    found = difflib.get_close_matches(given, list(known), 1)
    return f"the nearest is {found[0]}" if found else otherwise


class Preempted(BaseException):
    """The run was asked to leave (SIGTERM, SIGUSR1, SIGUSR2, Ctrl-C) and can resume.

    Like KeyboardInterrupt no Exception, since a signal may raise it inside of code that handles all of these.
    stage: that has trained `step` steps and saved; empty outside of training steps, where ranks leave one by one.
    """

    def __init__(self, stage: str = "", step: int = 0, *, saved: bool = True):
        what = "has saved: the same command resumes from there" if saved else "could not save: see the log"
        outside = "The run was asked to end outside of training steps: the same command continues it."
        super().__init__(f"Stage {stage} was asked to end at step {step} and {what}." if stage else outside)
        self.stage, self.step, self.saved = stage, step, saved


class RankExited(RuntimeError):
    """Another rank has exited, of itself, killed or with its node, while this one worked with it. The text names it."""


PEER_GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
"""Parts of gloo's messages on a rank whose peer has exited."""


def peer_gone(error: BaseException) -> bool:
    """Whether an error only says that another rank has exited, which knows the reason."""
    by_gloo = isinstance(error, RuntimeError) and any(text in str(error) for text in PEER_GONE)
    return by_gloo or isinstance(error, RankExited)
