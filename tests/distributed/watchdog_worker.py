"""Ranks that train nothing under a watchdog, one of which goes wrong.

watchdog_worker.py FOLDER TIMEOUT                  see `main`
watchdog_worker.py FOLDER FAULT CULPRIT TIMEOUT    under torchrun
"""

import ctypes
import logging
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from lgp_dist.engine.watch.watchdog import Watchdog, longest

STEPS, BAD_STEP = 5, 3
LEAVE_S = 5.0
"""For the last rank to leave by itself when the others have ended, after which a launcher ends it."""
SEEN_S = 2.0
"""After so many seconds in a phase the heartbeat has told of it."""
PHASE_OF = {
    **{"sleep": "data", "stop": "forward", "lock": "backward", "skip": "save", "pipe": "forward", "none": ""},
    "pause": "data",
    "patient": "",
    "alone": "",
}
"""Fault -> the phase in which it happens."""


def go_wrong(fault: str) -> None:
    """What hangs a rank, for longer than any test lasts."""
    time.sleep(SEEN_S)
    if fault == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif fault == "lock":
        ctypes.PyDLL(None).sleep(600)
    elif fault == "pipe":
        os.dup2(os.pipe()[1], 2)
        while True:
            sys.stderr.write("x" * 4096)
    else:
        time.sleep(600)


def pause(seconds: float) -> None:
    """This process is suspended, as schedulers do with jobs, and goes on."""
    time.sleep(SEEN_S)
    subprocess.Popen(["sh", "-c", f"sleep {seconds}; kill -CONT {os.getpid()}"])
    os.kill(os.getpid(), signal.SIGSTOP)


def steps(dog: Watchdog, rank: int, fault: str, culprit: int) -> None:
    """A loop with two collectives in each step."""
    ends = dist.new_group(backend="gloo", timeout=timedelta(minutes=20))
    for step in range(STEPS):
        for phase in ("data", "forward", "backward", "reduce", "save"):
            dog.note(step, phase, f"path-{rank}")
            bad = step == BAD_STEP and rank == culprit
            if fault == "pause" and step == BAD_STEP and phase == "data":
                pause(2 * dog.timeout_s)
                time.sleep(dog.timeout_s / 2)
            elif bad and phase == PHASE_OF[fault] and fault != "skip":
                go_wrong(fault)
            if fault == "patient" and phase == "save" and step == BAD_STEP:
                dog.phase("measure")
                time.sleep(2.5 * dog.timeout_s)
            if fault == "alone" and phase == "save" and step == BAD_STEP:
                dog.phase("artifact")
                for _ in dog.over(range(13)) if rank == culprit else ():
                    time.sleep(longest(dog.timeout_s) / 10)
            if phase == "reduce" and not (bad and fault == "skip"):
                dist.all_reduce(torch.ones(4))
            if phase == "save":
                dist.barrier(group=ends)
            time.sleep(0.02)


def run(folder: Path, rank: int, world: int, fault: str, culprit: int, timeout: float) -> None:
    """One rank, in a group that is there."""
    logging.getLogger("lgp").addHandler(logging.FileHandler(folder / f"log-{rank}.txt"))
    with Watchdog(folder / "watch", rank, world, timeout) as dog:
        dog.begin("finetune")
        steps(dog, rank, fault, culprit)
    dist.destroy_process_group()


def fork(folder: Path, rank: int, world: int, fault: str, culprit: int, timeout: float) -> int:
    """Starts a rank as a fork of this process, which has torch but no threads; its pid."""
    if pid := os.fork():
        return pid
    status = 1
    try:
        errors = os.open(folder / f"stderr-{rank}.txt", os.O_WRONLY | os.O_CREAT, 0o644)
        os.dup2(errors, 2)
        store = f"file://{folder}/store"
        dist.init_process_group("gloo", store, rank=rank, world_size=world, timeout=timedelta(minutes=20))
        run(folder, rank, world, fault, culprit, timeout)
        status = 0
    finally:
        os._exit(status)


def main(out: Path, timeout: float) -> None:
    """Runs all the cases named `FAULT-CULPRIT-WORLD` that are folders of `out`, at the same time; statuses to files.

    A rank that is left when the others have ended is killed, as a launcher does.
    """
    ranks: dict[int, tuple[Path, int]] = {}
    for folder in sorted(out.iterdir()):
        fault, culprit, world = folder.name.split("-")
        for rank in range(int(world)):
            limit = 3 * timeout if fault == "pause" else timeout
            ranks[fork(folder, rank, int(world), fault, int(culprit), limit)] = folder, rank
    due: dict[int, float] = {}
    while ranks:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            time.sleep(0.05)
            for late in [other for other, moment in due.items() if moment < time.monotonic()]:
                os.kill(late, signal.SIGKILL)
                del due[late]
            continue
        folder, rank = ranks.pop(pid)
        due.pop(pid, None)
        (folder / f"status-{rank}").write_text(str(os.waitstatus_to_exitcode(status)))
        left = [other for other, (place, _) in ranks.items() if place == folder]
        if len(left) == 1 and os.waitstatus_to_exitcode(status):
            due[left[0]] = time.monotonic() + LEAVE_S


if __name__ == "__main__":
    if len(sys.argv) == 3:
        main(Path(sys.argv[1]), float(sys.argv[2]))
    else:
        dist.init_process_group("gloo", timeout=timedelta(minutes=20))
        run(
            Path(sys.argv[1]), dist.get_rank(), dist.get_world_size(), sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
        )
