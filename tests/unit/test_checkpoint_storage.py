"""Checkpoints on storage that is slow, full or fails, under clocks that are wrong, and of other formats."""

import errno
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from checkpoint_helpers import FailingDisk, Toy, equal
from safetensors.torch import load_file
from torch import Tensor

from lgp_dist.engine.checkpointer import RUNNING, WRITTEN
from lgp_dist.engine.checkpoints import manifest
from lgp_dist.engine.checkpoints.disk import Disk
from lgp_dist.engine.checkpoints.manifest import FORMAT, read_manifest
from lgp_dist.errors import UserError

FIXTURES = Path(__file__).parents[1] / "fixtures"
sys.path.insert(0, str(FIXTURES))
import make_checkpoint  # noqa: E402  next to its checkpoints


@dataclass(frozen=True)
class SlowDisk(Disk):
    """Writes tensors when it is told to."""

    go: threading.Event = field(default_factory=threading.Event)

    def write_tensors(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        assert self.go.wait(60)
        super().write_tensors(path, tensors)


def test_slow_storage_holds_up_nothing(tmp_path: Path) -> None:
    """Training goes on and changes the weights while a save waits for the disk; what is saved are those of its step."""
    disk = SlowDisk()
    toy = Toy(tmp_path / "s", disk)
    toy.train(1)
    toy.checkpointer.save(make_checkpoint.state(1))
    saved = toy.values()
    for step in range(2, 30):
        toy.train(step)
        assert toy.checkpointer.status == RUNNING
        toy.checkpointer.settle(RUNNING)
        assert not list((tmp_path / "s").glob("step-*")), "what is not whole has no name"
    disk.go.set()
    toy.checkpointer.wait()
    assert toy.checkpointer.status == WRITTEN and not equal(toy.values(), saved)
    again = Toy(tmp_path / "s")
    assert again.restore() == 1 and equal(again.values(), saved)


def test_next_save_waits_for_the_slow_one(tmp_path: Path) -> None:
    """Both are whole, in order: storage that is always slow bounds memory to one save."""
    disk = SlowDisk()
    toy, saved = Toy(tmp_path / "s", disk), {}
    threading.Timer(0.3, disk.go.set).start()
    for step in (1, 2):
        toy.train(step)
        saved[step] = toy.values()
        toy.checkpointer.save(make_checkpoint.state(step))
    assert toy.checkpoint_dir.steps() == [1], "the first was named before the second began"
    toy.checkpointer.wait()
    for step in (2, 1):
        again = Toy(tmp_path / "s")
        assert again.restore(str(toy.checkpoint_dir.final(step))) == step and equal(again.values(), saved[step])


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ETIMEDOUT])
@pytest.mark.parametrize("at", range(1, 7))
def test_failing_call_is_named_and_costs_one_checkpoint(
    tmp_path: Path, number: int, at: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Each change of the file system in a save fails in six ways: the one before stays, and the next save is whole."""
    toy = Toy(tmp_path / "s", keep=2)
    for step in (1, 2):
        toy.train(step)
        toy.save(step)
    failing = Toy(tmp_path / "s", FailingDisk(fail_at=at, error=OSError(number, os.strerror(number))), keep=2)
    assert failing.restore() == 2
    failing.train(3)
    failing.save(3)
    assert os.strerror(number) in caplog.text and str(tmp_path / "s") in caplog.text
    assert Toy(tmp_path / "s").restore() == (2 if at <= 4 else 3)
    failing.train(4)
    failing.save(4)
    assert Toy(tmp_path / "s").restore() == 4


def test_real_small_disk(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A file system with room for two checkpoints and a half: the third is not written, the two stay, training goes on.

    Once there is room again, so is the next.
    """
    if shutil.which("mount") is None:
        pytest.skip("there is no command mount")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount: {mounted.stderr.strip()}")
    try:
        toy = Toy(tmp_path / "s", keep=9)
        for step in (1, 2):
            toy.train(step)
            toy.save(step)
        saved, free = toy.values(), shutil.disk_usage(tmp_path).free
        (tmp_path / "filling").write_bytes(bytes(free - 4096))
        toy.train(3)
        toy.save(3)
        assert "step 3 could not be written" in caplog.text and "No space left" in caplog.text
        assert (
            "are free" in caplog.text
            and toy.checkpoint_dir.steps() == [2, 1]
            and not list((tmp_path / "s").glob(".step*"))
        )
        again = Toy(tmp_path / "s", keep=9)
        assert again.restore() == 2 and equal(again.values(), saved)
        (tmp_path / "filling").unlink()
        toy.train(4)
        toy.save(4)
        assert Toy(tmp_path / "s").restore() == 4
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.parametrize("seed", range(20))
def test_clocks_decide_nothing(tmp_path: Path, seed: int) -> None:
    """Times in manifests and of files are those of clocks a day off, and in any order: steps alone decide.

    100 saves in all; nothing but checkpoints is left.
    """
    draw, toy, values = random.Random(seed), Toy(tmp_path / "s", keep=2), {}
    for step in range(1, 6):
        toy.train(step)
        values[step] = toy.values()
        shift = draw.uniform(-86400, 86400)
        stamp = draw.choice(["", "tomorrow", "9999-12-31T23:59:59Z", str(shift)])
        toy.save(step, created=stamp, score=step / 10 if step == 1 else None)
        for path in (tmp_path / "s").rglob("*"):
            moved = time.time() + draw.uniform(-86400, 86400)
            os.utime(path, (moved, moved))
    again = Toy(tmp_path / "s")
    assert again.restore() == 5 and equal(again.values(), values[5])
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == [f"step-{n:08d}" for n in (1, 4, 5)]
    found = {path.name for path in (tmp_path / "s").rglob("*") if path.is_file()}
    assert found == {"manifest.json", "rank-00000.safetensors"}


def stored(checkpoint: Path, toy: Toy) -> dict[str, Tensor]:
    """What a checkpoint of two ranks holds, under the names of `Toy.values`; each rank has half of each tensor."""
    halves = [load_file(checkpoint / f"rank-0000{rank}.safetensors") for rank in range(make_checkpoint.WORLD)]
    flat = {name.split("@")[0]: value for name, value in halves[0].items()}
    for name, value in halves[1].items():
        flat[name.split("@")[0]] = torch.cat([flat[name.split("@")[0]], value])
    found = {}
    for index, (name, parameter) in enumerate(toy.module.named_parameters()):
        found[name] = flat[f"weight/{name}"].view_as(parameter)
        for kind in ("exp_avg", "exp_avg_sq"):
            found[f"{index}.{kind}"] = flat[f"{kind}/{name}"].view_as(parameter)
        found[f"{index}.step"] = torch.tensor(float(make_checkpoint.STEP))
    return found


@pytest.mark.parametrize("number", range(1, FORMAT + 1))
def test_every_format_loads(tmp_path: Path, number: int) -> None:
    """The kept checkpoint of each format, written by two ranks, read by one: what it holds, bit for bit. That is what
    training gives, within 1e-6: another instruction set rounds otherwise."""
    shutil.copytree(FIXTURES / f"format-{number}", tmp_path / "s")
    toy = Toy(tmp_path / "s")
    assert toy.restore() == make_checkpoint.STEP
    values = toy.values()
    assert equal(values, stored(FIXTURES / f"format-{number}" / f"step-{make_checkpoint.STEP:08d}", toy))
    for name, trained in make_checkpoint.trained(tmp_path / "other").values().items():
        torch.testing.assert_close(values[name], trained, rtol=1e-6, atol=1e-6)
    manifest = read_manifest(tmp_path / "s" / f"step-{make_checkpoint.STEP:08d}")
    assert manifest.state.world == make_checkpoint.WORLD and manifest.state.data["position"] == 12


@pytest.mark.parametrize("version", [0, FORMAT + 1, "1", None])
def test_unknown_format_is_refused(tmp_path: Path, version: object) -> None:
    shutil.copytree(FIXTURES / f"format-{FORMAT}", tmp_path / "s")
    path = next((tmp_path / "s").glob("*/manifest.json"))
    content = {**json.loads(path.read_text()), "format": version}
    del content["sha256"]
    content["sha256"] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"has format {version!r}, this version reads {FORMAT}"):
        Toy(tmp_path / "s").restore()
    assert path.is_file()


@pytest.mark.parametrize("read", ["sha256", "_text", "_size"])
@pytest.mark.parametrize("name", ["EIO", "ESTALE", "ETIMEDOUT"])
def test_storage_that_fails_for_a_moment_costs_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, read: str
) -> None:
    """Twice and the newest is loaded; for good and the run stops with a sentence, and every checkpoint stays."""
    toy = Toy(tmp_path / "s")
    for step in (1, 2):
        toy.train(step)
        toy.save(step)
    saved, left = toy.values(), [2]
    real = getattr(manifest, read)

    def failing(path: Path) -> object:
        left[0] -= 1
        if left[0] >= 0:
            raise OSError(getattr(errno, name), "storage")
        return real(path)

    monkeypatch.setattr(manifest, read, failing)
    monkeypatch.setattr(manifest, "PAUSE_S", 0.0)
    again = Toy(tmp_path / "s")
    assert again.restore() == 2 and equal(again.values(), saved)
    left[0] = 1000
    with pytest.raises(UserError, match="cannot be read .* 3 times.: the storage fails"):
        Toy(tmp_path / "s").restore()
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == ["step-00000001", "step-00000002"]
