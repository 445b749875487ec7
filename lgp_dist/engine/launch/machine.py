"""What the operating system says about this machine."""

import contextlib
import os
import re
import resource
import shutil
import socket
from collections.abc import Mapping
from pathlib import Path

SHM = Path("/dev/shm")

STALE_NAMES = re.compile(r"(deepspeed_allreduce_buffer_|nccl-|torch_\d|psm_|sem\.mp-|cuda\.shm\.)")
"""Names of files that training leaves in /dev/shm: DeepSpeed, NCCL, torch, Python, CUDA."""


def usable_cpus(membership: Path = Path("/proc/self/cgroup"), mounted: Path = Path("/sys/fs/cgroup")) -> int:
    """Returns how many CPUs this process may use: its affinity, and the quotas of its cgroups, rounded up.

    membership, mounted: where the kernel names this process's cgroups, and shows them.
    """
    usable = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError):
        for line in membership.read_text().splitlines():
            _, controllers, place = line.split(":", 2)
            root = mounted if not controllers else mounted / "cpu"
            if controllers and "cpu" not in controllers.split(","):
                continue
            innermost = root / place.strip("/")  # a container sees its own cgroup as the root, whatever its name
            for folder in (innermost, *innermost.parents):
                if folder.is_relative_to(root):
                    usable = min(usable, _quota(folder) or usable)
    return usable


def _quota(folder: Path) -> int:
    """CPUs that a cgroup may use, of version 2 or 1; 0 for no limit."""
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        return 0 if quota in ("max", "-1") else max(1, -(-int(quota) // int(period)))
    except (OSError, ValueError):
        return 0


def threads_asked(environment: Mapping[str, str]) -> int:
    """Returns OMP_NUM_THREADS; 0 if it is unset, or the 1 that torchrun and accelerate set where it is unset."""
    asked = environment.get("OMP_NUM_THREADS", "").split(",")[0]
    launched = environment.keys() & {"TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"}
    if asked == "1" and launched:
        with contextlib.suppress(OSError):  # what the launcher itself was started with
            given = Path(f"/proc/{os.getppid()}/environ").read_bytes().split(b"\0")
            asked = asked if any(one.startswith(b"OMP_NUM_THREADS=1") for one in given) else ""
    return int(asked) if asked.isascii() and asked.isdigit() else 0


def port_free(port: int) -> bool:
    """Whether a server could listen on a TCP port of this machine; 0 stands for any port."""
    try:
        socket.create_server(("", port)).close()
    except OSError:
        return False
    return True


def addresses(host: str) -> list[str]:
    """Returns the IP addresses that a host name has on this machine."""
    try:
        return sorted({str(info[4][0]) for info in socket.getaddrinfo(host, None)})
    except OSError:
        return []


def free_bytes(folder: Path) -> int:
    """Returns the bytes that a user may still write to a folder's file system. The folder need not exist yet."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def shm_bytes() -> int:
    """Returns the size of /dev/shm, or 0 without it."""
    return shutil.disk_usage(SHM).total if SHM.is_dir() else 0


def open_file_limit() -> tuple[int, int]:
    """Returns how many files a process may have open, and the limit to which it may raise that."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)


def stale_shm(folder: Path = SHM) -> list[Path]:
    """Returns this user's files of training in shared memory that no process has open or mapped."""
    try:
        found = [path for path in sorted(folder.iterdir()) if STALE_NAMES.match(path.name)]
        found = [path for path in found if path.stat().st_uid == os.getuid()]
    except OSError:
        return []
    used = _used(str(folder)) if found else set()
    return [path for path in found if str(path) not in used]


def _used(prefix: str) -> set[str]:
    """Paths below a folder that a process of this user has open or mapped."""
    used: set[str] = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # the process has ended, or belongs to another user
            lines = (process / "maps").read_text(errors="replace").splitlines()
            used |= {line[line.index(prefix) :] for line in lines if prefix in line}
        with contextlib.suppress(OSError):
            for link in list((process / "fd").iterdir()):
                with contextlib.suppress(OSError):  # closed in the meantime
                    used.add(os.readlink(link))
    return used
