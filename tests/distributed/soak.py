"""One long life of stage finetune on the sample, by scripts/soak: what its two ranks hold must not grow.

Ranks measure all paths, save, prune and log as they train. At the end SIGTERM asks them to leave with a checkpoint.
"""

import contextlib
import json
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import tyro
from footprint import Footprint, grown, summary
from torture import PATIENCE_S, RECIPE, Campaign, Life, Report, checkpoints
from torture import Options as Torture

from lgp_dist.engine.checkpoints.manifest import read_manifest
from lgp_dist.errors import PREEMPTED
from lgp_dist.run.provenance import environment

EVERY_S = 1.0
"""Between two looks at the ranks."""
LIMITS = (
    "--finetune.train.max-steps=10000000",
    "--finetune.train.epochs=1000000",
    "--checkpoint.every=25",
    "--finetune.watch-every=100",
    "--finetune.watch-images=8",
    "--finetune.train.log-every=10",
    "--faults.timeout-s=60",
)


@dataclass(frozen=True)
class Options:
    """Trains for so long and looks at memory, descriptors, threads and shared memory; status 1 where one grows."""

    seconds: float = 300.0
    """To train, at least 60."""
    engine: str = "zero1"
    """zero0 to zero3, or ddp."""
    out: Path | None = None
    """JSON of what was seen."""


def watch(life: Life, seconds: float) -> list[list[Footprint]]:
    """What each rank held at each look, until the time is over or a rank has ended."""
    found: list[list[Footprint]] = [[] for _ in life.pids]
    end = time.monotonic() + seconds
    while time.monotonic() < end and not life.look() and life.statuses == [None, None]:
        with contextlib.suppress(OSError, KeyError):  # one has ended meanwhile
            moments = [Footprint.of(pid) for pid in life.pids]
            for series, moment in zip(found, moments, strict=True):
                series.append(moment)
        time.sleep(EVERY_S)
    return found


def main() -> int:
    options, about = tyro.cli(Options), environment()
    if options.seconds < 60:
        sys.stderr.write(f"--seconds is {options.seconds:g}, but must be 60 or more: choose another value.\n")
        return 2
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        place = Path(folder) / "place"
        shutil.copytree(Campaign(Path(folder), Report(), Torture()).base, place)
        life = Life(place, options.engine, place / "out.log", ("finetune", *RECIPE, *LIMITS))
        series = watch(life, options.seconds)
        life.send(signal.SIGTERM)
        ended = life.wait(PATIENCE_S)
        log, left = (place / "out.log").read_text(), checkpoints(place)
        problems = [f"rank {rank}: {what}" for rank, one in enumerate(series) for what in grown(one)]
        if not ended or life.statuses != [PREEMPTED] * 2:
            problems.append(f"ended with statuses {life.statuses}: {log[-2000:]}")
        for checkpoint in left:
            read_manifest(checkpoint).check_files()
        steps = int(left[0].name.removeprefix("step-")) if left else 0
    seen = {"engine": options.engine, "seconds": options.seconds, "steps": steps, "looks": len(series[0])}
    seen |= {"checkpoints_left": len(left), "ranks": [summary(one) for one in series], "problems": problems}
    if options.out:
        content = seen | {"series": [[asdict(moment) for moment in one[::10]] for one in series]} | about
        options.out.write_text(json.dumps(content, indent=2) + "\n")
    sys.stdout.write(json.dumps(seen, indent=2) + "\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
