"""A short campaign of scripts/torture."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from run_helpers import LIMIT_S

pytestmark = pytest.mark.slow  # launches of several ranks

HERE = Path(__file__).parent


KINDS = ("kill one", "kill all", "kill saving", "SIGTERM", "SIGUSR1", "full disk", "damage")
"""Without a stopped rank, which is ended after the watchdog's time: test_watchdog.py and test_stage_hangs.py."""


def test_a_minute_of_faults(tmp_path: Path) -> None:
    """Every run ends with the weights, metrics and ledger of one that nothing happened to.

    Takes a minute or more: each fault costs two ranks that start anew. Goes on until a run has resumed; the watchdog's
    time is long, so that a busy machine does not look like a hang.
    """
    out = tmp_path / "out.json"
    options = ["--seconds=30", "--resumes=1", "--seed=7", "--timeout-s=30", f"--out={out}", "--kinds", *KINDS]
    done = subprocess.run(
        [sys.executable, str(HERE / "torture.py"), *options],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=3 * LIMIT_S,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]
    report = json.loads(out.read_text())
    assert report["violations"] == [] and report["seen"]["exact ends"] == report["runs"] >= 1
    assert sum(report["tried"].values()) >= 1 and report["seen"]["whole checkpoints"] >= 1
    assert report["seen"]["exact resumes"] >= 1
