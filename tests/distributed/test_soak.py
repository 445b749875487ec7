"""What scripts/soak looks at: a process that opens files, threads, shared memory or memory is seen to grow."""

import mmap
import os
import tempfile
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from footprint import SHARED, Footprint, grown, left_behind

STEADY = Footprint(memory=200_000_000, descriptors=40, threads=12, shared=2)


def test_a_process_is_seen_as_it_is() -> None:
    """Each thing that this process takes shows in its own number."""
    before, stop = Footprint.of(os.getpid()), threading.Event()
    thread = threading.Thread(target=stop.wait)
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as file:
        file.truncate(4096)
        with mmap.mmap(file.fileno(), 4096):  # keeps a descriptor of its own
            thread.start()
            held = b"x" * 400_000_000
            found = Footprint.of(os.getpid())
    stop.set()
    thread.join()
    assert found.threads == before.threads + 1 and found.shared == before.shared + 1
    assert found.descriptors == before.descriptors + 2
    assert len(held) * 0.5 < found.memory - before.memory < len(held) * 1.5  # the system may reclaim other pages


def test_shared_memory_that_nobody_holds_is_found() -> None:
    before = set(SHARED.iterdir())
    with tempfile.NamedTemporaryFile(dir=SHARED, delete=False) as file:
        held, path = left_behind(before), Path(file.name)
    left = left_behind(before)
    path.unlink()
    assert path not in held and path in left and path not in left_behind(before)


@pytest.mark.parametrize(
    ("name", "every", "named"),
    [("descriptors", 30, True), ("threads", 30, True), ("shared", 30, True), ("memory", 60_000, True)]
    + [("memory", 6_000, False), ("descriptors", 0, False)],
)
def test_growth_is_named(name: str, every: int, named: bool) -> None:
    """300 moments: a count that is one more every 30 of them, and memory that grows by 6 MB a hundred or a tenth."""
    if name == "memory":
        series = [replace(STEADY, memory=STEADY.memory + moment * every) for moment in range(300)]
    else:
        series = [replace(STEADY, **{name: 40 + (moment // every if every else 0)}) for moment in range(300)]
    found = grown(series)
    assert [line.split(":")[0] for line in found] == ([name] if named else [])


def test_noise_is_no_growth() -> None:
    """A file that is open at some moments, and warm-up in the first third."""
    series = [replace(STEADY, descriptors=40 + moment % 2, threads=4 if moment < 80 else 12) for moment in range(300)]
    assert grown(series) == []
