"""Two ranks for each of a few hangs outside of steps, all at the same time: stage_hangs_worker.py FOLDER TIMEOUT.

FOLDER/CASE holds a run whose stages before the case's are done; FOLDER/CASE/statuses.json tells how both ranks ended.
"""

import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from run_helpers import LIMIT_S, SMALL
from torture import Life

from lgp_dist import pipeline
from lgp_dist.engine import evaluate
from lgp_dist.engine import workers as setup
from lgp_dist.engine.workers import Workers
from lgp_dist.run.artifacts import RunDirectory
from lgp_dist.stages import finetune, start

LEAVE_S = 5.0
"""For the other rank to leave by itself when one has ended, after which a launcher ends it."""
SEEN_S = 2.0
"""After so many seconds in a phase the heartbeat has told of it."""


def stop() -> None:
    """This process stands still, as under a debugger."""
    time.sleep(SEEN_S)
    os.kill(os.getpid(), signal.SIGSTOP)


def at_second_call(go_wrong: Callable[[], None]) -> Callable[[], None]:
    """Goes wrong when it is called again."""
    calls = itertools.count()
    return lambda: go_wrong() if next(calls) == 1 else None


def before(function: Callable[..., Any], go_wrong: Callable[[], None]) -> Callable[..., Any]:
    """The function, but something goes wrong first."""

    def call(*arguments: Any, **options: Any) -> Any:
        go_wrong()
        return function(*arguments, **options)

    return call


CASES: dict[str, tuple[str, int, Any, str, Callable[[], None]]] = {
    "joins": ("evaluate", 1, setup, "_join", stop),
    "compares": ("evaluate", 0, start, "agreed", stop),
    "waits": ("finetune", 1, Workers, "barrier", at_second_call(stop)),  # the first is that of the start
    "writes": ("finetune", 0, RunDirectory, "_record", stop),
    "ledger": ("finetune", 0, finetune, "draws_of", partial(time.sleep, 600)),
    "accuracy": ("evaluate", 1, evaluate, "correct", stop),
    "report": ("evaluate", 0, pipeline, "publish", stop),
}
"""Case -> stage to run, rank that goes wrong, and the function before which it does."""


def prepare(case: str, mine: int) -> None:
    """Makes a rank go wrong in its case."""
    _, rank, owner, name, go_wrong = CASES[case]
    if mine == rank:
        setattr(owner, name, before(getattr(owner, name), go_wrong))


def main(folder: Path, timeout: str) -> None:
    """All cases; a rank that is left when the other has ended is killed, as a launcher does."""
    lives = {}
    for case, (stage, *_) in CASES.items():
        arguments = (stage, *SMALL, "--engine.device=cpu", "--trackers", f"--faults.timeout-s={timeout}")
        lives[case] = Life(folder / case, "ddp", folder / case / "out.log", arguments, partial(prepare, case))

    def end(case: str) -> None:
        assert lives[case].wait(LIMIT_S, LEAVE_S), case
        (folder / case / "statuses.json").write_text(json.dumps(lives[case].statuses))

    with ThreadPoolExecutor(len(lives)) as pool:
        list(pool.map(end, lives))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
