"""Hashes of files, files and folders that are complete or absent, and the lock of a folder that a process writes.

Readers and killed processes never see half a file. Nothing is flushed but by `flush`: after a power cut a new file may
be empty, so what must survive one (shards, checkpoints) is flushed before it gets its name.

A lock is a file that is created exclusively, which every file system can do, and that names its process. On the same
machine a second process sees whether that one lives; on another, whether it writes the file again every BEAT_S.
"""

import contextlib
import hashlib
import json
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from lgp_dist.errors import USER, UserError

T = TypeVar("T")

LOCK = ".lock"
"""Name of the lock in a folder."""
BEAT_S = 5.0
"""Seconds after which a process writes its lock again."""
SILENT_S = 60.0
"""Seconds without a beat after which a process on another machine counts as dead."""
JOBS = {"SLURM_JOB_ID": "Slurm", "PBS_JOBID": "PBS", "LSB_JOBID": "LSF", "JOB_ID": "Grid Engine", "FLUX_JOB_ID": "Flux"}
"""Variables in which schedulers name a job."""


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes; OSError where it cannot be read."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary path in the same folder, which the block fills; it is renamed to `path` where the block ends
    well and removed where it raises. The temporary name is this process's own."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def write_atomic(path: Path, content: bytes) -> None:
    """Writes a file so that a reader sees the old content or the new. Makes missing folders.

    Raises UserError where the folder cannot be written to or the disk is full.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            partial.write_bytes(content)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(
            f"{path} cannot be written ({reason}): free space, or choose a folder that can be written to."
        ) from error


def write_json(path: Path, value: object) -> None:
    """`write_atomic` of a value as indented JSON."""
    write_atomic(path, (json.dumps(value, indent=2) + "\n").encode())


def replace_folder(final: Path, fill: Callable[[Path], T]) -> T:
    """Makes a folder, or replaces one, and returns what `fill` returns. `fill` writes into a new folder next to it.

    Where `fill` raises, nothing has changed. A kill between the two renames leaves no folder, never half of one.
    """
    partial, old = (final.with_name(f".{final.name}.{word}") for word in ("partial", "old"))
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        result = fill(partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.replace(final, old)
    os.replace(partial, final)
    shutil.rmtree(old, ignore_errors=True)
    return result


def existing(path: Path) -> Path:
    """The path itself, or the innermost of its folders that exists."""
    return next(each for each in (path, *path.absolute().parents) if each.exists())


def flush(path: Path) -> None:
    """Waits until what was written to a file or folder is on disk."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@dataclass(frozen=True)
class Holder:
    """The process that a lock names."""

    host: str
    system: str
    """Boot of the machine and namespace of its pids, within which a pid is one process."""
    pid: int
    began: str
    """Moment at which the process began, which tells it from a later one of the same pid."""
    job: str
    restarts: int
    """How often the scheduler has restarted the job."""
    launch: str
    """Where the ranks of its launch meet; empty without a launcher."""

    @classmethod
    def this_process(cls) -> "Holder":
        """That of a lock which this process takes."""
        system, values = [], os.environ
        with contextlib.suppress(OSError):
            system = [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
        job = next((f"{kind} job {values[name]}" for name, kind in JOBS.items() if values.get(name)), "")
        restarts = values.get("SLURM_RESTART_COUNT", "")
        launch = ":".join(filter(None, (values.get("MASTER_ADDR"), values.get("MASTER_PORT"))))
        count = int(restarts) if restarts.isdigit() else 0
        return cls(socket.gethostname(), " ".join(system), os.getpid(), _began(os.getpid()), job, count, launch)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, {self.job or 'outside of a job'}"

    def lives(self, me: "Holder") -> bool | None:
        """Whether it is alive; None if this process cannot see that."""
        if (self.host, self.system) == (me.host, me.system):
            return _began(self.pid) == self.began
        return False if self.job and self.job == me.job and self.restarts < me.restarts else None


def _began(pid: int) -> str:
    """When a process began, in ticks since boot; empty for one that is dead."""
    try:
        state, *others = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state in "ZX" else others[18]


def _read(lock: Path) -> tuple[str, int] | None:
    """Text and time of a lock, or None without one. It is opened, so that a network file system asks its server."""
    try:
        with lock.open() as file:
            return file.read(), os.fstat(file.fileno()).st_mtime_ns
    except (FileNotFoundError, NotADirectoryError):
        return None


def _holder(text: str) -> Holder | None:
    """Whom a lock names; None if it is still being written, or damaged."""
    try:
        return Holder(**json.loads(text))
    except (ValueError, TypeError):
        return None


def check_unlocked(lock: Path, option: str = "--run-dir") -> None:
    """UserError if a process that this one can see holds the lock; not if it is of the same launch."""
    with contextlib.suppress(OSError):
        found, me = _read(lock), Holder.this_process()
        holder = _holder(found[0]) if found else None
        if holder and holder.lives(me) and not (me.launch and me.launch == holder.launch):
            raise UserError(_refusal(lock, holder, option))


def _refusal(lock: Path, holder: Holder | None, option: str) -> str:
    folder = lock.parent if lock.name == LOCK else lock.with_name(lock.name[1 : -len(LOCK)])
    return (
        f"{folder} is being written by {holder or f'a process that {lock} does not name'}: wait for its end, stop it, "
        f"or choose another {option}."
    )


@contextlib.contextmanager
def locked(lock: Path, option: str = "--run-dir") -> Iterator[None]:
    """Holds a lock for the block, and makes its folder. A lock whose process is dead is taken over.

    UserError if another process holds it, with host, pid and job, or if the folder cannot be written to.
    option: that names the folder.
    """
    me, new = Holder.this_process(), not lock.parent.exists()
    text = json.dumps(asdict(me)) + "\n"
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        handle = _acquire(lock, me, text, option)
    except OSError as error:
        raise UserError(
            f"{lock.parent} cannot be written to ({error.strerror}): free space, or choose another {option}."
        ) from None
    ended = threading.Event()
    beats = threading.Thread(target=_beat, args=(lock, handle, text, ended), name="lock", daemon=True)
    beats.start()
    try:
        yield
    finally:
        ended.set()
        beats.join()
        os.close(handle)
        with contextlib.suppress(OSError):
            if (_read(lock) or ("",))[0] == text:
                lock.unlink()
            if new:
                lock.parent.rmdir()  # only if nothing was written


def beside(folder: Path) -> Path:
    """The lock of a folder that is replaced as a whole, or of a file: next to it."""
    return folder.absolute().with_name(f".{folder.absolute().name}{LOCK}")


def _acquire(lock: Path, me: Holder, text: str, option: str) -> int:
    while True:
        try:
            handle = os.open(lock, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except FileExistsError:
            found = _read(lock)
            if found and _is_held(lock, found, me):
                raise UserError(_refusal(lock, _holder(found[0]), option)) from None
            if found:
                _remove(lock, found[0])
            continue
        try:
            os.write(handle, text.encode())
        except OSError:
            os.close(handle)
            lock.unlink()
            raise
        return handle


def _is_held(lock: Path, found: tuple[str, int], me: Holder) -> bool:
    """Whether the process lives that wrote a lock; watches the lock where only its beats can tell."""
    holder = _holder(found[0])
    lives = holder.lives(me) if holder else None
    if lives is not None:
        return lives
    sys.stderr.write(f"lgp: {lock} names {holder or 'no process'}: waiting up to {SILENT_S:.0f} s for its beat\n")
    until = time.monotonic() + SILENT_S
    while time.monotonic() < until:
        time.sleep(min(1.0, SILENT_S / 4))
        if (now := _read(lock)) != found:
            return now is not None and _is_held(lock, now, me) if holder is None else now is not None
    return False


def _remove(lock: Path, text: str) -> None:
    """Removes the lock of a dead process; where another process has taken it over by now, its lock stays."""
    aside = lock.with_name(f"{lock.name}.{socket.gethostname()}.{os.getpid()}")
    with contextlib.suppress(FileNotFoundError):
        os.rename(lock, aside)
        if aside.read_text() != text:
            with contextlib.suppress(OSError):
                os.link(aside, lock)
        aside.unlink()


def _beat(lock: Path, handle: int, text: str, ended: threading.Event) -> None:
    """Writes the same text again until the end. Ends the process if another one has taken the lock over."""
    while not ended.wait(BEAT_S):
        with contextlib.suppress(OSError):
            os.pwrite(handle, text.encode(), 0)
            found = _read(lock)
            if found and found[0] not in ("", text):
                sys.stderr.write(f"lgp: {_refusal(lock, _holder(found[0]), 'folder')}\n")
                sys.stderr.flush()
                os._exit(USER)
