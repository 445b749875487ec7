"""The real command under real launchers: asked to leave, started again, a rank killed, restarted by the launcher."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from exact_launch import ROOT, command
from run_helpers import LIMIT_S, SMALL, eventually, gone, outcome_of, processes_with
from safetensors.torch import load_file

from lgp_dist.run.run_status import RunStatus

pytestmark = pytest.mark.slow  # launches of several ranks

STEPS, EVERY = 40, 5
LAUNCHERS = ("accelerate", "torchrun") if os.environ.get("LGP_LONG_TESTS") else ()
"""DeepSpeed's ZeRO-1, and DDP; with LGP_LONG_TESTS=1, since a test takes minutes. test_torture has the kills of CI."""
FINETUNE = ("-m", "lgp_dist", "finetune", *SMALL, f"--finetune.train.max-steps={STEPS}", f"--checkpoint.every={EVERY}")
MORE = ("--checkpoint.keep=100", "--engine.device=cpu", "--faults.timeout-s=60")
TIMES = ("step_time_s", "data_wait_s", "images_per_s")
"""Fields that differ between any two runs."""


def launcher(name: str) -> list[str]:
    """Two ranks whose launcher may start them again once."""
    if name == "torchrun":
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    return [*command(2, deepspeed=True), "--max_restarts", "1"]


def start(name: str, place: Path, mark: str) -> subprocess.Popen[str]:
    """Stage finetune under a launcher."""
    return subprocess.Popen(
        [*launcher(name), *FINETUNE, *MORE],
        cwd=place,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "LGP_TEST_MARK": mark},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def saved(place: Path, step: int, process: subprocess.Popen[str]) -> None:
    """Waits until a step has its checkpoint."""
    path = place / "run" / "checkpoints" / "finetune" / f"step-{step:08d}"
    eventually(lambda: path.is_dir() or process.poll() is not None, f"{path} comes")
    assert process.poll() is None, process.communicate()[1][-3000:]


def rank(mark: str, number: int) -> int:
    """The process of a rank."""
    wanted = f"RANK={number}".encode()
    found = [pid for pid in processes_with(mark) if wanted in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")]
    assert len(found) == 1, found
    return found[0]


def lines(place: Path) -> list[dict[str, Any]]:
    """Metrics of stage finetune without times."""
    found = [json.loads(line) for line in (place / "run" / "metrics.jsonl").read_text().splitlines()]
    found = [line for line in found if line["stage"] == "finetune"]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in found]


def prepared(finished: Path, place: Path) -> Path:
    """A run whose stages before finetune are done."""
    shutil.copytree(finished, place)
    for stage in ("finetune", "evaluate", "descend", "export", "checkpoints"):
        shutil.rmtree(place / "run" / stage, ignore_errors=True)
    (place / "run" / "metrics.jsonl").unlink()
    return place


@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_run_survives_preemption_and_a_killed_rank(finished: Path, tmp_path: Path, mark: str, name: str) -> None:
    """SIGTERM to the launcher; started again; kill -9 of a rank; the launcher starts all again: the same run."""
    whole, place = (prepared(finished, tmp_path / folder) for folder in ("whole", "disturbed"))
    undisturbed = start(name, whole, mark)
    error = undisturbed.communicate(timeout=LIMIT_S)[1]
    assert undisturbed.returncode == 0, error[-3000:]

    first = start(name, place, mark)
    saved(place, 2 * EVERY, first)
    first.send_signal(signal.SIGTERM)
    error = first.communicate(timeout=LIMIT_S)[1]
    left = outcome_of(place / "run")
    assert (first.returncode, left.outcome, left.stage) == (1, "preempted", "finetune"), error[-3000:]
    assert 2 * EVERY <= left.step < STEPS and f"step-{left.step:08d}" in os.listdir(place / "run/checkpoints/finetune")
    gone(mark)

    second = start(name, place, mark)
    later = (left.step // EVERY + 2) * EVERY
    saved(place, later, second)
    os.kill(rank(mark, 1), signal.SIGKILL)
    error = second.communicate(timeout=LIMIT_S)[1]
    assert second.returncode == 0, error[-6000:]
    assert error.count("finetune: resumes from step") == 2 and f"resumes from step {left.step} of" in error
    assert outcome_of(place / "run") == RunStatus("complete", "finetune")

    file = "run/finetune/pool.safetensors"
    found, expected = load_file(place / file), load_file(whole / file)
    assert found.keys() == expected.keys() and all(found[key].equal(expected[key]) for key in expected)
    assert lines(place) == lines(whole) and [line["step"] for line in lines(whole)] == list(range(STEPS))
