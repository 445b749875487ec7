"""A rank that can write no file of a checkpoint's size: the run goes on without new ones, or stops; old ones stay."""

from pathlib import Path

import pytest
from exact_trials import Trial
from resume_jobs import Job, differences, launch, losses, whole_state
from safetensors.torch import load_file

pytestmark = pytest.mark.slow  # launches of several ranks

LIMIT = 4096
"""Bytes: less than a rank's part of a checkpoint. The write fails in the middle, as on a disk that fills up."""
ENGINES = ("ddp", "zero1", "zero3")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with room; one that goes on from its checkpoint of step 2 without, then again with it; one that stops."""
    folder = tmp_path_factory.mktemp("full")
    for engines in (("ddp",), ("zero1", "zero3")):
        jobs = []
        for engine in engines:
            trial = Trial(engine, 2, steps=6)
            for name in ("room", "continue", "stop"):
                jobs.append(Job(f"{engine}-{name}", trial, every=2))
            for name in ("continue", "stop"):
                first = f"{engine}-{name}/checkpoints/job/step-00000002"
                jobs.append(Job(f"{engine}-{name}", trial, first, 1, limit=LIMIT, on_error=name))
        launch(jobs, folder)
    return folder


def names(folder: Path) -> set[str]:
    return {path.name for path in (folder / "checkpoints" / "job").iterdir()} - {".aside"}


@pytest.mark.parametrize("engine", ENGINES)
def test_goes_on_without_new_checkpoints(runs: Path, engine: str) -> None:
    """To the same end; the checkpoint from before is as it was, and nothing unfinished is left."""
    room, full = runs / f"{engine}-room", runs / f"{engine}-continue"
    assert names(room) == {"step-00000002", "step-00000004"} and names(full) == {"step-00000002"}
    first = "checkpoints/job/step-00000002"
    assert differences(whole_state(full / first), whole_state(room / first)) == []
    assert differences(load_file(full / "end.safetensors"), load_file(room / "end.safetensors")) == []
    assert losses(full) == losses(room)
    text = (runs / "stderr.txt").read_text()
    assert "could not be written" in text and "by rank 1" in text and "the one before stays" in text


@pytest.mark.parametrize("engine", ENGINES)
def test_stops_and_says_why(runs: Path, engine: str) -> None:
    """Every rank ends at the first that fails, rank 1 with the reason; the checkpoint from before is whole."""
    full = runs / f"{engine}-stop"
    zero, one = ((full / f"error-{rank}.txt").read_text() for rank in (0, 1))
    assert zero == "Another rank could not write the checkpoint of step 3."
    assert one.startswith("The checkpoint of step 3 could not be written to ")
    assert "by rank 1 (" in one and "free space, or choose another --run-dir." in one
    assert names(full) == {"step-00000002"} and list(losses(full))[:3] == [0, 1, 2]
    room = runs / f"{engine}-room" / "checkpoints" / "job" / "step-00000002"
    assert differences(whole_state(full / "checkpoints" / "job" / "step-00000002"), whole_state(room)) == []
