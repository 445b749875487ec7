"""What a person can put right becomes one sentence and status 2."""

import contextlib
import errno
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import NoReturn, TypeVar

from lgp_dist.engine.watch.signals import asked_before
from lgp_dist.errors import INTERRUPTED, PREEMPTED, USER, Preempted, UserError

NOT_WRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM}

PEER_GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
"""What gloo says on a rank whose peer has failed."""

PATIENCE_S = 15.0
"""How long a rank leaves the word to another that failed first, seconds."""


Result = TypeVar("Result")


def guarded(call: Callable[[], Result], debug: bool, run_dir: str = "") -> Result:
    """What the call returns; what a person can put right becomes one sentence and status 2."""
    try:
        return call()
    except UserError as error:
        _fail(error, str(error), debug)
    except Preempted as stop:
        _leave(str(stop), PREEMPTED)
    except OSError as error:
        if error.errno not in NOT_WRITABLE:
            raise
        where = error.filename or f"The run directory {run_dir}"
        sentence = f"{where} cannot be written ({error.strerror}): free space, or choose another --run-dir."
        _fail(error, sentence, debug)
    except RuntimeError as error:
        if not any(text in str(error) for text in PEER_GONE):
            raise
        _give_way(error)
        raise
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def _give_way(error: Exception) -> None:
    """To another rank that failed first: that one says why, and the launcher ends this one."""
    if asked_before(error):
        signal.raise_signal(signal.SIGTERM)  # it has sent it already
    time.sleep(PATIENCE_S)


def _fail(error: Exception, sentence: str, debug: bool) -> NoReturn:
    """Says it once: rank 0 at once; another rank waits, and is ended by the launcher if rank 0 has failed too."""
    if int(os.environ.get("RANK", "0")):
        _give_way(error)
    if debug:
        traceback.print_exc()
    _leave(sentence, USER)


def _leave(sentence: str, status: int) -> NoReturn:
    rank = int(os.environ.get("RANK", "0"))
    with contextlib.suppress(OSError):  # a terminal that is gone does not change the status
        sys.stderr.write(f"lgp: {sentence}\n" if rank == 0 else f"lgp (rank {rank}): {sentence}\n")
        sys.stderr.flush()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        os._exit(status)  # one of several ranks: without waiting for the others at exit
    sys.exit(status)
