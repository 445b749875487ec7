"""Runs the cells of a study as processes of their own, a few at a time, and goes on where it was ended."""

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
from lgp_dist.study.cells import Cell, leader_of, take_over
from lgp_dist.study.settings import arguments

STARTS = "starts.jsonl"
"""One line for every start of a cell that ended while the study ran: its seconds and status."""

PAUSE_S = 0.2
GRACE_S = 60.0
"""How long cells that are asked to leave may take to save, seconds."""


@dataclass
class Start:
    """A running cell."""

    cell: Cell
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
"""As launch_configs/cpu_2_ddp.yaml, with any number of processes."""


def command_of(cell: Cell, ranks: int, out: Path) -> list[str]:
    """The command of a cell: `lgp run`, under accelerate's launcher (DDP) where it has several ranks."""
    launch = ["-m", "lgp_dist"]
    if ranks > 1:
        write_json(out / "launch.json", {**DDP, "num_processes": ranks})
        launch = ["-m", "accelerate.commands.launch", "--config_file", str(out / "launch.json"), *launch]
    return [sys.executable, *launch, "run", *arguments(cell.config)]


def run_cells(
    cells: Sequence[Cell], done: Callable[[Cell], bool], out: Path, jobs: int, ranks: int, say: Callable[[str], None]
) -> None:
    """Runs all cells that are not done, at most `jobs` at a time, each once what it shares with another is made.

    Cells that another process of a study still runs are waited for. UserError at the first that fails, once those that
    run have been asked to save and leave; the same command goes on from there.
    """
    waiting = [cell for cell in cells if not done(cell)]
    say(f"{len(cells)} runs, {len(cells) - len(waiting)} of them complete")
    running: list[Start] = []
    with _asked_to_leave():
        try:
            while waiting or running:
                running = [start for start in running if not _ended(start, out, say)]
                for cell in list(waiting):
                    if len(running) >= jobs:
                        break
                    unmade = [*waiting, *(start.cell for start in running)]
                    start = _begin(cell, cells, unmade, out, ranks)
                    if start is not None:
                        waiting.remove(cell)
                        running.append(start)
                        say(f"{cell.name}: begins")
                time.sleep(PAUSE_S)
        finally:
            _end_all(running)


def _begin(cell: Cell, cells: Sequence[Cell], unmade: Sequence[Cell], out: Path, ranks: int) -> Start | None:
    """Starts a cell; None where it must wait for another's stages, or is still being run."""
    leader, stages = leader_of(cell, cells)
    if leader in unmade and not cell.has(stages[-1]) and not leader.has(stages[-1]):
        return None
    cell.folder.mkdir(parents=True, exist_ok=True)
    lock = (cell.folder / "study.lock").open("ab")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the process inherits it, and keeps it if the study is killed
    except BlockingIOError:
        lock.close()
        return None
    if leader is not None:
        take_over(cell, leader, stages)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with _errors_of(cell, out).open("wb") as errors:
        process = subprocess.Popen(
            command_of(cell, ranks, out),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            env=environment,
            pass_fds=(lock.fileno(),),
        )
    return Start(cell, process, lock, time.monotonic())


def _ended(start: Start, out: Path, say: Callable[[str], None]) -> bool:
    """Notes a start that has ended; UserError where it failed."""
    pid, status, usage = os.wait4(start.process.pid, os.WNOHANG)
    if not pid:
        return False
    start.process.returncode = os.waitstatus_to_exitcode(status)
    start.lock.close()
    line: dict[str, Any] = {"arm": start.cell.arm.name, "seed": start.cell.seed, "status": start.process.returncode}
    line["wall_s"] = round(time.monotonic() - start.began, 1)
    line["cpu_s"] = round(usage.ru_utime + usage.ru_stime, 1)
    with (out / STARTS).open("a") as file:
        file.write(json.dumps(line) + "\n")
    if line["status"]:
        raise UserError(_why(start.cell, line["status"], _errors_of(start.cell, out)))
    say(f"{start.cell.name}: complete after {line['wall_s']:.0f} s")
    return True


def _why(cell: Cell, status: int, errors: Path) -> str:
    """The sentence of a cell that failed: its own, where it has one."""
    lines = errors.read_text(errors="replace").splitlines()
    own = next((line.removeprefix("lgp: ") for line in reversed(lines) if line.startswith("lgp: ")), "")
    if own:
        return f"The run {cell.folder} ({cell.name}) stopped: {own}"
    return f"The run {cell.folder} ({cell.name}) ended with status {status}: see {errors}, then start the study again."


def _errors_of(cell: Cell, out: Path) -> Path:
    """Where a cell's standard error goes."""
    folder = out / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{cell.arm.name}-seed{cell.seed}.txt"


def _end_all(running: Sequence[Start]) -> None:
    """Asks what still runs to save and leave; what does not within the grace is killed."""
    left = [start.process for start in running if start.process.returncode is None]
    for process in left:
        process.terminate()
    for process in left:
        try:
            process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def _asked_to_leave() -> Iterator[None]:
    """SIGTERM ends a study as Ctrl-C does: runs save first."""

    def leave(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
