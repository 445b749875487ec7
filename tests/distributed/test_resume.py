"""A run that is saved and resumed is the run that was not: same world bit for bit, another world and engine exactly."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from exact_trials import ENGINES, Trial
from resume_jobs import Job, differences, launch, losses, whole_state
from safetensors.torch import load_file

pytestmark = pytest.mark.slow  # launches of several ranks

STEPS = 6
LONG = bool(os.environ.get("LGP_LONG_TESTS"))
"""Whether every engine has all settings, not two of the three, and is resumed from every step."""
RESUMED = range(1, STEPS) if LONG else (3,)
"""Steps from which a trial is resumed."""
SETTINGS = [
    {"accumulate": 2, "clip": 0.5},
    {"precision": "bf16", "optimizer": "sgd"},
    {"precision": "fp16", "loss_scale": 2.0**14, "accumulate": 3},
]


def trials() -> list[Trial]:
    found = [
        Trial(engine, 2, steps=STEPS, **settings)
        for place, engine in enumerate(ENGINES)
        for number, settings in enumerate(SETTINGS)
        if LONG or (place + number) % len(SETTINGS)
    ]
    taught = {"lead_weight": 1.0, "feature_weight": 0.5, "stitch_sharing": "path", "ema": 0.8}
    nested = {"lead_weight": 1.0, "nested": True}
    for engine in ("zero1", "zero3", "ddp"):
        found += [Trial(engine, 2, steps=STEPS, accumulate=2, **taught)]
        found += [Trial(engine, 2, steps=STEPS, accumulate=3, **nested)]
    return found + [
        Trial("zero2", 2, steps=STEPS, offload=True),
        Trial("zero3", 2, steps=STEPS, offload=True),
        Trial("zero1", 2, steps=STEPS, reduction="union", accumulate=2),
        Trial("zero3", 2, steps=STEPS, unused="zero", average="users"),
        *(Trial(engine, 2, steps=STEPS, two_way=True, stitch_rank=2) for engine in ("zero2", "zero3")),
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every trial without interruption, with a checkpoint at every step, then resumed."""
    folder = tmp_path_factory.mktemp("runs")
    for deepspeed in (True, False):
        jobs = []
        for index, trial in enumerate(trials()):
            if (trial.engine != "ddp") == deepspeed:
                jobs.append(Job(f"{index}", trial))
                for step in RESUMED:
                    jobs.append(Job(f"{index}-{step}", trial, f"{index}/checkpoints/job/step-{step:08d}"))
        launch(jobs, folder)
    return folder


@pytest.mark.parametrize("index", range(len(trials())), ids=[trial.name for trial in trials()])
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


def test_ranks_that_do_not_see_the_same_checkpoint_load_none(tmp_path: Path) -> None:
    """One rank has none where rank 0 has one, another of the same step, or the same with a part that is damaged on its
    node: all stop, before any weight is touched."""
    trial = Trial("zero2", 2, steps=3)
    other = replace(trial, seed=1)
    jobs = [Job("one", trial), Job("two", other), Job("none", trial, "never", every=0)]
    launch(jobs, tmp_path)
    for name in ("lacks", "differs", "flips", "flipped"):
        shutil.copytree(tmp_path / "one" / "checkpoints", tmp_path / name / "checkpoints")
    part = tmp_path / "flipped" / "checkpoints" / "job" / "step-00000002" / "rank-00001.safetensors"
    content = bytearray(part.read_bytes())
    content[-1] ^= 1
    part.write_bytes(content)
    sentences = {"lacks": "is not a checkpoint", "differs": "Ranks see different checkpoints of step 2"}
    sentences |= {"flips": f"{part} is damaged"}
    places = dict(zip(sentences, ("none", "two", "flipped"), strict=True))
    launch([Job(name, trial, elsewhere=place) for name, place in places.items()], tmp_path)
    for name, sentence in sentences.items():
        found = [(tmp_path / name / f"error-{rank}.txt").read_text() for rank in range(2)]
        assert any(sentence in text for text in found) and not (tmp_path / name / "end.safetensors").exists()
        assert not (tmp_path / name / "metrics.jsonl").exists(), "no step was taken"
