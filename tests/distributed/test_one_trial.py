"""Trials of exactness that `scripts/test --fast` launches; test_exact.py has the table's."""

from pathlib import Path

import pytest
from exact_launch import TOLERANCE, difference, start
from exact_reference import reference
from exact_trials import Trial

from lgp_dist.run.metrics import read_metrics


def check_norms(trial: Trial, folder: Path) -> None:
    """metrics.jsonl has the norm of the whole gradient before it is clipped."""
    norms: list[float] = []
    reference.__wrapped__(trial.on_one_process, norms=norms)  # not from its cache
    found = [line["grad_norm"] for line in read_metrics(folder / "metrics.jsonl", "trial0")]
    assert len(norms) == trial.steps and found == pytest.approx(norms, rel=1e-3)


def test_two_ranks_of_zero1_equal_one_process(tmp_path: Path) -> None:
    trial = Trial("zero1", 2, accumulate=2, clip=0.5)
    done = start([trial], tmp_path / "run")
    assert done.returncode == 0, done.stderr[-6000:]
    assert difference(trial, tmp_path / "run", 0) <= TOLERANCE
    check_norms(trial, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize(
    "trial",
    [Trial("ddp", 2), Trial("zero0", 2), Trial("zero3", 2), Trial("zero1", 2, precision="fp16", loss_scale=2.0**10)],
    ids=str,
)
def test_norm_of_the_gradient(tmp_path: Path, trial: Trial) -> None:
    done = start([trial], tmp_path / "run")
    assert done.returncode == 0, done.stderr[-6000:]
    check_norms(trial, tmp_path / "run")
