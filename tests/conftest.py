"""Fixtures that several tests share: a small data set, an untrained ancestry, a finished run, `lgp` in this process."""

import atexit
import contextlib
import gc
import os
import shutil
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from run_helpers import SAMPLE, SMALL, Lgp, Result, call_main, gone, processes_with, write_ancestry, write_shard

from lgp_dist.data.shards.index import index_shards

os.environ["OMP_NUM_THREADS"] = "1"


def pytest_collection_finish() -> None:
    """Modules and tests are not searched for garbage in every test: a quarter of the time of some."""
    gc.freeze()
    atexit.register(gc.unfreeze)  # Triton's modules say what they leak otherwise


@pytest.fixture
def lgp(capfd: pytest.CaptureFixture[str]) -> Lgp:
    """Runs `lgp ARGUMENTS` in this process and gives what it printed."""

    def call(*arguments: Any) -> Result:
        capfd.readouterr()
        status = call_main(arguments)
        return Result(status, *capfd.readouterr())

    return call


@pytest.fixture
def mark() -> Iterator[str]:
    """A mark in the environment of what a test starts; nothing with it may be left."""
    found = uuid.uuid4().hex
    yield found
    try:
        gone(found)
    finally:
        for pid in processes_with(found):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `shards` (64 training and 32 test images) and `ancestry.safetensors`. Not to be changed."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "shards").mkdir()
    for name, samples in (("fashion-mnist-train-0000.tar", 64), ("fashion-mnist-test-00.tar", 32)):
        write_shard(SAMPLE / name, folder / "shards" / name, samples)
    index_shards(folder / "shards", progress=lambda line: None)
    write_ancestry(folder / "ancestry.safetensors")
    return folder


@pytest.fixture(scope="session")
def finished(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder `inputs` with a complete run of all stages in `run`. Not to be changed."""
    folder = tmp_path_factory.mktemp("finished") / "place"
    shutil.copytree(inputs, folder)
    with contextlib.chdir(folder):
        assert call_main(("run", *SMALL)) == 0
    return folder


@pytest.fixture
def place(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of `inputs` as the current folder."""
    yield from _copy(inputs, tmp_path, monkeypatch)


@pytest.fixture
def finished_place(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of `finished` as the current folder."""
    yield from _copy(finished, tmp_path, monkeypatch)


def _copy(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "place"
    shutil.copytree(source, folder)
    monkeypatch.chdir(folder)
    yield folder
    monkeypatch.undo()
    shutil.rmtree(folder)
