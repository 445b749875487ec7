"""Ranks on paths of their own against one process that runs all paths in turn: ZeRO 0 to 3 and DDP.

This is a sample of the table; LGP_LONG_TESTS=1 takes a larger one, and `scripts/prove_exact` runs all of it.
"""

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from exact_launch import TOLERANCE, allowed, difference, groups, start
from exact_reference import reference
from exact_trials import ENGINES, Trial, sample, unfused
from run_helpers import shared_memory_goes

pytestmark = pytest.mark.slow  # launches of several ranks

ANY_ORDER = Trial("ddp", 2, broken="order", audit=False)
"""Rank 1 gets its gradients in another order than rank 0, which DDP's fixed buckets do not mind."""
TRIALS = [*sample(large="LGP_LONG_TESTS" in os.environ), ANY_ORDER]
BROKEN = [Trial(engine, 2, broken="contract", audit=False) for engine in ("zero1", "zero2", "zero3", "ddp")]
SILENT = Trial("zero2", 2, broken="order", audit=False)
"""The same under ZeRO-2, which minds and does not say so."""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[Trial, tuple[Path, int]]:
    """Folder and number of every trial's run."""
    root, found = tmp_path_factory.mktemp("exact"), {}
    with shared_memory_goes():
        for (world, deepspeed), trials in groups([*TRIALS, SILENT]).items():
            folder = root / f"{world}-{deepspeed}"
            done = start(trials, folder)
            assert done.returncode == 0, done.stderr[-6000:]
            found |= {trial: (folder, index) for index, trial in enumerate(trials)}
    return found


@pytest.mark.parametrize("trial", TRIALS, ids=lambda trial: trial.name)
def test_ranks_equal_one_process(results: dict[Trial, tuple[Path, int]], trial: Trial) -> None:
    """fp32 to 1e-6; so too bf16 and fp16, unless the reference is less sure of itself."""
    found = difference(trial, *results[trial])
    assert found <= TOLERANCE or found <= allowed(trial)


def test_what_is_allowed_is_rounding() -> None:
    """bf16 has 8 bits: what a last bit of fp32 turns into stays far below what another path or rule makes."""
    trial = Trial("zero3", 2, precision="bf16", accumulate=2, clip=0.5)
    assert TOLERANCE < allowed(trial) < 1e-3
    assert allowed(replace(trial, precision="fp32")) == TOLERANCE
    exact, other = (reference(one.on_one_process) for one in (trial, replace(trial, unused="zero")))
    assert max(float((other[name] - value).abs().max()) for name, value in exact.items()) > 1e-2


@pytest.mark.parametrize("engine", ENGINES)
def test_every_path_can_be_measured_on_the_wrapped_module(results: dict[Trial, tuple[Path, int]], engine: str) -> None:
    """Also under ZeRO-3, where a forward gathers: what each path gives equals a plain pool with the final weights."""
    trial = Trial(engine, 2, optimizer="sgd")
    folder, index = results[trial]
    answers = json.loads((folder / f"{index}.json").read_text())["answers"]
    pool, _, _ = trial.build()
    pool.load_state_dict(reference(trial.on_one_process))
    images = trial.batch(trial.steps, 0, 0).images
    assert len(answers) == 18
    with torch.no_grad():
        for path in pool.space.paths:
            assert answers[path.key] == pytest.approx(float(pool(images, path).square().sum()), rel=1e-5)


@pytest.mark.parametrize("trial", unfused(), ids=lambda trial: trial.name)
def test_fused_operations_end_where_timms_do(results: dict[Trial, tuple[Path, int]], trial: Trial) -> None:
    """After the last step every path gives the same output, up to what the last bits of fp32 become in four steps."""
    answers = []
    for ops in ("reference", "fused"):
        folder, index = results[replace(trial, ops=ops)]
        answers.append(json.loads((folder / f"{index}.json").read_text())["answers"])
    assert answers[0] == pytest.approx(answers[1], rel=1e-5)
    assert answers[0] != answers[1]


def test_zero3_holds_one_unit_at_a_time(results: dict[Trial, tuple[Path, int]]) -> None:
    """At most two were promised; nothing is prefetched, so it is one."""
    folder, index = results[Trial("zero3", 2, precision="bf16", accumulate=2, clip=0.5, checkpointed=True)]
    facts = json.loads((folder / f"{index}.json").read_text())
    assert facts["units"] == 1
    assert 0 < facts["elements"] <= facts["largest"]
    folder, index = results[Trial("zero2", 2, optimizer="sgd")]
    assert json.loads((folder / f"{index}.json").read_text())["units"] == 0


def test_activation_checkpointing_lets_go_of_gathered_weights(results: dict[Trial, tuple[Path, int]]) -> None:
    """Why it is on by default under ZeRO-3: without it autograd keeps each weight that a path used until backward."""

    def kept(trial: Trial) -> list[str]:
        folder, index = results[trial]
        return json.loads((folder / f"{index}.json").read_text())["kept"]

    assert kept(Trial("zero3", 2, precision="bf16", accumulate=2, clip=0.5, checkpointed=True)) == ["head"]
    assert set(kept(Trial("zero3", 2, compile="aot_eager", checkpointed=True, accumulate=2, clip=0.5))) <= {"head"}
    assert len(kept(Trial("zero3", 2, optimizer="sgd"))) > 6


def test_the_comparison_is_not_empty() -> None:
    """Ranks differ in their paths, paths of L, L + 1 and L + 2 blocks are among them, and every setting matters."""
    lengths, different = set(), 0
    for trial in TRIALS:
        pool, _, sampler = trial.build()
        for step in range(trial.steps):
            drawn = [
                sampler.draw(step, micro, rank, trial.world)
                for micro in range(trial.accumulate)
                for rank in range(trial.world)
            ]
            different += len(set(drawn)) > 1
            if trial.rows == 2 and not trial.nested and not trial.two_way:
                lengths |= {sum(part.stop - part.start for part in path.segments) for path in drawn}
    assert lengths == {6, 7, 8}
    assert different > 0.9 * sum(trial.steps for trial in TRIALS if trial.rows > 1)  # one row has one path
    base = Trial("ddp", 2, accumulate=2, clip=0.5)
    others = [
        replace(base, precision="bf16"),
        replace(base, clip=0.0),
        replace(base, unused="zero"),
        replace(base, average="users"),
        replace(base, seed=7),
    ]
    for other in others:
        left, right = reference(base), reference(other)
        assert max(float((left[name] - right[name]).abs().max()) for name in left) > 100 * TOLERANCE, other.name


def test_fp16_meets_overflow() -> None:
    """The trials of fp16 start from a scale at which some steps overflow and are left out, and others are not."""
    trial = next(trial for trial in TRIALS if trial.precision == "fp16")
    none, some, all_out = (reference(replace(trial, loss_scale=2.0**power).on_one_process) for power in (10, 14, 24))
    assert max(float((some[name] - none[name]).abs().max()) for name in some) > 100 * TOLERANCE
    assert max(float((some[name] - all_out[name]).abs().max()) for name in some) > 100 * TOLERANCE


@pytest.mark.parametrize("trial", BROKEN, ids=lambda trial: trial.engine)
def test_without_the_contract_it_is_wrong(tmp_path: Path, trial: Trial) -> None:
    """A test of the test: with anchors and leaves switched off, ranks fail, hang or end with other weights."""
    done = start([trial], tmp_path / "run")
    assert done.returncode != 0 or difference(trial, tmp_path / "run", 0) > 100 * TOLERANCE


def test_zero2_mixes_gradients_without_a_word(results: dict[Trial, tuple[Path, int]]) -> None:
    """Why there is an alarm: one rank's gradients in another order, and the run ends well with wrong weights."""
    assert difference(SILENT, *results[SILENT]) > 100 * TOLERANCE


@pytest.mark.parametrize(
    ("trial", "sentence"),
    [
        (
            replace(SILENT, audit=True),
            r"Ranks diverged in step 0: event \d+ is \S+ on rank 1 and \S+ on rank 0",
        ),
        (
            Trial("zero1", 2, broken="schedule"),
            "Ranks diverged in step 0: rank 1 has another schedule of paths than rank 0",
        ),
        (
            Trial("zero0", 2, broken="weights"),
            "After step 0, rank 1 has other weights than rank 0, first in head.rows.1.head.bias",
        ),
    ],
    ids=["order", "schedule", "weights"],
)
def test_the_alarm_stops_the_run_and_names_the_difference(tmp_path: Path, trial: Trial, sentence: str) -> None:
    """Before the step is applied."""
    done = start([trial], tmp_path / "run")
    assert done.returncode != 0
    assert re.search(sentence, done.stderr), done.stderr[-3000:]
