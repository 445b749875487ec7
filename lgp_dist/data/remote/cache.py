"""Shards of a remote root in a folder of this node. One process fetches a shard for all, whole and checked.

    CACHE/shards/SHA256             a whole shard, named by the hash of its content: never half-written, never stale
    CACHE/shards/SHA256.BYTES.part  the bytes so far of a shard of BYTES bytes; the next try continues from there
    CACHE/locks/SHA256              empty; whoever fetches a shard holds its lock (flock: it ends with the process)
    CACHE/roots/NAME-VERSION/       manifest.json and indexes of a remote root, one folder per version of its manifest

All processes of a node share CACHE and its limit. A file's modification time is its last request; the least recently
requested shards are removed first. A shard that any process has open stays. Shards of the latest `prefetch` stay while
others can go; where only such are left, prefetching waits. A requested shard is always fetched, above the limit if
everything is in use.
"""

import contextlib
import fcntl
import logging
import os
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lgp_dist.data.remote.fetch import RetryPolicy, fetch
from lgp_dist.data.remote.transfer import Remote
from lgp_dist.data.shards.manifest import ShardEntry
from lgp_dist.errors import UserError

log = logging.getLogger("lgp")

ROOM_S = 0.5
"""Seconds until a prefetch that found no room looks again."""


class ShardCache:
    """Shards of one remote root as local files, for any number of threads and processes. Do not use it after a fork."""

    def __init__(
        self, remote: Remote, folder: Path, limit_bytes: int, shards: Iterable[ShardEntry], policy: RetryPolicy
    ) -> None:
        """folder: CACHE above; limit_bytes: of all shards in it; shards: the manifest's entries. UserError for a shard
        that is larger than the limit."""
        self.remote, self.folder, self.limit_bytes, self.policy = remote, folder, limit_bytes, policy
        self.hits = self.misses = self.bytes = 0
        """Shards that this process found here, shards it waited for, and bytes it fetched."""
        self._entries = {entry.name: entry for entry in shards}
        self._shards, self._locks = folder / "shards", folder / "locks"
        self._guard = threading.Lock()
        self._announced: list[str] = []
        self._warned = False
        for entry in self._entries.values():
            if entry.bytes > limit_bytes:
                raise UserError(
                    f"data.cache_bytes is {limit_bytes}, but shard {remote.url(entry.name)} has {entry.bytes} bytes:"
                    " set it to several times that."
                )
        make_folders(self._shards, self._locks)

    def path(self, name: str) -> Path:
        """The shard's file, whole; waits until it is here. UserError says why it cannot be.

        Another process may remove the file before it is opened: `open` has no such gap.
        """
        entry = self._entries[name]
        found = self._touch(entry)
        with self._guard:
            self.hits, self.misses = self.hits + found, self.misses + (not found)
        if not found:
            self._get(entry, prefetch=False)
        return self._file(entry)

    def open(self, name: str) -> int:
        """Handle to read the shard, which stays in the cache until the handle is closed. Waits as `path` does."""
        while True:
            try:
                handle = os.open(self.path(name), os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:  # removed since `path` saw it
                continue
            fcntl.flock(handle, fcntl.LOCK_SH)
            if os.fstat(handle).st_nlink:
                return handle
            os.close(handle)

    def counts(self) -> dict[str, int]:
        """Shards that were cached when they were opened, those that were waited for, and bytes that were fetched."""
        return {"cache_hits": self.hits, "cache_misses": self.misses, "cache_bytes": self.bytes}

    def prefetch(self, names: Sequence[str]) -> None:
        """Fetches these shards in this order in a background thread, and returns at once.

        Replaces an earlier call, whose thread ends after the shard that it fetches. Name the shards in use too, so that
        they stay. A failure is logged, and raised when the shard is requested.
        """
        self._announced = list(names)
        thread = threading.Thread(target=self._prefetch, args=(self._announced,), name="lgp-prefetch", daemon=True)
        thread.start()

    def _prefetch(self, names: list[str]) -> None:
        """Body of the thread: ends when all are here, or others are announced."""
        for name in names:
            while self._announced is names:
                try:
                    if self._get(self._entries[name], prefetch=True):
                        break
                except (UserError, OSError) as error:
                    log.warning("Prefetch: %s", error)
                    break
                time.sleep(ROOM_S)

    def _file(self, entry: ShardEntry) -> Path:
        return self._shards / entry.sha256

    def _touch(self, entry: ShardEntry) -> bool:
        """Whether the shard is here; notes that it is requested now."""
        path = self._file(entry)
        try:
            if path.stat().st_size != entry.bytes:
                return False
            with contextlib.suppress(PermissionError):  # another user's file is as good
                os.utime(path)
        except FileNotFoundError:
            return False
        return True

    def _get(self, entry: ShardEntry, *, prefetch: bool) -> bool:
        """Fetches the shard unless it is here; False where a prefetch finds no room."""
        if self._touch(entry):
            return True
        part = self._shards / f"{entry.sha256}.{entry.bytes}.part"
        with locked(self._locks / entry.sha256):
            if self._touch(entry):  # another process was faster
                return True
            if not self._make_room(entry, part, prefetch=prefetch):
                return False
            came = fetch(self.remote, entry.name, part, self.policy, entry.bytes, entry.sha256)
            os.replace(part, self._file(entry))
        with self._guard:
            self.bytes += came
        return True

    def _make_room(self, entry: ShardEntry, part: Path, *, prefetch: bool) -> bool:
        """Removes the least recently requested shards until this one fits; False where a prefetch must wait."""
        announced = {self._entries[name].sha256 for name in self._announced}
        with locked(self._locks / "room"):
            others = [file for file in _files_of(self._shards) if file.sha256 != entry.sha256]
            others.sort(key=lambda file: (file.sha256 in announced, file.requested))
            over = sum(file.bytes for file in others) + entry.bytes - self.limit_bytes
            for file in others:
                if over <= 0 or (prefetch and file.sha256 in announced):
                    break
                if _remove(file, self._locks):
                    over -= file.bytes
            if over > 0 and prefetch:
                return False
            part.touch()  # from now on, other processes count it
        if over > 0 and not self._warned:
            self._warned = True
            log.warning(
                "The shards in use need more than data.cache_bytes (%d): %s grows", self.limit_bytes, self.folder
            )
        return True


@dataclass(frozen=True)
class _CachedFile:
    """A file of CACHE/shards."""

    path: Path
    sha256: str
    bytes: int
    """Size, or that of the whole shard for a part."""
    requested: float
    """When it was last requested, seconds."""


def _files_of(folder: Path) -> Iterator[_CachedFile]:
    """All shards and parts."""
    for path in folder.iterdir():
        sha256, *rest = path.name.split(".")
        with contextlib.suppress(FileNotFoundError):
            facts = path.stat()
            whole = int(rest[0]) if len(rest) == 2 and rest[0].isdigit() else facts.st_size
            yield _CachedFile(path, sha256, whole, facts.st_mtime)


def _remove(file: _CachedFile, locks: Path) -> bool:
    """Removes a file unless a process reads or fetches it; whether it is gone."""
    is_part = file.path.suffix == ".part"
    guard, flags = (locks / file.sha256, os.O_RDWR | os.O_CREAT) if is_part else (file.path, os.O_RDONLY)
    try:
        handle = os.open(guard, flags | os.O_CLOEXEC, 0o666)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.path.unlink(missing_ok=True)
        return True
    except OSError:  # in use, or another user's
        return False
    finally:
        os.close(handle)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds a file's lock, which also ends with the process; UserError where it cannot be had."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise _not_writable(path.parent, error) from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            raise UserError(
                f"{path} cannot be locked ({error.strerror}): set data.cache to a folder on a disk of this node."
            ) from error
        yield
    finally:
        os.close(handle)


def make_folders(*folders: Path) -> None:
    """Makes folders of the cache; UserError where that fails."""
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _not_writable(folder, error) from error


def _not_writable(folder: Path, error: OSError) -> UserError:
    return UserError(
        f"The cache {folder} cannot be written to ({error.strerror}): free space, or set data.cache to another folder."
    )
