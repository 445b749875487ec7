"""Real ranks that stop, sleep, lock Python or leave out a collective: the watchdog names who and where, and all end."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from exact_launch import HERE, ROOT
from run_helpers import GONE_S, LIMIT_S, eventually
from watchdog_worker import BAD_STEP, PHASE_OF

from lgp_dist.errors import HUNG

pytestmark = pytest.mark.slow  # launches of several ranks

TIMEOUT_S = 4.0
HUNG_CASES = (
    *("sleep-0-2", "sleep-1-2", "sleep-2-3", "stop-0-2", "stop-1-2", "stop-2-3", "lock-0-2", "lock-1-2"),
    *("skip-0-2", "skip-1-2", "skip-0-3", "pipe-1-2"),
)
"""FAULT-CULPRIT-WORLD."""
QUIET_CASES = ("none-0-2", "patient-0-2", "pause-0-2", "alone-0-2")


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """torchrun with two ranks, one of which stops: started first, since its grace is 30 s."""
    folder = tmp_path_factory.mktemp("torchrun")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    worker = [HERE / "watchdog_worker.py", folder, "stop", "1", str(TIMEOUT_S)]
    with subprocess.Popen([*launch, *worker], env=environment(), stderr=subprocess.PIPE, text=True) as process:
        yield folder, process


@pytest.fixture(scope="module")
def runs(launched: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each case; all run at the same time, as forks of one process."""
    out = tmp_path_factory.mktemp("watchdog")
    for case in (*HUNG_CASES, *QUIET_CASES):
        (out / case).mkdir()
    worker = [sys.executable, HERE / "watchdog_worker.py", out, str(TIMEOUT_S)]
    subprocess.run(worker, env=environment(), check=True, timeout=LIMIT_S)
    return out


def statuses(folder: Path) -> list[int]:
    """Of all ranks."""
    return [int(path.read_text()) for path in sorted(folder.glob("status-*"))]


@pytest.mark.parametrize("case", HUNG_CASES)
def test_hang_is_named(runs: Path, case: str) -> None:
    """The right rank, step, path and phase, in hang.json, log and on the terminal; every rank leaves its stacks."""
    fault, culprit, world = case.split("-")
    folder = runs / case
    hang = json.loads((folder / "watch" / "hang.json").read_text())
    assert hang["ranks"] == [int(culprit)]
    others = [rank for rank in range(int(world)) if rank != int(culprit)]
    waiting = "rank {} waits" if len(others) == 1 else "ranks {} wait"
    assert re.fullmatch(
        rf"Rank {culprit} \(\S+, pid \d+\) .*: .*stage finetune, step {BAD_STEP}, path path-{culprit}, "
        rf"phase {PHASE_OF[fault]}\b.*; {waiting.format(', '.join(map(str, others)))} for it in step {BAD_STEP}, "
        r"phase reduce\.",
        hang["sentence"],
    )
    ended = statuses(folder)
    unable = [int(culprit)] if fault in ("stop", "lock") else []
    assert [rank for rank, status in enumerate(ended) if status == HUNG] == [
        r for r in range(len(ended)) if r not in unable
    ]
    if fault != "pipe":  # there the terminal and the log's rank hang themselves
        said = "".join((folder / f"stderr-{rank}.txt").read_text() for rank in range(int(world)))
        assert f"lgp: {hang['sentence']}\n" in said
        assert hang["sentence"] in (folder / f"log-{hang['told_by']}.txt").read_text()
    for rank in range(int(world)):
        stacks = (folder / "watch" / f"stacks-rank-{rank}.txt").read_text()
        if fault != "stop" or rank != int(culprit):
            assert ("in go_wrong" in stacks) == (rank == int(culprit) and fault != "skip"), stacks
            assert "in steps" in stacks


@pytest.mark.parametrize("case", QUIET_CASES)
def test_no_false_alarm(runs: Path, case: str) -> None:
    """A run that ends well, one with something long in it, one that was suspended, and one in which a rank
    makes progress while the other waits longer than any timeout; no file is left."""
    assert statuses(runs / case) == [0, 0]
    assert not list((runs / case / "watch").iterdir())


def test_stopped_rank_under_torchrun(launched: Any, runs: Path) -> None:
    """The launcher ends the stopped rank when the others have ended."""
    folder, process = launched
    _, errors = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 1
    hang = json.loads((folder / "watch" / "hang.json").read_text())
    assert hang["ranks"] == [1] and f"lgp: {hang['sentence']}" in errors
    assert f"exitcode  : {HUNG}" in errors
    assert len(hang["beats"]) == 2
    for beat in hang["beats"]:
        eventually(lambda pid=beat["pid"]: not Path("/proc", str(pid)).exists(), "the end of both ranks", GONE_S)
