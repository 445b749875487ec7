"""Two nodes of two ranks each, in two network namespaces of one machine: the shipped multi-node file, real training."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from exact_launch import HERE, ROOT, TOLERANCE, difference
from exact_trials import Trial
from run_helpers import LIMIT_S

pytestmark = pytest.mark.slow  # launches of several ranks

NAMESPACES = ("unshare", "-Urnpf", "--mount-proc", "--kill-child")
"""A user, network and process namespace; with its first process all others in it end."""

ENGINES = ("zero0", "zero1", "zero2", "zero3") if os.environ.get("LGP_LONG_TESTS") else ("zero1", "zero3")
TRIALS = [Trial(engine, 4, accumulate=2, clip=0.5, steps=2) for engine in ENGINES]


def missing() -> str:
    """Why two nodes cannot be had here; empty where they can."""
    for program in ("unshare", "ip"):
        if shutil.which(program) is None:
            return f"there is no {program}: install util-linux and iproute2"
    tried = [*NAMESPACES, "ip", "link", "add", "name", "lgp0", "type", "veth", "peer", "name", "lgp1"]
    done = subprocess.run(tried, capture_output=True, text=True)
    return f"namespaces joined by veth are not allowed: {done.stderr.strip()}" if done.returncode else ""


def test_two_nodes(tmp_path: Path) -> None:
    """Ranks of both nodes give the weights of one process that runs all paths, under ZeRO.

    The nodes share nothing but the cable and the folder, so that what ranks exchange has gone over it.
    """
    if reason := missing():
        pytest.skip(reason)
    (tmp_path / "trials.json").write_text(json.dumps([trial.as_dict() for trial in TRIALS]))
    options = {
        "--config_file": "launch_configs/multinode.yaml",
        "--num_processes": "4",
        "--gpu_ids": "",
        "--main_process_ip": "10.77.0.1",
        "--machine_rank": "NODE",
    }
    launch = [sys.executable, "-m", "accelerate.commands.launch", *(text for pair in options.items() for text in pair)]
    worker = [str(HERE / "exact_worker.py"), str(tmp_path / "trials.json"), str(tmp_path)]
    done = subprocess.run(
        [*NAMESPACES, str(HERE / "two_nodes.sh"), *launch, *worker],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    for index, trial in enumerate(TRIALS):
        assert difference(trial, tmp_path, index) <= TOLERANCE, trial.name
    (cable,) = json.loads(next(line for line in done.stdout.splitlines() if '"ifname"' in line))
    weights = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert cable["ifname"] == "lgp1" and cable["stats64"]["rx"]["bytes"] > weights
