"""`scripts/prove_exact`: every trial of the table of exactness and random schedules, one line each."""

import random
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from exact_launch import TOLERANCE, allowed, difference, groups, start
from exact_trials import ENGINES, Trial, extras, schedules, table

CHUNK = 60
"""Trials of one launch; a launch that fails costs the rest of its own."""


@dataclass(frozen=True)
class Prove:
    """Trains small pools on 2 and 4 processes, each on paths of its own, and compares the weights with one process.

    Prints a line per trial with the largest difference of any parameter; the status is 1 if one is above 1e-6, or, in
    bf16 and fp16, above the reference's own rounding.
    """

    quick: bool = False
    """A sample of table and schedules, in under five minutes on two cores."""
    schedules: int = 1000
    """Random schedules, each with settings drawn at random."""
    seed: int = 0
    """Of the random schedules and of the sample."""
    engines: Annotated[tuple[str, ...], tyro.conf.arg(metavar="ENGINE ...")] = ENGINES
    """Engines to prove: zero0, zero1, zero2, zero3, ddp."""


def chosen(prove: Prove) -> list[Trial]:
    """The trials to run; a quick run has each engine's share of table, extras and schedules."""
    trials, drawn = [*table(), *extras()], schedules(prove.schedules, prove.seed)
    if prove.quick:
        draw = random.Random(prove.seed)
        few = [trial for trial in trials if trial.world == 2]
        many = [trial for trial in trials if trial.world == 4]
        trials = [trial for engine in ENGINES for trial in draw.sample([c for c in few if c.engine == engine], 8)]
        trials += [draw.choice([trial for trial in many if trial.engine == engine]) for engine in ENGINES]
        drawn = [trial for trial in drawn if trial.world == 2][:40]
    return [trial for trial in (*trials, *drawn) if trial.engine in prove.engines]


def run(trials: list[Trial], root: Path) -> Iterator[tuple[Trial, float, str]]:
    """Each trial with its largest difference, infinite where its launch failed, and why."""
    number = 0
    for together in groups(trials).values():
        for first in range(0, len(together), CHUNK):
            part, folder = together[first : first + CHUNK], root / str(number)
            number += 1
            done = start(part, folder)
            lines = [line for line in done.stderr.splitlines() if "Error" in line and "ChildFailed" not in line]
            why = (lines or ["timed out"])[0].strip()
            for index, trial in enumerate(part):
                found = difference(trial, folder, index)
                yield trial, found, "" if found < float("inf") else f"no result: {why}"


def main() -> None:
    prove = tyro.cli(Prove, prog="scripts/prove_exact")
    trials, began, off = chosen(prove), time.monotonic(), 0
    worst: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="prove_exact_") as root:
        for trial, found, why in run(trials, Path(root)):
            limit = TOLERANCE if found <= TOLERANCE or why else allowed(trial)
            off += found > limit
            worst[trial.precision] = max(worst.get(trial.precision, 0.0), found)
            note = why or (f"own rounding {limit:.1e}" if limit > TOLERANCE else "")
            word = "exact" if found <= limit else "OFF  "
            print(f"{word}  {found:8.1e}  {trial.name}{'  ' + note if note else ''}", flush=True)
    spent = time.monotonic() - began
    largest = ", ".join(f"{precision} {found:.1e}" for precision, found in sorted(worst.items()))
    print(f"{len(trials)} trials, {off} off, largest difference {largest}, {spent:.0f} s")
    sys.exit(1 if off else 0)


if __name__ == "__main__":
    main()
