"""How the latest start of a run ended, in `RUN/outcome.json`: what a batch script can read.

A launcher makes status 1 of whatever its ranks say, so the script that started it looks here.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from lgp_dist.files import write_json

NAME = "outcome.json"


@dataclass(frozen=True)
class RunStatus:
    """The end of one start of a run."""

    outcome: Literal["complete", "preempted", "failed"]
    """preempted: saved; start it again."""
    stage: str = ""
    """The stage that was at work; empty where none was."""
    step: int = 0
    """Optimizer steps of that stage that are done."""
    sentence: str = ""
    """What a person is told; empty where all is well."""


def write_run_status(run: Path, status: RunStatus) -> None:
    """Replaces outcome.json. Called by rank 0; UserError where the folder cannot be written to."""
    write_json(run / NAME, asdict(status))


def clear_run_status(run: Path) -> None:
    """Removes that of an earlier start, which must not speak for one that is killed."""
    (run / NAME).unlink(missing_ok=True)
