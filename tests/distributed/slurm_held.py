"""`lgp` whose ranks wait at the place that the file LGP_TEST_HOLD names, until it does not or they are asked to leave.

Places: start, and each stage. Stages that train wait in their third step, the others before they do anything. A rank
that waits writes the place to `held-RANK` in the run directory.
"""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lgp_dist import pipeline
from lgp_dist.cli import main
from lgp_dist.data.stream import TrainStream
from lgp_dist.protocols import Batch
from lgp_dist.stages import start
from lgp_dist.stages.context import Context

HOLD, MARK = Path(os.environ["LGP_TEST_HOLD"]), Path(os.environ["RUN"], f"held-{os.environ['RANK']}")
TRAIN, HELD_STEP = ("distil", "finetune"), 2


def is_held(place: str) -> bool:
    with contextlib.suppress(OSError):
        return HOLD.read_text() == place
    return False


def hold(place: str) -> None:
    """Outside of steps a request to leave raises; in the training loop it is asked for."""
    if is_held(place):
        MARK.write_text(place)
    while is_held(place) and not signal.getsignal(signal.SIGUSR1).__self__.asked:
        time.sleep(0.1)


def holding(place: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        hold(place)
        return function(*arguments)

    return call


def in_steps(stage: str, function: Callable[[Context], None]) -> Callable[[Context], None]:
    def batches(stream: TrainStream, first: int, steps: int) -> Iterator[Batch]:
        for step, batch in enumerate(own(stream, first, steps), first):
            if step == HELD_STEP:
                hold(stage)
            yield batch

    def call(context: Context) -> None:
        TrainStream.batches = batches
        function(context)

    own = TrainStream.batches
    return call


start.load_manifest = holding("start", start.load_manifest)
for name, run in pipeline.RUN.items():
    pipeline.RUN[name] = (in_steps if name in TRAIN else holding)(name, run)
main()
