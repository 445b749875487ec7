"""The trial of exactness that `scripts/test --fast` launches; test_exact.py has the table's."""

from pathlib import Path

from exact_launch import TOLERANCE, difference, start
from exact_trials import Trial


def test_two_ranks_of_zero1_equal_one_process(tmp_path: Path) -> None:
    trial = Trial("zero1", 2, accumulate=2, clip=0.5)
    done = start([trial], tmp_path / "run")
    assert done.returncode == 0, done.stderr[-6000:]
    assert difference(trial, tmp_path / "run", 0) <= TOLERANCE
