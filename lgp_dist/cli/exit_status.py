"""How `lgp` ends: what a person can fix becomes one sentence and status 2."""

import contextlib
import errno
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TypeVar

from lgp_dist.engine.watch.signals import asked_before
from lgp_dist.errors import INTERRUPTED, OUTPUT_CLOSED, PREEMPTED, USER, Preempted, RankExited, UserError, peer_gone
from lgp_dist.files import write_json

NOT_WRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM}

PATIENCE_S = 15.0
"""Seconds a rank waits for one that failed before it, whose sentence stands alone."""


Result = TypeVar("Result")


def guarded(call: Callable[[], Result], debug: bool, run_dir: str = "") -> Result:
    """Returns what the call returns; what a person can fix becomes one sentence and status 2.

    run_dir: for an error of writing that names no file.
    """
    try:
        return call()
    except UserError as error:
        _fail(error, str(error), debug)
    except Preempted as stop:
        _leave(str(stop), PREEMPTED)
    except BrokenPipeError:  # the reader of the output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(OUTPUT_CLOSED)
    except OSError as error:
        if error.errno not in NOT_WRITABLE:
            raise
        where = error.filename or f"The run directory {run_dir}"
        other = "another --run-dir" if run_dir else "a folder that can be written to"
        sentence = f"{where} cannot be written ({error.strerror}): free space, or choose {other}."
        _fail(error, sentence, debug)
    except RuntimeError as error:
        if peer_gone(error):
            _give_way(error.__cause__ or error)
        if isinstance(error, RankExited):
            _leave(str(error), USER)
        raise
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def _give_way(error: BaseException) -> None:
    """Waits for the launcher to end this rank, since another failed first and says why."""
    if asked_before(error):
        signal.raise_signal(signal.SIGTERM)  # the launcher has sent it already
    time.sleep(PATIENCE_S)


def _fail(error: Exception, sentence: str, debug: bool) -> NoReturn:
    """Prints the sentence: rank 0 at once; others wait first, and the launcher ends them if rank 0 has failed too."""
    if os.environ.get("RANK", "0") != "0":
        _give_way(error)
    if debug:
        traceback.print_exc()
    _leave(sentence, USER)


def _leave(sentence: str, status: int) -> NoReturn:
    rank = os.environ.get("RANK", "0")
    with contextlib.suppress(OSError):  # a closed terminal does not change the status
        sys.stderr.write(f"lgp: {sentence}\n" if rank == "0" else f"lgp (rank {rank}): {sentence}\n")
        sys.stderr.flush()
    if "TORCHELASTIC_ERROR_FILE" in os.environ:  # torch's launcher prints it last, below its own traceback
        with contextlib.suppress(UserError):
            told = {"message": f"lgp: {sentence}", "timestamp": int(time.time())}
            write_json(Path(os.environ["TORCHELASTIC_ERROR_FILE"]), told)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        os._exit(status)  # of a launch: no waiting for other ranks at exit
    sys.exit(status)
