"""A rank that stands still at the start, or outside of steps in a real stage, is named and ends the run; two ranks."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from exact_launch import HERE, ROOT
from run_helpers import LIMIT_S

from lgp_dist.config.flat import STAGES
from lgp_dist.errors import HUNG

pytestmark = pytest.mark.slow  # launches of several ranks

TIMEOUT_S = 4.0
"""Of the watchdog within steps; all cases here are outside of them, where it is ten times as long."""
STOPPED = "gives no sign of life .*: last seen in "
LAST = "step 1, path [^,]+, "
"""Of training, which stands before the artifact."""
CASES = {
    "joins": ("evaluate", 1, f"{STOPPED}phase join", "phase join"),
    "compares": ("evaluate", 0, f"{STOPPED}phase compare", "phase compare"),
    "waits": ("finetune", 1, f"{STOPPED}stage finetune, {LAST}phase artifact", "step 1, phase artifact"),
    "writes": ("finetune", 0, f"{STOPPED}stage finetune, {LAST}phase artifact", "step 1, phase artifact"),
    "ledger": (
        "finetune",
        0,
        rf"has made no progress for \d+ s: stage finetune, {LAST}phase artifact, at .*",
        "step 1, phase artifact",
    ),
    "accuracy": ("evaluate", 1, f"{STOPPED}stage evaluate, phase accuracy", "phase accuracy"),
    "report": ("evaluate", 0, f"{STOPPED}stage report, phase begin", "phase begin"),
}
"""Case of stage_hangs_worker.py -> its stage, rank, what is said of it, and where the other waits."""


@pytest.fixture(scope="module")
def runs(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each case; all run at the same time, as forks of one process."""
    out = tmp_path_factory.mktemp("hangs")
    for case, (stage, *_) in CASES.items():
        shutil.copytree(finished, out / case)
        for name in STAGES[STAGES.index(stage) :]:
            shutil.rmtree(out / case / "run" / name)
        shutil.rmtree(out / case / "run" / "checkpoints", ignore_errors=True)
    done = subprocess.run(
        [sys.executable, HERE / "stage_hangs_worker.py", out, str(TIMEOUT_S)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return out


@pytest.mark.parametrize("case", CASES)
def test_hang_is_named(runs: Path, case: str) -> None:
    """The right rank, stage and phase, with the last step and its path where there was one; nothing half-written."""
    stage, rank, said, place = CASES[case]
    log, hang = (runs / case / "out.log").read_text(), runs / case / "run" / "heartbeats" / "hang.json"
    assert hang.exists(), log[-3000:]
    found = json.loads(hang.read_text())
    assert found["ranks"] == [rank]
    assert re.fullmatch(
        rf"Rank {rank} \(\S+, pid \d+\) {said}; rank {1 - rank} waits for it in {place}\.", found["sentence"]
    ), found["sentence"]
    assert f"lgp: {found['sentence']}\n" in log
    statuses = json.loads((runs / case / "statuses.json").read_text())
    assert statuses[1 - rank] == HUNG and statuses[rank] == (HUNG if case == "ledger" else -signal.SIGKILL)
    assert (runs / case / "run" / stage).exists() == (case in ("waits", "report"))
