"""What a process holds, as /proc tells it, and whether that grows."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

SHARED = Path("/dev/shm")
COUNTS = ("descriptors", "threads", "shared")
"""What must not grow at all: the least of them, as a save opens files for a moment."""
MEMORY_SHARE = 0.02
"""What the median of memory may grow by from the second third to the last."""


@dataclass(frozen=True)
class Footprint:
    """What a process holds at one moment."""

    memory: int
    """Resident bytes that no file backs."""
    descriptors: int
    threads: int
    shared: int
    """Files of /dev/shm that it has mapped or open."""

    @classmethod
    def of(cls, pid: int) -> "Footprint":
        """Of a process that lives; OSError where it does not."""
        folder = Path("/proc", str(pid))
        lines = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
        return cls(
            memory=1024 * int(lines["RssAnon"].split()[0]),
            descriptors=len(list((folder / "fd").iterdir())),
            threads=int(lines["Threads"]),
            shared=len(shared_files(folder)),
        )


def shared_files(process: Path) -> set[Path]:
    """Files of /dev/shm that a process, a folder of /proc, has mapped or open; OSError where it does not live."""
    names = [line.split(None, 5)[-1] for line in (process / "maps").read_text().splitlines()]
    for descriptor in (process / "fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            names.append(str(descriptor.readlink()))
    return {Path(name) for name in names if name.startswith(f"{SHARED}/")}


def left_behind(before: set[Path]) -> set[Path]:
    """New files of /dev/shm that no process has mapped or open. before: those that are not new."""
    left = set(SHARED.iterdir()) - before
    for process in Path("/proc").glob("[0-9]*") if left else ():
        with suppress(OSError):
            left -= shared_files(process)
    return left


def thirds(values: Sequence[int]) -> tuple[Sequence[int], Sequence[int]]:
    """The second and the last third; the first is for start and warm-up."""
    third = len(values) // 3
    return values[third : 2 * third], values[2 * third :]


def summary(series: Sequence[Footprint]) -> dict[str, dict[str, float]]:
    """Of each quantity least, median and most in the second third and in the last."""
    found = {}
    for name in asdict(series[0]):
        before, after = thirds([getattr(moment, name) for moment in series])
        found[name] = {
            **{"least_before": min(before), "least_after": min(after)},
            **{"median_before": median(before), "median_after": median(after)},
            **{"most_before": max(before), "most_after": max(after)},
        }
    return found


def grown(series: Sequence[Footprint]) -> list[str]:
    """Quantities that grew from the second third to the last, each with its numbers. series: three moments or more."""
    about = summary(series)
    found = [f"{name}: {about[name]}" for name in COUNTS if about[name]["least_after"] > about[name]["least_before"]]
    memory = about["memory"]
    if memory["median_after"] > memory["median_before"] * (1 + MEMORY_SHARE):
        found.append(f"memory: {memory}")
    return found
