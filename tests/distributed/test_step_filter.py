"""Steps whose numbers go bad, on two processes: left out without a trace, or the end of the run with a sentence.

This is a sample; LGP_FAULTS=1 runs every kind of fault on every engine in both precisions and on both ranks.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from exact_launch import TOLERANCE, allowed, difference, groups, start
from exact_trials import ENGINES
from step_filter_cases import KINDS, Case, skips, spikes, stops

pytestmark = pytest.mark.slow  # launches of several ranks

EVERY = "LGP_FAULTS" in os.environ
SKIPS, SPIKES, STOPS = skips(EVERY), spikes(EVERY), stops(EVERY)
REASONS = {"nan": "loss", "inf": "loss", "gradient": "gradient", "part": "gradient", "spike": "spike"}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[Case, tuple[Path, int]]:
    """Folder and number of every case's run."""
    root, found = tmp_path_factory.mktemp("guard"), {}
    for (_, deepspeed), cases in groups([*SKIPS, *SPIKES, *STOPS]).items():
        folder = root / str(deepspeed)
        done = start(cases, folder, script="step_filter_worker.py")
        assert done.returncode == 0, done.stderr[-6000:]
        found |= {case: (folder, index) for index, case in enumerate(cases)}
    return found


def facts(results: dict[Case, tuple[Path, int]], case: Case) -> list[dict[str, Any]]:
    """What each rank noted of a case."""
    folder, index = results[case]
    return [json.loads((folder / f"{index}-{rank}.json").read_text()) for rank in range(case.world)]


def lines(results: dict[Case, tuple[Path, int]], case: Case) -> list[dict[str, Any]]:
    """Its metrics; null stands for what is not finite."""
    folder, index = results[case]

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    text = (folder / str(index) / "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


@pytest.mark.parametrize("case", [*SKIPS, *SPIKES], ids=lambda case: case.name)
def test_a_bad_step_leaves_no_trace(results: dict[Case, tuple[Path, int]], case: Case) -> None:
    """Weights, moments and step counts stay bit for bit, on both ranks, and no other step stays without effect."""
    bad = {step: kind for step, kind, _ in case.faults}
    for found in facts(results, case):
        assert (found["unmoved"], found["steps"], found["sentence"]) == (sorted(bad), case.trial.steps, "")
    said = {line["step"]: line.get("reason") for line in lines(results, case) if line["skipped"]}
    assert said == {step: REASONS[kind] for step, kind in bad.items()}
    assert {line["step"] for line in lines(results, case) if line["loss"] is None} == {
        step for step, kind in bad.items() if REASONS[kind] == "loss"
    }


@pytest.mark.parametrize("case", [*SKIPS, *SPIKES], ids=lambda case: case.name)
def test_the_run_goes_on_as_without_it(results: dict[Case, tuple[Path, int]], case: Case) -> None:
    """It ends where one process ends that does not apply these steps; the order of data and paths stays."""
    found = difference(case.trial, *results[case], left_out=tuple(step for step, _, _ in case.faults))
    assert found <= TOLERANCE or found <= allowed(case.trial)
    assert difference(case.trial, *results[case]) > 100 * TOLERANCE


@pytest.mark.parametrize("case", STOPS, ids=lambda case: case.name)
def test_the_run_stops_and_says_why(results: dict[Case, tuple[Path, int]], case: Case) -> None:
    """Before the step is applied; every rank names step, rank, path and samples, and the step before is in the log."""
    ((step, kind, rank),) = case.faults
    one, two = facts(results, case)
    assert one == two and one["step"] == step == one["steps"] - 1 and one["unmoved"] == [step]
    assert [line["step"] for line in lines(results, case)] == list(range(step))
    path, parts = case.draw(step, rank)
    assert f"rank {rank}, path {path} (keys of {step}/0/{rank})" in one["sentence"]
    assert "step 1 of stage finetune" in one["sentence"] and "finetune.train.lr" in one["sentence"]
    if kind == "part":
        assert f"gradient of {max(parts)} is" in one["sentence"]
    elif kind == "gradient":
        assert re.search(r"gradient of \S+, \S+, \S+ and \d+ more modules is not finite", one["sentence"])
    else:
        assert f"the loss is {'inf' if kind == 'inf' else 'nan'} on" in one["sentence"]
        drawn = {other for other in (0, 1) if other == rank or case.draw(step, other)[0] in case.haunted}
        assert drawn == {int(number) for number in re.findall(r"rank (\d)", one["sentence"])}


@pytest.mark.parametrize("case", STOPS, ids=lambda case: case.name)
def test_the_engine_can_go_on_after_it(results: dict[Case, tuple[Path, int]], case: Case) -> None:
    """From a checkpoint, say: nothing of the bad gradients is left for the next step to add to."""
    found = difference(case.trial, *results[case], left_out=(1,))
    assert found <= TOLERANCE or found <= allowed(case.trial)


def test_every_kind_is_among_them() -> None:
    """Every engine and precision too; a path that a fault follows is not drawn before it."""
    assert {case.engine for case in STOPS} == {case.engine for case in SKIPS} == set(ENGINES)
    assert {kind for case in STOPS for _, kind, _ in case.faults} == set(KINDS)
    assert {case.trial.precision for case in STOPS} == {case.trial.precision for case in SKIPS} == {"fp32", "bf16"}
    assert {rank for case in STOPS for _, _, rank in case.faults} == {0, 1}
    assert not any(case.draw(0, rank)[0] in case.haunted for case in STOPS for rank in (0, 1))
