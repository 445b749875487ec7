"""How the latest start of a run ended, in `RUN/outcome.json`: what a batch script can read.

A launcher makes status 1 of whatever its ranks say, so the script that started it looks here.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from lgp_dist.errors import Preempted, RankExited, UserError, peer_gone
from lgp_dist.files import LOCK, write_json

NAME = "outcome.json"


@dataclass(frozen=True)
class RunStatus:
    """The end of one start of a run."""

    outcome: Literal["complete", "preempted", "failed", "lost"]
    """preempted: saved; start it again. lost: a rank was killed, or died with its node; start it again."""
    stage: str = ""
    """The stage that was at work; empty where none was."""
    step: int = 0
    """Optimizer steps of that stage that are done; of a failure, the number of the latest step, from 0."""
    sentence: str = ""
    """What a person is told; empty where all is well."""


def status_of(error: BaseException, stage: str = "", step: int = 0) -> RunStatus:
    """That of a run which this exception ended, at a step of a stage."""
    if isinstance(error, Preempted):
        return RunStatus("preempted", error.stage or stage, error.step or step, str(error))
    outcome: Literal["lost", "failed"] = "lost" if isinstance(error, RankExited) else "failed"
    return RunStatus(outcome, stage, step, str(error) or type(error).__name__)


@contextlib.contextmanager
def ended(run: Path) -> Iterator[None]:
    """Writes how the block ended that begins and ends a run, if the run itself has not, on rank 0.

    A run writes its own end. This is for one that ends before it has begun, or after its last stage. Nothing is written
    where another process holds the run directory. A refusal makes no folder, and keeps the end of an earlier start.
    """
    rank, before = os.environ.get("RANK", "0"), _written(run)
    try:
        yield
    except (Preempted, Exception) as error:
        own, asked = read_run_status(run) if _written(run) != before else None, isinstance(error, Preempted)
        due = own.outcome == "complete" if own else asked or run.is_dir() and not before
        if rank == "0" and due and not (run / LOCK).exists() and not peer_gone(error):
            with contextlib.suppress(UserError):  # the error itself is what a person must see
                write_run_status(run, status_of(error))
        raise


def _written(run: Path) -> int:
    """When outcome.json was written, in ns; 0 without one."""
    with contextlib.suppress(OSError):
        return (run / NAME).stat().st_mtime_ns
    return 0


def read_run_status(run: Path) -> RunStatus | None:
    """The latest end of a run; None without one, or if the file is damaged."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        return RunStatus(**json.loads((run / NAME).read_text()))
    return None


def write_run_status(run: Path, status: RunStatus) -> None:
    """Replaces outcome.json. Called by rank 0; UserError where the folder cannot be written to."""
    write_json(run / NAME, asdict(status))


def clear_run_status(run: Path) -> None:
    """Removes that of an earlier start, which must not speak for one that is killed."""
    (run / NAME).unlink(missing_ok=True)
