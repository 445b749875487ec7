"""Stages on shards of a web server: the same artifacts as from a folder, and one sentence for each failure."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_server import FaultServer, serve
from run_helpers import SMALL, Lgp, has, refused

from lgp_dist.config.run_config import DataConfig
from lgp_dist.data.remote.roots import RemoteRoot, open_root
from lgp_dist.data.shards.index import ShardIndex
from lgp_dist.data.shards.manifest import ShardManifest
from lgp_dist.data.stream import open_split
from lgp_dist.errors import UserError

pytestmark = pytest.mark.slow  # web servers that stall

TRAIN, TEST = "fashion-mnist-train-0000.tar", "fashion-mnist-test-00.tar"


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def server(tmp_path: Path, place: Path) -> Iterator[FaultServer]:
    """Serves the shards of the current folder, which are moved away from it."""
    shutil.move(place / "shards", tmp_path / "served")
    with serve(tmp_path / "served") as facts:
        yield facts


def options(server: FaultServer, fault: str) -> list[str]:
    stalls = fault.removeprefix("all-") in ("stall", "stall-first", "drip")
    timeout = f"--data.timeout-s={3 if stalls else 30}"
    return [f"--data.root={server.root(fault)}", "--data.cache=cache", timeout, "--data.retries=0"]


def data_of(server: FaultServer, fault: str) -> DataConfig:
    return DataConfig(
        root=server.root(fault), cache="cache", timeout_s=30.0, retries=0, num_classes=10, channels=1, val_split="test"
    )


@pytest.mark.parametrize("workers", [0, 1])
def test_stages_make_the_same_artifacts_as_from_a_folder(
    lgp: Lgp, server: FaultServer, finished: Path, workers: int
) -> None:
    for stage in ("ancestry", "distil"):
        result = lgp(stage, *SMALL, *options(server, "fine"), f"--data.threads={workers}")
        assert result.status == 0, result.err
        here, there = (
            json.loads((run / stage / "artifact.json").read_text()) for run in (Path("run"), finished / "run")
        )
        assert here["files"] == there["files"] and here["id"] == there["id"]
    assert server.count(TRAIN) == server.count(TEST) == 1, "the second stage finds them in the cache"
    assert len(list(Path("cache/shards").iterdir())) == 2
    assert lgp("distil", *SMALL, *options(server, "fine")).status == 0, "complete, skipped"


@pytest.mark.parametrize(
    ("fault", "piece"),
    [
        ("404", "does not exist (404)"),
        ("503", "answered with status 503"),
        ("cut", "was cut off"),
        ("stall", "stalled"),
        ("drip", "stalled"),
        ("shorter", "bytes but the manifest wants"),
        ("page", "is a web page"),
        ("flipped", "another sha256"),
    ],
)
def test_shard_that_cannot_be_had(lgp: Lgp, server: FaultServer, fault: str, piece: str) -> None:
    has(refused(lgp, "ancestry", *options(server, fault)), f"{server.root(fault)}/{TEST} ", piece)
    assert not [path for path in Path("cache/shards").iterdir() if path.suffix != ".part"]


@pytest.mark.parametrize(
    ("fault", "piece"),
    [("all-404", "(404)"), ("all-page", "web page"), ("all-stall-first", "stalled"), ("all-503", "status 503")],
)
def test_manifest_that_cannot_be_had(lgp: Lgp, server: FaultServer, fault: str, piece: str) -> None:
    has(refused(lgp, "ancestry", *options(server, fault)), f"{server.root(fault)}/manifest.json ", piece)
    assert not list(Path("cache/roots").iterdir())


def test_damaged_manifest(lgp: Lgp, server: FaultServer) -> None:
    (server.folder / "manifest.json").write_text('{"format": 1, "splits": [')
    has(refused(lgp, "ancestry", *options(server, "fine")), f"{server.root('fine')}/manifest.json cannot be read")


def test_root_that_would_run_a_command(lgp: Lgp, place: Path) -> None:
    has(refused(lgp, "ancestry", "--data.root=pipe:touch ran; cat shards"), "pipe:", "refused", "data.root")
    assert not Path("ran").exists()


@pytest.mark.parametrize(("key", "value"), [("cache_bytes", "0"), ("timeout_s", "0"), ("retries", "-1")])
def test_setting_out_of_range(lgp: Lgp, place: Path, key: str, value: str) -> None:
    has(refused(lgp, "ancestry", f"--data.{key.replace('_', '-')}={value}"), f"data.{key}", value)


def test_index_that_is_missing_or_does_not_belong(server: FaultServer) -> None:
    """The next start fetches it again, whatever the cache holds."""
    index = server.folder / "index-train.npz"
    good = index.read_bytes()
    data = data_of(server, "fine")
    for bad in (None, good[:100], (server.folder / "index-test.npz").read_bytes()):
        if bad is None:
            index.unlink()
        else:
            index.write_bytes(bad)
        with pytest.raises(UserError, match=r"/fine/index-train\.npz is missing or does not belong.*lgp shards index"):
            open_split(data, "train")
    index.write_bytes(good)
    here = ShardIndex.load(ShardManifest.load(server.folder), "train", 10)
    assert open_split(data, "train").keys.tolist() == here.keys.tolist()
    (open_root(data).folder / "index-train.npz").write_bytes(good[:100])
    assert open_split(data, "train").keys.tolist() == here.keys.tolist(), "damaged in the cache, good at the root"
    assert server.count(TRAIN) == 0, "no shard is fetched before one of its samples is read"


def test_small_files_lie_in_one_folder(server: FaultServer) -> None:
    (server.folder / "_info.json").write_text('{"splits": {}}')
    root = open_root(data_of(server, "fine"))
    assert isinstance(root, RemoteRoot)
    assert (root.folder / "_info.json").read_bytes() == (server.folder / "_info.json").read_bytes()
    assert (root.folder / "manifest.json").read_bytes() == (server.folder / "manifest.json").read_bytes()
    assert not root.fetch_small("not_there.json")


def test_new_version_of_the_shards_is_another_folder(server: FaultServer) -> None:
    """Shards are stored by hash: only changed ones are fetched again, and nothing stale is read."""
    first = open_split(data_of(server, "fine"), "train")
    first.files.read(0, 0, 10)
    manifest = json.loads((server.folder / "manifest.json").read_text())
    (server.folder / "manifest.json").write_text(json.dumps({**manifest, "source": "elsewhere"}))
    second = open_split(data_of(server, "unsaid"), "train")
    second.files.read(0, 0, 10)
    assert first.root != second.root and server.count(TRAIN) == 1
