"""How the latest start of a run ended, in `RUN/outcome.json`: what a batch script can read.

A launcher makes status 1 of whatever its ranks say, so the script that started it looks here.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from lgp_dist.errors import UserError
from lgp_dist.files import write_json

NAME = "outcome.json"
STATUSES = ("complete", "preempted", "failed")


@dataclass(frozen=True)
class RunStatus:
    """The end of one start of a run."""

    outcome: str
    """complete, preempted (saved; start it again) or failed."""
    stage: str = ""
    """The stage that was at work; empty where none was."""
    step: int = 0
    """Optimizer steps of that stage that are done."""
    sentence: str = ""
    """What a person is told; empty where all is well."""

    def __post_init__(self) -> None:
        if self.outcome not in STATUSES:
            raise ValueError(f"outcome is {self.outcome!r}, not one of {', '.join(STATUSES)}")


def write_run_status(run: Path, status: RunStatus) -> None:
    """Replaces outcome.json. Called by rank 0; UserError where the folder cannot be written to."""
    write_json(run / NAME, asdict(status))


def clear_run_status(run: Path) -> None:
    """Removes that of an earlier start, which must not speak for one that is killed."""
    (run / NAME).unlink(missing_ok=True)


def read_run_status(run: Path) -> RunStatus | None:
    """How the latest start ended; None where it runs, was killed or never was. UserError where the file is damaged."""
    path = run / NAME
    try:
        return RunStatus(**json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} does not say how a run ended ({error}): remove it, and start the run again.") from None
