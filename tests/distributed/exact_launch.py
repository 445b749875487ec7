"""Runs trials through `accelerate launch` and compares them with the reference."""

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from exact_reference import reference
from exact_trials import Trial
from run_helpers import LIMIT_S
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
TOLERANCE = 1e-6


def command(world: int, deepspeed: bool) -> list[str]:
    """`accelerate launch` with the shipped file on so many processes."""
    file = "cpu_2.yaml" if deepspeed else "cpu_2_ddp.yaml"
    call = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ROOT / "launch_configs" / file)]
    return [*call, "--num_processes", str(world)]


def start(trials: Sequence[Any], folder: Path, script: str = "exact_worker.py") -> subprocess.CompletedProcess[str]:
    """Trains trials of one world size, all of DeepSpeed or all of DDP, in one launch.

    trials: `Trial`, or what else has `world`, `engine` and `as_dict`, for another script.
    """
    folder.mkdir(parents=True)
    (folder / "trials.json").write_text(json.dumps([trial.as_dict() for trial in trials]))
    worker = [str(HERE / script), str(folder / "trials.json"), str(folder)]
    return run_workers(trials[0].world, trials[0].engine != "ddp", worker, len(trials))


def run_workers(world: int, deepspeed: bool, worker: list[str], parts: int = 1) -> subprocess.CompletedProcess[str]:
    """Runs a script and its arguments on so many processes; ends them all, ranks too, where they take too long.

    parts: what they train one after the other; each is given half a minute more.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    call = command(world, deepspeed)
    with subprocess.Popen(
        [*call, *worker], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    ) as process:  # fmt: skip
        try:
            out, err = process.communicate(timeout=LIMIT_S + 30 * parts)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the ranks too
            out, err = process.communicate()
    return subprocess.CompletedProcess(call, process.returncode, out, err)


def difference(trial: Trial, folder: Path, index: int, left_out: tuple[int, ...] = ()) -> float:
    """The largest difference of any parameter between a trial's run and its reference; infinite without a run.

    left_out: steps that the reference does not apply.
    """
    if not (folder / f"{index}.safetensors").exists():
        return math.inf
    found, expected = load_file(folder / f"{index}.safetensors"), reference(trial.on_one_process, left_out=left_out)
    assert found.keys() == expected.keys()
    return max(float((found[name] - expected[name]).abs().max()) for name in expected)


def allowed(trial: Trial) -> float:
    """How far a run may be from its reference: 1e-6, and in bf16 and fp16 the reference's own rounding on top.

    Where the last bit of a weight in fp32 decides how it rounds to 8 or 11 bits, as the last bit of a norm does in
    clipping, the reference differs from itself: it is run again with weights moved to the float beside them.
    """
    if trial.precision == "fp32":
        return TOLERANCE
    exact, found = reference(trial.on_one_process), 0.0
    for nudge in (1, 2, 3, 4):
        other = reference(trial.on_one_process, nudge)
        found = max(found, *(float((other[name] - exact[name]).abs().max()) for name in exact))
    return TOLERANCE + found


def groups(trials: Iterable[Trial]) -> dict[tuple[int, bool], list[Trial]]:
    """Trials that can share a launch: those of one world size, with DeepSpeed or without."""
    found: dict[tuple[int, bool], list[Trial]] = {}
    for trial in trials:
        found.setdefault((trial.world, trial.engine != "ddp"), []).append(trial)
    return found
