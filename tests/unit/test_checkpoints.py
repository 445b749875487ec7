"""Checkpoints in one process: complete or absent at every moment, damage found and named, the right one taken."""

import json
import os
import random
import shutil
import signal
from pathlib import Path

import pytest
import torch
from checkpoint_helpers import FailingDisk, Toy, equal, state
from safetensors.torch import load_file

from lgp_dist.engine.checkpoints.checkpoint_dir import CheckpointDir
from lgp_dist.engine.checkpoints.manifest import check_settings, read_manifest
from lgp_dist.engine.checkpoints.tensor_slices import consolidate
from lgp_dist.errors import UserError


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, dict[int, dict[str, torch.Tensor]]]:
    """A folder with checkpoints of steps 1 and 2, and what was saved."""
    toy, saved = Toy(tmp_path / "run" / "s"), {}
    for step in (1, 2):
        toy.train(step)
        toy.save(step)
        saved[step] = toy.values()
    return tmp_path / "run" / "s", saved


def test_restores_bit_for_bit(two: tuple[Path, dict[int, dict[str, torch.Tensor]]]) -> None:
    folder, saved = two
    toy = Toy(folder)
    toy.train(7)
    assert toy.restore() == 2 and equal(toy.values(), saved[2])
    assert toy.restore(str(folder / "step-00000001")) == 1 and equal(toy.values(), saved[1])
    assert CheckpointDir(folder).steps() == [1], "what is newer than where the run goes on is set aside"
    assert (folder / ".aside" / "step-00000002").is_dir()


def test_consolidated_weights_are_the_modules(two: tuple[Path, dict[int, dict[str, torch.Tensor]]]) -> None:
    folder, saved = two
    weights = consolidate(read_manifest(folder / "step-00000002"))
    assert weights.keys() == {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert all(torch.equal(weights[name], saved[2][name]) for name in weights)


def _fork(call: object, *arguments: object) -> int:
    """Status of a child that calls; -9 where it was killed."""
    number = os.fork()
    if number == 0:
        status = 1
        try:
            call(*arguments)  # type: ignore[operator]
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])


class _KillingDisk(FailingDisk):
    """Kills its process at a call."""

    def _due(self, name: str) -> bool:
        return super()._due(name) and _kill()


def _kill() -> bool:
    os.kill(os.getpid(), signal.SIGKILL)
    return True


@pytest.mark.parametrize("kind", ["before", "torn"])
def test_killed_at_every_call_leaves_old_or_new(tmp_path: Path, kind: str) -> None:
    """Each change of the file system in a save and its pruning is a place to die: before it, or in the middle."""
    base = Toy(tmp_path / "base")
    for step in (1, 2):
        base.train(step)
        base.save(step)
    count, deaths, seen = FailingDisk(fail_at=0), 0, set()

    def save(disk: FailingDisk, folder: Path) -> None:
        toy = Toy(folder, disk, keep=2)
        toy.restore()
        toy.train(3)
        toy.save(3)

    shutil.copytree(tmp_path / "base", tmp_path / "clean")
    save(count, tmp_path / "clean")
    expected = {step: _values(tmp_path / "clean", tmp_path / "base", step) for step in (2, 3)}
    assert count.calls == ["make", "write_tensors", "write_text", "rename", "rename", "remove"]
    for at in range(1, len(count.calls) + 1):
        folder = tmp_path / f"{at}"
        shutil.copytree(tmp_path / "base", folder)
        if kind == "before":
            assert _fork(save, _KillingDisk(fail_at=at), folder) == -signal.SIGKILL
        else:
            assert _fork(_torn, save, at, folder) == -signal.SIGKILL
        deaths += 1
        toy = Toy(folder)
        step = toy.restore()
        assert step in expected and equal(toy.values(), expected[step]), f"killed at call {at}"
        assert not list(folder.glob(".step-*")), "what was unfinished is removed"
        toy.train(4)
        toy.save(4)
        assert Toy(folder).restore() == 4
        seen.add(step)
    assert deaths == 6 and seen == {2, 3}


def _torn(save: object, at: int, folder: Path) -> None:
    """Fails in the middle of a call and kills the process before anything can be put in order."""

    class Torn(FailingDisk):
        def _due(self, name: str) -> bool:
            if super()._due(name):
                if name == "remove":
                    next((folder / ".step-00000001.removed").iterdir()).unlink()
                if name in ("write_tensors", "write_text"):
                    return True
                _kill()
            return False

    disk = Torn(fail_at=at, error=_Death())
    save(disk, folder)  # type: ignore[operator]
    _kill()


class _Death(OSError):
    def __init__(self) -> None:
        super().__init__(5, "torn")

    def __str__(self) -> str:
        _kill()
        return ""


def _values(clean: Path, base: Path, step: int) -> dict[str, torch.Tensor]:
    toy = Toy(clean if step == 3 else base)
    toy.restore(str((clean if step == 3 else base) / f"step-{step:08d}"))
    return toy.values()


@pytest.mark.parametrize("at", range(1, 7))
@pytest.mark.parametrize("on_error", ["continue", "stop"])
def test_disk_that_fails_at_any_call_costs_at_most_the_new_checkpoint(tmp_path: Path, at: int, on_error: str) -> None:
    plain = Toy(tmp_path / "s")
    for step in (1, 2):
        plain.train(step)
        plain.save(step)
    disk = FailingDisk(fail_at=at)
    toy = Toy(tmp_path / "s", disk, on_error=on_error, keep=2)
    assert toy.restore() == 2
    toy.train(3)
    if on_error == "stop" and at <= 4:
        with pytest.raises(UserError, match=r"step 3 could not be written .* No space left .* bytes, \d+ are free"):
            toy.save(3)
    else:
        toy.save(3)
    assert Toy(tmp_path / "s").restore() == (2 if at <= 4 else 3)
    toy.train(4)
    toy.save(4)
    assert Toy(tmp_path / "s").restore() == 4, "the next save succeeds"


@pytest.mark.slow
def test_every_flipped_bit_is_found(two: tuple[Path, dict[int, dict[str, torch.Tensor]]]) -> None:
    """Over all files of a checkpoint; LGP_FLIPS sets how many."""
    folder, _ = two
    draw, files = random.Random(0), sorted((folder / "step-00000002").iterdir())
    sizes = [path.stat().st_size for path in files]
    for _ in range(int(os.environ.get("LGP_FLIPS", "1000"))):
        path = draw.choices(files, sizes)[0]
        content = bytearray(path.read_bytes())
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        whole = path.read_bytes()
        path.write_bytes(content)
        with pytest.raises(UserError, match="step-00000002"):
            read_manifest(folder / "step-00000002").check_files()
        path.write_bytes(whole)
    read_manifest(folder / "step-00000002").check_files()


DAMAGE = {
    "manifest gone": lambda place: (place / "manifest.json").unlink(),
    "manifest empty": lambda place: (place / "manifest.json").write_text(""),
    "manifest cut": lambda place: _cut(place / "manifest.json"),
    "manifest binary": lambda place: (place / "manifest.json").write_bytes(bytes(range(256))),
    "manifest of another step": lambda place: shutil.copy(place.parent / "step-00000001" / "manifest.json", place),
    "manifest edited": lambda place: _edit(place / "manifest.json"),
    "part gone": lambda place: (place / "rank-00000.safetensors").unlink(),
    "part empty": lambda place: (place / "rank-00000.safetensors").write_bytes(b""),
    "part cut": lambda place: _cut(place / "rank-00000.safetensors"),
    "part longer": lambda place: (place / "rank-00000.safetensors").open("ab").write(b"\0"),
    "part of another step": lambda place: shutil.copy(place.parent / "step-00000001" / "rank-00000.safetensors", place),
    "a folder in place of the part": lambda place: _folder(place / "rank-00000.safetensors"),
}


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _edit(path: Path) -> None:
    content = json.loads(path.read_text())
    content["state"]["step"] = 1
    path.write_text(json.dumps(content))


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_newest_is_named_and_the_one_before_taken(
    two: tuple[Path, dict[int, dict[str, torch.Tensor]]], kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder, saved = two
    DAMAGE[kind](folder / "step-00000002")
    toy = Toy(folder)
    with caplog.at_level("WARNING", logger="lgp"):
        assert toy.restore() == 1
    assert equal(toy.values(), saved[1])
    assert any("step-00000002" in record.message for record in caplog.records)
    assert (folder / ".aside" / "step-00000002").is_dir(), "set aside, not lost"
    (folder / "step-00000001" / "manifest.json").unlink()
    with pytest.raises(UserError, match="No checkpoint in .* is complete"):
        Toy(folder).restore()
    assert (folder / "step-00000001").is_dir(), "nothing is begun over it"


def test_never_a_silent_fresh_start(tmp_path: Path, two: tuple[Path, dict[int, dict[str, torch.Tensor]]]) -> None:
    folder, _ = two
    assert Toy(tmp_path / "new" / "s").restore() is None, "auto begins where there is nothing"
    refused = {
        "latest, nothing there": (tmp_path / "new" / "s", "latest", "There is no checkpoint in"),
        "path, nothing there": (folder, str(tmp_path / "none"), "is not a checkpoint"),
        "path of the folder": (folder, str(folder), "is not a checkpoint"),
        "path of a part": (folder, str(folder / "step-00000001" / "rank-00000.safetensors"), "is not a checkpoint"),
        "empty name": (folder, "", "is not a checkpoint"),
    }
    for place, resume, sentence in refused.values():
        with pytest.raises(UserError, match=sentence):
            Toy(place).restore(resume)
    (tmp_path / "file").mkdir()
    (tmp_path / "file" / "s").write_text("")
    with pytest.raises(UserError, match="cannot be read"):
        Toy(tmp_path / "file" / "s").restore()


def test_never_begins_and_loses_nothing(two: tuple[Path, dict[int, dict[str, torch.Tensor]]]) -> None:
    folder, _ = two
    assert Toy(folder).restore("never") is None
    assert sorted(path.name for path in (folder / ".aside").iterdir()) == ["step-00000001", "step-00000002"]


def test_path_counts_for_its_own_stage(tmp_path: Path, two: tuple[Path, dict[int, dict[str, torch.Tensor]]]) -> None:
    folder, _ = two
    toy = Toy(tmp_path / "run" / "t")
    assert toy.checkpointer.restore(str(folder / "step-00000001"), "t", lambda found: None) is None


def test_latest_is_derived(two: tuple[Path, dict[int, dict[str, torch.Tensor]]]) -> None:
    """Pointers, unfinished folders, strange names and newer incomplete ones change nothing."""
    folder, _ = two
    (folder / "latest").write_text("step-00000099")
    (folder / "step-notes").mkdir()
    (folder / ".step-00000009.partial").mkdir()
    assert Toy(folder).restore() == 2


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(int(os.environ.get("LGP_HISTORIES", "200"))))
def test_pruning_keeps_a_whole_checkpoint_in_any_history(tmp_path: Path, seed: int) -> None:
    """Random saves, some left unfinished, some that lose a part or have it cut: neither the newest whole ones nor the
    best of them are ever removed.

    LGP_HISTORIES sets how many histories.
    """
    draw = random.Random(seed)
    toy, keep = Toy(tmp_path / "s", keep=1000), draw.randint(1, 3)
    whole: dict[int, float | None] = {}
    for step in range(1, 12):
        score = draw.choice([None, draw.random()])
        what = draw.choice(["save", "save", "save", "torn", "incomplete", "lost", "cut"])
        if what in ("save", "lost", "cut"):
            toy.save(step, score=score)
            part = toy.checkpoint_dir.final(step) / "rank-00000.safetensors"
            if what == "lost":
                part.unlink()
            elif what == "cut":
                os.truncate(part, draw.randrange(part.stat().st_size))
            else:
                whole[step] = score
        elif what == "torn":
            toy.checkpoint_dir.partial(step).mkdir(parents=True)
        else:
            toy.checkpoint_dir.final(step).mkdir(parents=True)
        if draw.random() < 0.5:
            toy.checkpoint_dir.prune(keep)
            scored = {number: value for number, value in whole.items() if value is not None}
            best = [max(scored, key=lambda number: scored[number])] if scored else []
            whole = {number: whole[number] for number in {*sorted(whole)[-keep:], *best}}
        for number in whole:
            read_manifest(toy.checkpoint_dir.final(number)).check_files()
    found = {int(path.parent.name.removeprefix("step-")) for path in (tmp_path / "s").glob("step-*/manifest.json")}
    assert not whole or max(whole) in found
    assert found >= set(whole)


@pytest.mark.parametrize(
    ("now", "allow", "named"),
    [
        ({"a": 1, "b": 2}, (), None),
        ({"a": 1, "b": 3}, (), "b was 2, now 3"),
        ({"a": 1, "b": 3}, ("b",), None),
        ({"a": 0, "b": 3}, ("b",), "a was 1, now 0"),
        ({"a": 1}, (), "b was 2, now None"),
        ({"a": 1, "b": 2, "c": [1]}, (), r"c was None, now \[1\]"),
        ({"a": 1.0, "b": 2}, (), None),
    ],
)
def test_changed_settings(now: dict[str, object], allow: tuple[str, ...], named: str | None) -> None:
    was = state(3, config={"a": 1, "b": 2})
    if named is None:
        check_settings(was, state(0, config=now), allow)
        return
    with pytest.raises(UserError, match=named + ".*--allow-change"):
        check_settings(was, state(0, config=now), allow)


def test_refused_before_anything_changes(two: tuple[Path, dict[int, dict[str, torch.Tensor]]]) -> None:
    """A checkpoint of other settings or shapes leaves folder and weights as they are."""
    folder, _ = two
    toy = Toy(folder)
    toy.train(5)
    before, names = toy.values(), sorted(path.name for path in folder.iterdir())

    def refuse(found: object) -> None:
        raise UserError("other settings")

    with pytest.raises(UserError, match="other settings"):
        toy.restore(str(folder / "step-00000001"), refuse)
    toy.checkpointer.fragments.named.pop()
    with pytest.raises(UserError, match=r"1.bias as \[2\], and this recipe not at all"):
        toy.restore(str(folder / "step-00000001"))
    assert equal(before, toy.values()) and sorted(path.name for path in folder.iterdir()) == names


def test_files_hold_no_pickle(two: tuple[Path, dict[int, dict[str, torch.Tensor]]]) -> None:
    folder, _ = two
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    for path in files:
        assert json.loads(path.read_text()) if path.suffix == ".json" else load_file(path)
