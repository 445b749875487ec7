"""A run that is saved and resumed is the run that was not: same world bit for bit, another world and engine exactly."""

import os
from pathlib import Path

import pytest
from exact_cells import ENGINES, Cell
from resume_jobs import Job, differences, launch, losses, whole_state
from safetensors.torch import load_file

STEPS = 6
RESUMED = range(1, STEPS) if os.environ.get("LGP_RESUME") == "all" else (2, 5)
"""Steps from which a cell is resumed; LGP_RESUME=all takes every one."""
SETTINGS = [
    {"accumulate": 2, "clip": 0.5},
    {"precision": "bf16", "optimizer": "sgd"},
    {"precision": "fp16", "loss_scale": 2.0**14, "accumulate": 3},
]


def cells() -> list[Cell]:
    found = [Cell(engine, 2, steps=STEPS, **settings) for engine in ENGINES for settings in SETTINGS]
    return found + [
        Cell("zero2", 2, steps=STEPS, offload=True),
        Cell("zero3", 2, steps=STEPS, offload=True),
        Cell("zero1", 2, steps=STEPS, reduction="union", accumulate=2),
        Cell("zero3", 2, steps=STEPS, unused="zero", average="users"),
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every cell without interruption, with a checkpoint at every step, then resumed."""
    folder = tmp_path_factory.mktemp("runs")
    for deepspeed in (True, False):
        jobs = []
        for index, cell in enumerate(cells()):
            if (cell.engine != "ddp") == deepspeed:
                jobs.append(Job(f"{index}", cell))
                for step in RESUMED:
                    jobs.append(Job(f"{index}-{step}", cell, f"{index}/checkpoints/job/step-{step:08d}"))
        launch(jobs, folder, timeout=1200)
    return folder


@pytest.mark.parametrize("index", range(len(cells())), ids=[cell.name for cell in cells()])
def test_resumed_is_uninterrupted(runs: Path, index: int) -> None:
    whole = runs / str(index)
    checkpoints = whole / "checkpoints" / "job"
    end, expected = load_file(whole / "end.safetensors"), losses(whole)
    assert len({path.name for path in checkpoints.glob("step-*")}) == STEPS - 1
    moved = differences(whole_state(checkpoints / "step-00000001"), whole_state(checkpoints / "step-00000005"))
    assert len(moved) > 20, "training changes the state"
    for step in RESUMED:
        part = runs / f"{index}-{step}"
        assert differences(load_file(part / "end.safetensors"), end) == []
        assert losses(part) == {number: loss for number, loss in expected.items() if number >= step}
        for later in range(step + 1, STEPS):
            name = f"checkpoints/job/step-{later:08d}"
            assert differences(whole_state(part / name), whole_state(whole / name)) == []
