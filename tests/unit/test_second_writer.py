"""A folder has one writer: the lock against real processes, dead ones, other machines, and many at a time."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from run_helpers import LIMIT_S, eventually, has

from lgp_dist import files
from lgp_dist.errors import USER, UserError
from lgp_dist.files import LOCK, Holder, beside, check_unlocked, locked

HOLD = """
import sys
from pathlib import Path
from lgp_dist import files
files.BEAT_S = 0.05
with files.locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def holding(lock: Path, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """A process that holds a lock until its stdin ends."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(lock)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process


def left_by(lock: Path, holder: Holder) -> str:
    """The lock that a process has left."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    lock.write_text(json.dumps(asdict(holder)) + "\n")
    return lock.read_text()


def test_a_second_process_is_refused_with_host_pid_and_job(tmp_path: Path) -> None:
    """Until the first ends; then nothing of the lock is left."""
    lock = tmp_path / "run" / LOCK
    with holding(lock, SLURM_JOB_ID="77") as process:
        for attempt in (lambda: check_unlocked(lock), lambda: locked(lock).__enter__()):
            with pytest.raises(UserError) as caught:
                attempt()
            has(
                str(caught.value), str(lock.parent), socket.gethostname(), str(process.pid), "Slurm job 77", "--run-dir"
            )
        process.communicate()
    assert process.returncode == 0 and not lock.parent.exists()
    with locked(lock):
        (lock.parent / "result").touch()
    assert os.listdir(lock.parent) == ["result"]


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path: Path) -> None:
    """Of one that was killed and that nobody has waited for, and of an earlier process with the pid of a living one."""
    lock, me = tmp_path / "run" / LOCK, Holder.this_process()
    with holding(lock) as process:
        process.send_signal(signal.SIGKILL)
        eventually(lambda: " Z " in Path(f"/proc/{process.pid}/stat").read_text(), "a zombie")
        check_unlocked(lock)
        with locked(lock):
            assert json.loads(lock.read_text())["pid"] == os.getpid()
    assert not lock.exists()
    left_by(lock, replace(me, began="1"))
    with locked(lock):
        assert json.loads(lock.read_text()) == asdict(me)


ELSEWHERE = replace(Holder.this_process(), host="elsewhere", system="another", job="Slurm job 77")


@pytest.mark.parametrize("left", ["elsewhere", "rebooted", "empty"])
def test_a_lock_that_does_not_beat_is_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: str) -> None:
    """Of a process on another machine, of an earlier boot, or of one that was killed while it wrote the lock."""
    monkeypatch.setattr(files, "SILENT_S", 0.2)
    lock = tmp_path / LOCK
    left_by(lock, ELSEWHERE if left == "elsewhere" else replace(Holder.this_process(), system="earlier"))
    if left == "empty":
        lock.write_text("")
    check_unlocked(lock)
    with locked(lock):
        assert json.loads(lock.read_text())["pid"] == os.getpid()


def test_a_lock_that_beats_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process cannot see the other one, as if it were on another machine, but sees its beats."""
    monkeypatch.setattr(files, "SILENT_S", LIMIT_S)
    monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")
    lock = tmp_path / LOCK
    with holding(lock) as process:
        with pytest.raises(UserError, match=f"process {process.pid} on "), locked(lock):
            pass
        process.communicate()


def test_a_job_that_was_requeued_takes_its_lock_over_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "SILENT_S", LIMIT_S)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    left_by(tmp_path / LOCK, ELSEWHERE)
    with locked(tmp_path / LOCK):
        assert json.loads((tmp_path / LOCK).read_text())["restarts"] == 1


def test_who_has_lost_the_lock_ends(tmp_path: Path) -> None:
    """As after a suspension that another machine took for death; the lock of the new process stays."""
    lock = tmp_path / LOCK
    with holding(lock) as process:
        lock.unlink()
        text = left_by(lock, ELSEWHERE)
        assert process.wait(LIMIT_S) == USER and process.stderr is not None
        has(process.stderr.read(), "elsewhere", "Slurm job 77")
    assert lock.read_text() == text


RACE = """
import os, sys, time
from pathlib import Path
from lgp_dist.errors import UserError
from lgp_dist.files import locked
folder, taken = Path(sys.argv[1]), 0
while taken < 5:
    try:
        with locked(folder / ".lock"):
            os.close(os.open(folder / "alone", os.O_CREAT | os.O_EXCL))
            time.sleep(0.002)
            (folder / "alone").unlink()
            taken += 1
    except UserError:
        time.sleep(0.001)
"""


def test_of_many_that_find_a_dead_lock_one_has_it(tmp_path: Path) -> None:
    """Each makes a file that must not be there while it holds the lock."""
    left_by(tmp_path / LOCK, replace(Holder.this_process(), began="1"))
    race = [subprocess.Popen([sys.executable, "-c", RACE, str(tmp_path)]) for _ in range(4)]
    assert [process.wait(LIMIT_S) for process in race] == [0] * 4
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(UserError, match="cannot be written to .*choose another --out"),
        locked(tmp_path / "file" / LOCK, "--out"),
    ):
        pass
    assert beside(tmp_path / "out") == tmp_path / ".out.lock"
