"""A checkpoint goes on at another number of ranks, and under another engine, as one process says that it must."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
from exact_launch import TOLERANCE
from exact_reference import reference
from exact_trials import Engine, Trial
from resume_jobs import Changing, Job, launch
from safetensors.torch import load_file

pytestmark = pytest.mark.slow  # launches of several ranks

STEPS, AT = 6, 3
SETTINGS = {"accumulate": 1, "clip": 0.5, "steps": STEPS}
ZERO: tuple[Engine, ...] = ("zero0", "zero1", "zero2", "zero3")
MOVES: list[tuple[Engine, int, Engine, int]] = [
    ("zero1", 2, "zero1", 4),
    ("zero3", 2, "zero3", 4),
    ("zero2", 4, "zero2", 2),
    ("zero1", 4, "zero3", 2),
    ("zero3", 4, "ddp", 2),
]
"""Engine and ranks before, engine and ranks after; LGP_LONG_TESTS=1 tries more."""
if os.environ.get("LGP_LONG_TESTS"):
    MOVES += [(engine, 2, engine, 4) for engine in ("zero0", "zero2")]
    MOVES += [(engine, 4, engine, 2) for engine in ("zero0", "zero1", "zero3")]
    MOVES += [(engine, 2, engine, 3) for engine in ZERO]
    MOVES += [("ddp", 2, "zero3", 4), ("zero3", 4, "zero2", 3), ("zero3", 2, "ddp", 4)]
    MOVES += [(engine, 8, engine, 6) for engine in (*ZERO, "ddp")]


def name(move: tuple[Engine, int, Engine, int]) -> str:
    return "{}-{}-to-{}-{}".format(*move)


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every move that is asked for, from a checkpoint of a whole run at step 3."""
    folder, asked = tmp_path_factory.mktemp("elastic"), {item.name for item in request.session.items}
    moves = [move for move in MOVES if f"{test_goes_on_with_other_ranks.__name__}[{name(move)}]" in asked]
    first = {
        (engine, world): Job(f"{engine}-{world}", Trial(engine, world, **SETTINGS), every=AT, constant=True)
        for engine, world, _, _ in moves
    }
    second = {
        move: Job(
            name(move),
            Trial(move[2], move[3], **SETTINGS),
            f"{move[0]}-{move[1]}/checkpoints/job/step-{AT:08d}",
            every=0,
            constant=True,
        )
        for move in moves
    }
    for jobs in (first.values(), second.values()):
        groups: dict[tuple[int, bool], list[Job]] = {}
        for job in jobs:
            groups.setdefault((job.trial.world, job.trial.engine == "ddp"), []).append(job)
        for group in groups.values():
            launch(group, folder)
    return folder


@pytest.mark.parametrize("move", MOVES, ids=name)
def test_goes_on_with_other_ranks(runs: Path, move: tuple[Engine, int, Engine, int]) -> None:
    """Weights at the end equal those of one process that runs as many paths a step as there are ranks."""
    before, ranks, _, then = move
    base = Trial(before, ranks, **SETTINGS)
    fields = {**replace(base.on_one_process, world=ranks).as_dict(), "at": AT, "then": then}
    expected, found = reference(Changing(**fields)), load_file(runs / name(move) / "end.safetensors")
    assert max(float((found[key] - expected[key]).abs().max()) for key in expected) <= TOLERANCE
    same_world = reference(Changing(**{**fields, "then": ranks}))
    assert max(float((same_world[key] - expected[key]).abs().max()) for key in expected) > 1e-3, "paths do change"
