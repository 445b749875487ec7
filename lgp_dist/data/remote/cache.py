"""Shards of a remote root in a folder of this node: each is fetched whole, checked, by one process for all.

    CACHE/shards/SHA256            a whole shard, under the hash of its content: never half-written, never stale
    CACHE/shards/SHA256.BYTES.part what has come so far of a shard of BYTES bytes; the next try goes on from there
    CACHE/locks/SHA256             empty; who fetches a shard holds its lock (flock: it ends with the process)
    CACHE/roots/NAME-VERSION/      manifest.json and indexes of a remote root, a folder for each version of its manifest

What may be removed. All processes of a node share CACHE and its limit. A file's time of change says when a shard was
last asked for; the oldest go first. A shard that was opened with `open` and is still open, in any process, stays. What
`prefetch` announced last stays while others can go; if only such are left, prefetching waits. A shard that is asked for
is fetched in any case: if everything is in use, above the limit.
"""

import contextlib
import fcntl
import logging
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lgp_dist.data.remote.fetch import FileSpec, RetryPolicy, fetch
from lgp_dist.data.remote.transfer import Remote, local_path
from lgp_dist.data.shards.manifest import ShardEntry
from lgp_dist.errors import UserError

log = logging.getLogger("lgp")

ROOM_S = 0.5
"""How often a prefetch that found no room looks again, seconds."""


@dataclass
class _Process:
    """What belongs to one process: a forked one starts with none of it."""

    pid: int = field(default_factory=os.getpid)
    lock: threading.Lock = field(default_factory=threading.Lock)
    thread: threading.Thread | None = None
    announced: tuple[str, ...] = ()
    """What the latest prefetch named."""
    generation: int = 0
    """Counts announcements."""
    hits: int = 0
    misses: int = 0
    bytes: int = 0
    warned: bool = False


class ShardCache:
    """Shards of one root as local files, for any number of threads and processes.

    A local root's shards are given where they lie: nothing is copied, checked or removed. Counters are of this process:
    `hits` and `misses` count calls of `path` that found a shard here or had to wait for it, `bytes` what was fetched.
    """

    def __init__(
        self,
        root: str,
        folder: Path,
        limit_bytes: int,
        shards: Mapping[str, ShardEntry] | Sequence[ShardEntry] = (),
        patience: RetryPolicy | None = None,
    ) -> None:
        """folder: CACHE above; limit_bytes: of all shards in it; shards: the manifest's entries. Raises UserError for a
        root that is not read, or a shard that is larger than the limit."""
        entries = shards.values() if isinstance(shards, Mapping) else shards
        self.root, self.folder, self.limit_bytes = root, Path(folder), limit_bytes
        self.patience = patience or RetryPolicy()
        self._entries = {entry.name: entry for entry in entries}
        self._local = local_path(root)
        self._remote = Remote(root, self.patience.timeout_s)
        self._process = _Process()
        if self._local is not None:
            return
        for entry in self._entries.values():
            if entry.bytes > limit_bytes:
                raise UserError(
                    f"data.cache_bytes is {limit_bytes}, but shard {self._remote.url(entry.name)} has {entry.bytes}"
                    " bytes: set it to several times that."
                )
        make_folders(self._shards, self._locks)

    @property
    def hits(self) -> int:
        """Calls of `path` that found the shard here."""
        return self._mine.hits

    @property
    def misses(self) -> int:
        """Calls of `path` that had to wait for the shard."""
        return self._mine.misses

    @property
    def bytes(self) -> int:
        """Bytes that this process fetched."""
        return self._mine.bytes

    def path(self, name: str) -> Path:
        """The shard's file, whole; blocks until it is here. Raises UserError that says why it cannot be.

        Unless it is opened at once the file may be removed for others: `open` has no such gap.
        """
        if self._local is not None:
            return self._local / name
        entry, mine = self._entries[name], self._mine
        found = self._touch(entry)
        with mine.lock:
            mine.hits, mine.misses = mine.hits + found, mine.misses + (not found)
        if not found:
            self._get(entry, prefetch=False)
        return self._file(entry)

    def open(self, name: str) -> int:
        """Handle to read the shard; it is not removed from the cache until the handle is closed. Blocks as `path`."""
        while True:
            try:
                handle = os.open(self.path(name), os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                if self._local is not None:
                    raise
                continue  # removed since `path` saw it
            if self._local is not None:
                return handle
            fcntl.flock(handle, fcntl.LOCK_SH)
            if os.fstat(handle).st_nlink:
                return handle
            os.close(handle)

    def prefetch(self, names: Sequence[str]) -> None:
        """Fetches these shards in this order, in one background thread, and returns at once.

        Replaces what an earlier call named. Name also the shards in use, so that they are kept. Failures are logged;
        `path` meets them again and raises.
        """
        if self._local is not None:
            return
        mine, known = self._mine, {name: self._entries[name] for name in names}
        with mine.lock:
            mine.announced = tuple(known)
            mine.generation += 1
            if mine.announced and mine.thread is None:
                mine.thread = threading.Thread(target=self._prefetch, name="lgp-prefetch", daemon=True)
                mine.thread.start()

    def close(self) -> None:
        """Ends prefetching, after the shard that is under way."""
        self.prefetch(())

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_process": None}

    @property
    def _mine(self) -> _Process:
        """This process's part."""
        if self._process is None or self._process.pid != os.getpid():
            self._process = _Process()
        return self._process

    @property
    def _shards(self) -> Path:
        return self.folder / "shards"

    @property
    def _locks(self) -> Path:
        return self.folder / "locks"

    def _file(self, entry: ShardEntry) -> Path:
        return self._shards / entry.sha256

    def _part(self, entry: ShardEntry) -> Path:
        return self._shards / f"{entry.sha256}.{entry.bytes}.part"

    def _touch(self, entry: ShardEntry) -> bool:
        """Whether the shard is here; marks it as asked for now."""
        path = self._file(entry)
        try:
            if path.stat().st_size != entry.bytes:
                return False
            with contextlib.suppress(PermissionError):  # another person's file, which is as good
                os.utime(path)
        except FileNotFoundError:
            return False
        return True

    def _get(self, entry: ShardEntry, *, prefetch: bool) -> bool:
        """Makes the shard be here, unless another process is faster. False: a prefetch found no room."""
        with locked(self._locks / entry.sha256):
            if self._touch(entry):
                return True
            if not self._make_room(entry, prefetch=prefetch):
                return False
            wanted = FileSpec(entry.name, entry.bytes, entry.sha256)
            came = fetch(self._remote, wanted, self._part(entry), self.patience)
            os.replace(self._part(entry), self._file(entry))
        mine = self._mine
        with mine.lock:
            mine.bytes += came
        return True

    def _prefetch(self) -> None:
        """Body of the thread: works through the latest announcement, begins anew when there is another."""
        mine, generation, left = self._mine, -1, []
        no_room = threading.Event()
        while True:
            with mine.lock:
                if mine.generation != generation:
                    generation, left = mine.generation, list(mine.announced)
                if not left:
                    mine.thread = None
                    return
            entry = self._entries[left[0]]
            try:
                if self._touch(entry) or self._get(entry, prefetch=True):
                    left.pop(0)
                else:
                    no_room.wait(ROOM_S)
            except (UserError, OSError) as error:
                log.warning("Prefetch: %s", error)
                left.pop(0)

    def _make_room(self, entry: ShardEntry, *, prefetch: bool) -> bool:
        """Removes what was not asked for the longest until the shard fits; False if a prefetch must wait for room."""
        with locked(self._locks / "room"):
            files = sorted(_listed(self._shards), key=lambda file: file.asked)
            others = [file for file in files if file.sha256 != entry.sha256]
            over = sum(file.bytes for file in others) + entry.bytes - self.limit_bytes
            mine = self._mine
            announced = {self._entries[name].sha256 for name in mine.announced}
            late = [file for file in others if file.sha256 in announced]
            early = [file for file in others if file.sha256 not in announced]
            for file in early if prefetch else early + late:
                if over <= 0:
                    break
                if _remove(file, self._locks):
                    over -= file.bytes
            if over <= 0 or not prefetch:
                self._part(entry).touch()  # counts for others from now on
        if over > 0 and not prefetch and not mine.warned:
            mine.warned = True
            log.warning(
                "The shards in use need more than data.cache_bytes (%d): %s grows",
                self.limit_bytes,
                self.folder,
            )
        return over <= 0 or not prefetch


@dataclass(frozen=True)
class _Cached:
    """A file of CACHE/shards."""

    path: Path
    sha256: str
    bytes: int
    """What it takes, or will when it is whole."""
    asked: float
    """When it was last asked for, seconds."""


def _listed(folder: Path) -> Iterator[_Cached]:
    """All shards and parts."""
    for path in folder.iterdir():
        sha256, *rest = path.name.split(".")
        with contextlib.suppress(FileNotFoundError):
            facts = path.stat()
            whole = int(rest[0]) if len(rest) == 2 and rest[0].isdigit() else facts.st_size
            yield _Cached(path, sha256, whole, facts.st_mtime)


def _remove(file: _Cached, locks: Path) -> bool:
    """Removes a file unless somebody reads or fetches it; whether it is gone."""
    fetched = file.path.suffix == ".part"
    guard, flags = (locks / file.sha256, os.O_RDWR | os.O_CREAT) if fetched else (file.path, os.O_RDONLY)
    try:
        handle = os.open(guard, flags | os.O_CLOEXEC, 0o666)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.path.unlink(missing_ok=True)
        return True
    except OSError:  # in use, or another person's
        return False
    finally:
        os.close(handle)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds a file's lock; it ends with the process, however that ends. Raises UserError where it cannot be had."""
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
    """Makes folders of the cache; raises UserError where that cannot be."""
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _not_writable(folder, error) from error


def _not_writable(folder: Path, error: OSError) -> UserError:
    return UserError(
        f"The cache {folder} cannot be written to ({error.strerror}): free space, or set data.cache to another folder."
    )
