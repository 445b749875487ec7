"""SWS on two processes against one that knows no shared weights: a block that runs several times in a forward has the
gradient of all its layers under every engine, and models of several depths train as each does alone."""

from pathlib import Path

import pytest
from exact_launch import TOLERANCE, groups, start
from exact_trials import ENGINES
from safetensors.torch import load_file
from sws_trials import SwsTrial, reference

pytestmark = pytest.mark.slow  # launches of several ranks

TRIALS = [SwsTrial(kind, engine) for engine in ENGINES for kind in ("distil", "finetune")]
for _engine in ("zero1", "zero3", "ddp"):
    TRIALS.append(SwsTrial("distil", _engine, checkpointed=True, clip=0.05, accumulate=2))
    TRIALS.append(SwsTrial("distil", _engine, precision="bf16", checkpointed=True))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[SwsTrial, Path]:
    """The weights of every trial's run."""
    root, found = tmp_path_factory.mktemp("sws"), {}
    for (world, deepspeed), trials in groups(TRIALS).items():
        folder = root / f"{world}-{deepspeed}"
        done = start(trials, folder, script="sws_worker.py")
        assert done.returncode == 0, done.stderr[-6000:]
        found |= {trial: folder / f"{index}.safetensors" for index, trial in enumerate(trials)}
    return found


@pytest.mark.parametrize("trial", TRIALS, ids=lambda trial: trial.name)
def test_ranks_equal_one_process(results: dict[SwsTrial, Path], trial: SwsTrial) -> None:
    found, expected = load_file(results[trial]), reference(trial.on_one_process)
    assert found.keys() == expected.keys()
    assert max(float((found[name] - expected[name]).abs().max()) for name in expected) <= TOLERANCE


def test_the_comparison_is_not_empty() -> None:
    """Every weight moves far more than is allowed, and every setting matters."""
    for trial in {trial.on_one_process for trial in TRIALS}:
        before, after = reference(SwsTrial(**{**trial.as_dict(), "steps": 0})), reference(trial)
        assert all(float((after[name] - value).abs().max()) > 50 * TOLERANCE for name, value in before.items())
    one = reference(SwsTrial("distil", "ddp"))
    others = [reference(SwsTrial("distil", "ddp", precision="bf16")), reference(SwsTrial("distil", "ddp", clip=0.05))]
    for other in (*others, reference(SwsTrial("distil", "ddp"), last_layer_alone=True)):
        assert max(float((one[name] - value).abs().max()) for name, value in other.items()) > 10 * TOLERANCE
