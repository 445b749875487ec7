"""One file from a remote root to a path: in bounded time, resumed where it broke off, checked before it is used."""

import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from lgp_dist.data.remote.transfer import Missing, Remote, Start, TransferError, cut, stall
from lgp_dist.errors import UserError
from lgp_dist.files import sha256

log = logging.getLogger("lgp")

FLOOR = 64 * 2**10
"""Bytes that must come within each timeout; a transfer that is slower counts as stalled."""
HEAD = 256
"""Bytes that are looked at before any are written."""
WAIT_S = 30.0
"""Longest wait between two tries, seconds."""
WEB_PAGE = (b"<!doctype html", b"<html")


@dataclass(frozen=True)
class RetryPolicy:
    """How long a transfer may take to fail: at most (retries + 1) * timeout_s and the waits between."""

    timeout_s: float = 60.0
    """Seconds in which at least FLOOR bytes, or the rest of the file, must come."""
    retries: int = 5
    """Further tries after one that failed; a try that came FLOOR bytes further begins the count anew."""
    backoff_s: float = 1.0
    """Wait before the second try, seconds; it doubles each time."""

    def wait(self, failures: int) -> float:
        """Seconds to wait after so many failures, a little different for each process."""
        return min(WAIT_S, self.backoff_s * 2 ** min(failures - 1, 16)) * (1 + os.getpid() % 16 / 32)


@dataclass(frozen=True)
class FileSpec:
    """What is fetched, and how to know that it is right."""

    name: str
    """Path below the root, with forward slashes."""
    size: int | None = None
    """Bytes, where the manifest has them."""
    sha256: str = ""
    """Hash, where the manifest has it."""


def fetch(remote: Remote, wanted: FileSpec, part: Path, patience: RetryPolicy) -> int:
    """Makes `part` the whole file and returns how many bytes came for it.

    A file of known size goes on from what `part` already holds. Raises UserError with the URL, what happened and what
    to do; `part` then holds what may be continued, or is gone. FileNotFoundError never: see `fetch_optional`.
    """
    moved, failures, furthest, resumed = 0, 0, 0, False
    while True:
        have = _usable(part, wanted)
        resumed = resumed or have > 0
        came: list[int] = []
        try:
            if have != wanted.size or not have:
                _attempt(remote, wanted, part, have, patience.timeout_s, came)
            _check(wanted, part, resumed)
            return moved + sum(came)
        except TransferError as trouble:
            moved += sum(came)
            if trouble.spoiled:
                part.unlink(missing_ok=True)
                resumed = False
            reached = _size(part)
            if reached >= furthest + FLOOR:
                furthest, failures = reached, 0
            failures += 1
            sentence = f"{remote.url(wanted.name)} {trouble}"
            if isinstance(trouble, Missing):
                raise _NotThere(f"{sentence}: {trouble.todo}.") from trouble
            if trouble.final or failures > patience.retries:
                tries = "" if trouble.final or failures == 1 else f", after {failures} tries"
                raise UserError(f"{sentence}{tries}: {trouble.todo}.") from trouble
            log.warning("%s, try %d of %d follows", sentence, failures + 1, patience.retries + 1)
            time.sleep(patience.wait(failures))


class _NotThere(UserError):
    """The UserError of a file that does not exist."""


def fetch_optional(remote: Remote, wanted: FileSpec, part: Path, patience: RetryPolicy) -> int | None:
    """As `fetch`; None where there is no such file."""
    try:
        return fetch(remote, wanted, part, patience)
    except _NotThere:
        return None


def _usable(part: Path, wanted: FileSpec) -> int:
    """Bytes of `part` to go on from; removes it where there can be none."""
    have = _size(part)
    if have and (wanted.size is None or have > wanted.size):
        part.unlink()
        have = 0
    return have


def _size(path: Path) -> int:
    """Bytes of a file, 0 where there is none."""
    return path.stat().st_size if path.exists() else 0


def _attempt(remote: Remote, wanted: FileSpec, part: Path, have: int, timeout_s: float, came: list[int]) -> None:
    """One transfer to its end; raises TransferError. came: gets the size of everything that came."""
    with _Pump(lambda: remote.chunks(wanted.name, have)) as pump:
        items = _in_time(pump, timeout_s)
        start = next(items)
        assert isinstance(start, Start)
        _judge(wanted, start)
        head = b""
        for item in items:
            head += item  # type: ignore[operator]  # only the first item is a Start
            if len(head) >= HEAD:
                break
        came.append(len(head))
        if start.offset == 0 and head.lstrip()[:16].lower().startswith(WEB_PAGE):
            raise _web_page()
        try:
            with open(part, "r+b" if start.offset else "wb") as file:
                file.seek(start.offset)
                file.write(head)
                for item in items:
                    came.append(file.write(item))  # type: ignore[arg-type]
                    if wanted.size is not None and file.tell() > wanted.size:
                        break
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(
                f"The cache {part.parent} cannot be written to ({error.strerror}): free space, set data.cache to"
                " another folder, or lower data.cache_bytes."
            ) from error
    total = wanted.size if wanted.size is not None else start.total
    if total is not None and _size(part) < total:
        raise cut()


def _judge(wanted: FileSpec, start: Start) -> None:
    """Raises TransferError where the answer cannot be the file by its headers; the bytes may still be cut off."""
    if wanted.size is not None and start.total is not None and start.total != wanted.size:
        raise _web_page() if start.web_page else _other_size(start.total, wanted.size)


def _web_page() -> TransferError:
    return TransferError("is a web page, not the file", "set data.root to the folder that holds the files", final=True)


def _other_size(found: int | str, wanted: int) -> TransferError:
    return TransferError(
        f"has {found} bytes but the manifest wants {wanted}",
        "upload it again, or the manifest that belongs to it",
        final=True,
        spoiled=True,
    )


def _check(wanted: FileSpec, part: Path, resumed: bool) -> None:
    """Raises TransferError unless the file is the one that is wanted."""
    size = _size(part)
    if wanted.size is not None and size != wanted.size:
        part.unlink(missing_ok=True)
        raise _other_size("more" if size > wanted.size else size, wanted.size)
    if wanted.sha256 and sha256(part) != wanted.sha256:
        raise TransferError(
            "has another sha256 than the manifest",
            "upload it again, or the manifest that belongs to it",
            final=not resumed,  # what an earlier try or process left may be of another file
            spoiled=True,
        )


class _End:
    """The transfer is complete."""


Item = Start | bytes


class _Pump:
    """Runs a transfer in a thread of its own, so that a library that never returns cannot hold up its caller."""

    def __init__(self, source: Callable[[], Iterator[Item]]) -> None:
        self._source = source
        self._items: queue.Queue[Item | _End | Exception] = queue.Queue(maxsize=4)
        self._stop = threading.Event()

    def __enter__(self) -> "_Pump":
        threading.Thread(target=self._run, name="lgp-transfer", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        self._stop.set()

    def get(self, seconds: float) -> Item | _End | Exception:
        """The next item; raises queue.Empty if none comes in time."""
        return self._items.get(timeout=max(seconds, 0.001))

    def _run(self) -> None:
        try:
            for item in self._source():
                if not self._put(item):
                    return
            self._put(_End())
        except Exception as error:
            self._put(error)

    def _put(self, item: Item | _End | Exception) -> bool:
        """False if nobody wants any more."""
        while not self._stop.is_set():
            try:
                self._items.put(item, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False


def _in_time(pump: _Pump, timeout_s: float) -> Iterator[Item]:
    """The items; raises TransferError once fewer than FLOOR bytes have come in timeout_s, unless that was the end."""
    deadline, came = time.monotonic() + timeout_s, 0
    while True:
        try:
            item = pump.get(deadline - time.monotonic())
        except queue.Empty:
            raise stall() from None
        if isinstance(item, _End):
            return
        if isinstance(item, Exception):
            raise item
        yield item
        came += len(item) if isinstance(item, bytes) else 0
        if came >= FLOOR:
            deadline, came = time.monotonic() + timeout_s, 0
        elif time.monotonic() > deadline:
            raise stall()
