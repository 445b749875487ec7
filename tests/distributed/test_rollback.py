"""A batch makes the loss nan: the run returns to its last checkpoint and continues after that batch, or it stops."""

import json
import os
from pathlib import Path

import pytest
from exact_launch import TOLERANCE
from exact_reference import reference
from exact_trials import Trial
from resume_jobs import Elsewhere, Job, differences, launch, losses
from safetensors.torch import load_file

pytestmark = pytest.mark.slow  # launches of several ranks

STEPS = 6
MORE = [
    Trial("zero2", 2, steps=STEPS, offload=True),
    Trial("zero1", 2, steps=STEPS, reduction="union", accumulate=2),
]
TRIALS = [
    *(Trial(engine, 2, steps=STEPS, accumulate=2, clip=0.5) for engine in ("ddp", "zero1", "zero3")),
    *MORE[: len(MORE) if os.environ.get("LGP_LONG_TESTS") else 0],
]
"""LGP_LONG_TESTS=1 runs more."""
SEQUENCES: list[tuple[str, int, list[int], tuple[int, ...]]] = [
    ("once", 2, [3], (0, 1, 4, 5, 6, 7)),
    ("while it saves", 3, [3], (0, 1, 2, 4, 5, 6)),
    ("twice", 2, [3, 5], (0, 1, 6, 7, 8, 9)),
]
"""Name, steps between two checkpoints, bad steps of data, and the data of every step that counts in the end."""
STOPS = [("none allowed", 2, 3, 0), ("none left", 2, 3, 1), ("none to go back to", 4, 2, 1)]
"""Name, steps between two checkpoints, the first bad step of data, and rollbacks allowed."""


def number(trial: Trial) -> int:
    return TRIALS.index(trial)


def newest_of(every: int, first: int) -> int:
    """Step of the newest checkpoint when a run of STOPS has stopped; 0 for none."""
    return first // every * every


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every trial with every sequence of data, and resumed after a rollback; stops."""
    folder = tmp_path_factory.mktemp("rollback")
    for deepspeed in (True, False):
        jobs = []
        for trial in TRIALS:
            if (trial.engine != "ddp") == deepspeed:
                for name, every, bad, _ in SEQUENCES:
                    base = f"{number(trial)}-{name}"
                    jobs.append(Job(base, trial, "auto", every, constant=True, bad=bad, rollback=len(bad)))
                later = f"{number(trial)}-once/checkpoints/job/step-00000004"
                jobs.append(Job(f"{number(trial)}-later", trial, later, 0, constant=True, bad=[3]))
                for name, every, first, allowed in STOPS:
                    bad = [first, *range(first + 1, 20)]
                    base = f"{number(trial)}-{name}"
                    jobs.append(Job(base, trial, "auto", every, constant=True, bad=bad, rollback=allowed))
                    if newest := newest_of(every, first):
                        again = f"{base}/checkpoints/job/step-{newest:08d}"
                        jobs.append(Job(f"{base}-again", trial, again, 0, constant=True, bad=bad))
        launch(jobs, folder)
    return folder


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("trial", TRIALS, ids=lambda trial: trial.name)
@pytest.mark.parametrize("sequence", SEQUENCES, ids=lambda sequence: sequence[0])
def test_goes_on_behind_the_bad_batch(
    runs: Path, trial: Trial, sequence: tuple[str, int, list[int], tuple[int, ...]]
) -> None:
    """As one process that trains the steps' paths on exactly this data."""
    name, _, _, data = sequence
    folder = runs / f"{number(trial)}-{name}"
    found = load_file(folder / "end.safetensors")
    expected = reference(Elsewhere(**{**trial.on_one_process.as_dict(), "data": data}))
    assert max(float((found[key] - expected[key]).abs().max()) for key in expected) <= TOLERANCE
    plain = reference(Elsewhere(**{**trial.on_one_process.as_dict(), "data": tuple(range(STEPS))}))
    assert max(float((plain[key] - expected[key]).abs().max()) for key in expected) > 100 * TOLERANCE
    assert [line["step"] for line in metrics(folder)] == list(range(STEPS))
    assert all(line["loss"] is not None and not line["skipped"] for line in metrics(folder))


@pytest.mark.parametrize("trial", TRIALS, ids=lambda trial: trial.name)
def test_resumes_behind_the_bad_batch(runs: Path, trial: Trial) -> None:
    """A checkpoint made after going back says where the data stands."""
    ends = [load_file(runs / f"{number(trial)}-{name}" / "end.safetensors") for name in ("once", "later")]
    assert differences(*ends) == []


@pytest.mark.parametrize("trial", TRIALS, ids=lambda trial: trial.name)
@pytest.mark.parametrize("stop", STOPS, ids=lambda stop: stop[0])
def test_stops_where_it_may_not_go_back(runs: Path, trial: Trial, stop: tuple[str, int, int, int]) -> None:
    name, every, first, allowed = stop
    folder = runs / f"{number(trial)}-{name}"
    one, two = ((folder / f"error-{rank}.txt").read_text() for rank in (0, 1))
    newest = newest_of(every, first)
    at = newest if allowed and newest else first
    assert one == two and one.startswith(f"Nothing of step {at} of stage job was applied: the loss is nan on rank 1")
    assert not (folder / "end.safetensors").exists()
    assert [line["step"] for line in metrics(folder)] == list(range(first))
    start = f" with --resume {folder}/checkpoints/job/step-{newest:08d}" if newest else ""
    assert one.endswith(f" The same command{start} reproduces this step.")
    if newest:
        again = runs / f"{number(trial)}-{name}-again"
        told = (again / "error-0.txt").read_text()
        assert told.startswith(f"Nothing of step {first} of stage job was applied: the loss is nan on rank 1")
        assert [line["step"] for line in metrics(again)] == list(range(newest, first))
        assert losses(again) == {step: loss for step, loss in losses(folder).items() if step >= newest}
