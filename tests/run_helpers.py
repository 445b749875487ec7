"""What the tests of commands share: settings of a small run, `lgp` in this process, snapshots, damage."""

import contextlib
import hashlib
import json
import logging
import re
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lgp_dist.data.shards.index import ShardIndex
from lgp_dist.data.shards.manifest import ShardManifest
from lgp_dist.run.run_status import RunStatus

SAMPLE = Path(__file__).parents[1] / "shards" / "sample"
LOG_LINE = re.compile(r"\d\d:\d\d:\d\d ")
PLAIN = (
    "--finetune.no-sandwich",
    "--finetune.train.accumulate=1",
    "--finetune.row-lr",
    "--pool.stitch-init=transformation",
    "--model.rows.0.start=random",
    "--model.rows.1.start=random",
)
"""A path a step on every rank, one learning rate, random rows, stitches from distillation: not what `tiny` chooses."""
SMALL = (
    "tiny",
    *PLAIN,
    "--data.root=shards",
    "--ancestry.weights=ancestry.safetensors",
    "--run-dir=run",
    "--engine.threads=1",
    "--evaluate.no-before",
    "--export.images=4",
    "--export.formats",
    *(f"--{stage}.train.{setting}" for stage in ("distil", "finetune") for setting in ("max-steps=2", "batch-size=8")),
)
"""`tiny` on what the fixture `place` holds: each stage takes about a second."""

LIMIT_S = 1200.0
"""Longest wait for what must come. It is long, since a busy machine may need minutes; an idle one does not wait."""
GONE_S = 120.0
"""Longest wait for the end of what has to end by itself: processes whose launcher has ended, and what they held."""

ABOUT = ("config.json", "environment.json", "log.txt", "outcome.json", "heartbeats", "tracking")
"""Files and folders about the latest command; tests/unit/test_artifacts.py says what may become of them."""


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


def write_shard(source: Path, target: Path, samples: int) -> None:
    """The first samples of a shard of one PNG and one .cls each."""
    with tarfile.open(source) as tar, tarfile.open(target, "w", format=tarfile.USTAR_FORMAT) as small:
        for member in tar.getmembers()[: 2 * samples]:
            small.addfile(member, tar.extractfile(member))


def write_ancestry(target: Path, seed: int = 0) -> None:
    """An untrained ancestry of the recipe tiny."""
    import torch

    from lgp_dist.models.build import ancestry_vit
    from lgp_dist.recipes import tiny
    from lgp_dist.run.tensors import save_tensors

    torch.manual_seed(seed)
    save_tensors(target, ancestry_vit(tiny()).state_dict())


def snapshot(folder: Path, without: tuple[str, ...] = ()) -> dict[str, str]:
    """Every path below a folder with the hash of its bytes ("" for folders); empty where there is none.

    without: names of files and folders to leave out.
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if not set(name.parts) & set(without):
            found[name.as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
    return found


def refused(lgp: Lgp, stage: str, *arguments: str, run: str = "run", begun: bool = False) -> str:
    """The sentence of a stage that must fail and leave the run directory as it was.

    begun: training had begun, so that the run's metrics may have more than before.
    """
    without = (*ABOUT, "metrics.jsonl") if begun else ABOUT
    before = snapshot(Path(run), without)
    sentence = lgp(stage, *SMALL, *arguments).sentence
    assert snapshot(Path(run), without) == before
    return sentence


def has(sentence: str, *pieces: str) -> None:
    """The sentence names all of these."""
    assert all(piece in sentence for piece in pieces), sentence


def overwrite(path: Path, offset: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


def index_of(split: str) -> ShardIndex:
    """The index of the shards in the current folder."""
    return ShardIndex.load(ShardManifest.load("shards"), split, 10)


def break_images(split: str, samples: list[int]) -> None:
    """Overwrites images of the current folder's shards with bytes that are no image."""
    index = index_of(split)
    for sample in samples:
        shard = index.root / index.shards[index.shard[sample]]
        overwrite(shard, int(index.offset[sample]), b"x" * int(index.size[sample]))


def outcome_of(run: Path) -> RunStatus:
    """How the latest start of a run ended, by its outcome.json."""
    return RunStatus(**json.loads((run / "outcome.json").read_text()))


def eventually(condition: Callable[[], bool], what: str, limit_s: float = LIMIT_S) -> None:
    """Waits until the condition holds; fails, and says what did not come, after a time that no machine needs."""
    until = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < until, f"{what}: not within {limit_s:.0f} s"
        time.sleep(0.01)


@contextlib.contextmanager
def shared_memory_goes() -> Iterator[None]:
    """What the block leaves in /dev/shm is held by a process, as that of another test's run, or goes."""
    from footprint import SHARED, left_behind  # from tests/distributed, which not every user of this file can import

    before = set(SHARED.iterdir())
    yield
    left = left_behind(before)
    eventually(lambda: not left & left_behind(before), "shared memory that nobody holds goes", GONE_S)


def gone(mark: str) -> None:
    """Waits until no process with a mark in its environment is left."""
    eventually(lambda: not processes_with(mark), "the end of all that was started", GONE_S)


def processes_with(mark: str) -> list[int]:
    """Processes whose environment holds a mark."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue
    return found
