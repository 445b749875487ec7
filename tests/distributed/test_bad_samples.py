"""Ranks that meet different numbers of bad samples take the same steps and hold the same weights.

LGP_LONG_TESTS=1 runs 100 cases.
"""

import json
import os
import random
from functools import cache
from pathlib import Path

import pytest
from bad_samples_worker import SAMPLES, STEPS, stream_of
from exact_launch import HERE, run_workers
from safetensors.torch import load_file

pytestmark = pytest.mark.slow  # launches of several ranks

COUNT = 100 if os.environ.get("LGP_LONG_TESTS") else 12
CASES = [random.Random(number).sample(range(SAMPLES), random.Random(number).randint(1, 12)) for number in range(COUNT)]
"""Bad samples of a run."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All cases, one after the other, on two ranks of ZeRO-2."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "cases.json").write_text(json.dumps(CASES))
    worker = [str(HERE / "bad_samples_worker.py"), str(folder / "cases.json"), str(folder)]
    done = run_workers(2, deepspeed=True, worker=worker)
    assert done.returncode == 0, done.stderr[-6000:]
    return folder


@cache
def samples() -> list[list[set[int]]]:
    """Of each step, by rank: where the order puts them."""
    streams = [stream_of([], rank, 2) for rank in (0, 1)]
    return [[set(each.order.samples(each.positions(step, 0)).tolist()) for each in streams] for step in range(STEPS)]


def counts(case: list[int]) -> list[list[int]]:
    """Bad samples of each step, by rank."""
    return [[len(mine.intersection(case)) for mine in ranks] for ranks in samples()]


@pytest.mark.parametrize("number", range(len(CASES)))
def test_ranks_stay_in_step(runs: Path, number: int) -> None:
    """Every step is there, with the bad samples of both ranks; what a step gave is the same on both."""
    folder, expected = runs / str(number), counts(CASES[number])
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(STEPS))
    assert [line["bad_samples"] for line in lines] == [sum(ranks) for ranks in expected]
    one, two = (load_file(folder / f"end-{rank}.safetensors") for rank in (0, 1))
    assert all(one[name].equal(two[name]) for name in one)


def test_ranks_meet_different_numbers() -> None:
    """In most cases, over the run and in single steps."""
    found = [counts(case) for case in CASES]
    assert sum(sum(step[0] for step in case) != sum(step[1] for step in case) for case in found) > 0.7 * COUNT
    assert sum(any(abs(step[0] - step[1]) > 1 for step in case) for case in found) > 0.3 * COUNT
