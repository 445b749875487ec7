"""Runs the trials of a study as processes, a few at a time; a study that was stopped continues."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from lgp_dist.errors import UserError
from lgp_dist.files import write_json
from lgp_dist.run.linked_stages import link_stages
from lgp_dist.study.settings import arguments
from lgp_dist.study.trials import Trial, donor_of

STARTS = "starts.jsonl"
"""One line for every process of a trial that ended while the study ran: its seconds and status."""

PAUSE_S = 0.2
GRACE_S = 60.0
"""Seconds that trials may take to save when they are asked to stop."""


@dataclass
class RunningTrial:
    """A trial's process."""

    trial: Trial
    process: subprocess.Popen[bytes]
    lock: IO[bytes]
    began: float


DDP = {
    "compute_environment": "LOCAL_MACHINE",
    "distributed_type": "MULTI_GPU",
    "num_machines": 1,
    "machine_rank": 0,
    "use_cpu": False,
    "gpu_ids": "all",
    "main_process_port": 0,
    "main_training_function": "main",
}
"""launch_configs/cpu_2_ddp.yaml without its number of processes."""


def command_of(trial: Trial, ranks: int, out: Path) -> list[str]:
    """The trial's `lgp run`; with several ranks under accelerate's launcher (DDP)."""
    launch = ["-m", "lgp_dist"]
    if ranks > 1:
        write_json(out / "launch.json", {**DDP, "num_processes": ranks})
        launch = ["-m", "accelerate.commands.launch", "--config_file", str(out / "launch.json"), *launch]
    return [sys.executable, *launch, "run", *arguments(trial.config)]


def run_trials(
    trials: Sequence[Trial], done: Callable[[Trial], bool], out: Path, jobs: int, ranks: int, say: Callable[[str], None]
) -> None:
    """Runs all trials that are not done, at most `jobs` at a time.

    A trial waits until the stages that it shares with an earlier one exist, and until a process left by a killed study
    has ended. UserError at the first trial that fails, after the others were asked to save and stop; the same command
    continues from there.
    """
    waiting = [trial for trial in trials if not done(trial)]
    say(f"{len(trials)} runs, {len(trials) - len(waiting)} of them complete")
    running: list[RunningTrial] = []
    with _sigterm_interrupts():
        try:
            while waiting or running:
                running = [each for each in running if not _ended(each, out, say)]
                for trial in list(waiting):
                    if len(running) >= jobs:
                        break
                    unfinished = [*waiting, *(each.trial for each in running)]
                    started = _start(trial, trials, unfinished, out, ranks)
                    if started is not None:
                        waiting.remove(trial)
                        running.append(started)
                        say(f"{trial.name}: started")
                time.sleep(PAUSE_S)
        finally:
            _stop([each.process for each in running if each.process.returncode is None])


def _start(
    trial: Trial, trials: Sequence[Trial], unfinished: Sequence[Trial], out: Path, ranks: int
) -> RunningTrial | None:
    """Starts a trial; None if it must wait for another's stages, or another process still runs it."""
    donor, stages = donor_of(trial, trials)
    if donor is not None and donor in unfinished and not trial.has(stages[-1]) and not donor.has(stages[-1]):
        return None
    trial.folder.mkdir(parents=True, exist_ok=True)
    lock = (trial.folder / "study.lock").open("ab")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the process inherits the lock and outlives a killed study
    except BlockingIOError:
        lock.close()
        return None
    except OSError:  # a file system without flock: the run's own lock refuses a second one
        pass
    if donor is not None:
        link_stages(donor.folder, trial.folder, stages)
    with _errors_of(trial, out).open("wb") as errors:
        process = subprocess.Popen(
            command_of(trial, ranks, out),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            pass_fds=(lock.fileno(),),
        )
    return RunningTrial(trial, process, lock, time.monotonic())


def _ended(running: RunningTrial, out: Path, say: Callable[[str], None]) -> bool:
    """Whether the trial's process has ended, which is noted in STARTS; UserError if it failed."""
    pid, status, usage = os.wait4(running.process.pid, os.WNOHANG)
    if not pid:
        return False
    trial = running.trial
    code = running.process.returncode = os.waitstatus_to_exitcode(status)
    running.lock.close()
    wall = round(time.monotonic() - running.began, 1)
    cpu = round(usage.ru_utime + usage.ru_stime, 1)
    line = {"arm": trial.variant.name, "seed": trial.seed, "status": code, "wall_s": wall, "cpu_s": cpu}
    with (out / STARTS).open("a") as file:
        file.write(json.dumps(line) + "\n")
    if code:
        raise UserError(_failure(trial, code, _errors_of(trial, out)))
    say(f"{trial.name}: complete after {wall:.0f} s")
    return True


def _failure(trial: Trial, code: int, errors: Path) -> str:
    """What is said of a failed trial: its own sentence if it has one."""
    lines = errors.read_text(errors="replace").splitlines()
    own = next((line.removeprefix("lgp: ") for line in reversed(lines) if line.startswith("lgp: ")), "")
    if own:
        return f"The run {trial.folder} ({trial.name}) stopped: {own}"
    return f"The run {trial.folder} ({trial.name}) ended with status {code}: see {errors}, then start the study again."


def _errors_of(trial: Trial, out: Path) -> Path:
    """The file of a trial's standard error."""
    folder = out / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{trial.variant.name}-seed{trial.seed}.txt"


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Asks processes to save and stop, and kills those that run after the grace period."""
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """SIGTERM stops a study as Ctrl-C does: runs save first."""

    def leave(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
