"""Fixtures that several tests share: a small data set, an untrained ancestry, a finished run, `lgp` in this process."""

import contextlib
import hashlib
import logging
import os
import re
import shutil
import sys
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

os.environ["OMP_NUM_THREADS"] = "1"
SAMPLE = Path(__file__).parents[1] / "shards" / "sample"
LOG_LINE = re.compile(r"\d\d:\d\d:\d\d ")
SMALL = (
    "tiny",
    "--data.root=shards",
    "--ancestry.weights=ancestry.safetensors",
    "--run-dir=run",
    "--engine.threads=1",
    "--evaluate.no-before",
    "--export.images=4",
    *(f"--{stage}.train.{setting}" for stage in ("distil", "finetune") for setting in ("max-steps=2", "batch-size=8")),
)
"""`tiny` on what the fixture `place` holds: each stage takes about a second."""


@dataclass(frozen=True)
class Result:
    """What a command did."""

    status: int
    out: str
    err: str

    @property
    def sentence(self) -> str:
        """The one line that says what is wrong, without `lgp: `; all other lines of stderr must be the log's."""
        assert self.status == 2, self
        assert "Traceback" not in self.out + self.err
        lines = [line for line in self.err.splitlines() if not LOG_LINE.match(line)]
        assert len(lines) == 1 and self.err.endswith(lines[0] + "\n"), self.err
        assert lines[0].startswith("lgp: ") and lines[0].endswith("."), lines[0]
        return lines[0].removeprefix("lgp: ")


Lgp = Callable[..., Result]


def call_main(arguments: tuple[Any, ...]) -> int:
    """Runs `lgp ARGUMENTS` in this process (a new one needs 10 s to import torch and deepspeed); the exit status."""
    from lgp_dist.cli import main

    before, sys.argv = sys.argv, ["lgp", *map(str, arguments)]
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        sys.argv = before
        log = logging.getLogger("lgp")
        for handler in list(log.handlers):
            log.removeHandler(handler)
            handler.close()
    return 0


@pytest.fixture
def lgp(capfd: pytest.CaptureFixture[str]) -> Lgp:
    """Runs `lgp ARGUMENTS` in this process and gives what it printed."""

    def call(*arguments: Any) -> Result:
        capfd.readouterr()
        status = call_main(arguments)
        return Result(status, *capfd.readouterr())

    return call


def write_shard(source: Path, target: Path, samples: int) -> None:
    """The first samples of a shard of one PNG and one .cls each."""
    with tarfile.open(source) as tar, tarfile.open(target, "w", format=tarfile.USTAR_FORMAT) as small:
        for member in tar.getmembers()[: 2 * samples]:
            small.addfile(member, tar.extractfile(member))


def write_ancestry(target: Path) -> None:
    """An untrained ancestry of the recipe tiny."""
    import torch

    from lgp_dist.artifacts import save_tensors
    from lgp_dist.recipes import tiny
    from lgp_dist.stages.context import ancestry_vit

    torch.manual_seed(0)
    save_tensors(target, ancestry_vit(tiny()).state_dict())


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `shards` (64 training and 32 test images) and `ancestry.safetensors`. Not to be changed."""
    from lgp_dist.data.index import index_shards

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


def snapshot(folder: Path, without: tuple[str, ...] = ()) -> dict[str, str]:
    """Every path below a folder with the hash of its bytes ("folder" for folders); empty where there is none."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
        if path.name not in without
    }
