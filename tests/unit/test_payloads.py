"""Hostile checkpoints: nothing in them runs, nothing outside is read or written, and a sentence refuses them.

Most are signed: sizes and hashes fit, as those of a checkpoint from a stranger would.
"""

import hashlib
import io
import json
import os
import pickle  # noqa: TID251  to make what is refused
import shutil
import signal
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_helpers import Toy, equal
from run_helpers import Lgp, snapshot
from safetensors.torch import save

from lgp_dist.engine.checkpoints.manifest import read_manifest
from lgp_dist.engine.checkpoints.tensor_slices import consolidate
from lgp_dist.errors import UserError

PART = "rank-00000.safetensors"
MARK = "executed"
"""What a payload makes in the current folder once it runs."""


class Payload:
    """Runs when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (MARK,)


def _saved(write: Callable[[io.BytesIO], None]) -> bytes:
    buffer = io.BytesIO()
    write(buffer)
    return buffer.getvalue()


def _zip(name: str, content: bytes) -> bytes:
    return _saved(lambda buffer: zipfile.ZipFile(buffer, "w").writestr(name, content))


def _tar(buffer: io.BytesIO) -> None:
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        member = tarfile.TarInfo("../../" + MARK)
        member.type = tarfile.DIRTYPE
        tar.addfile(member)


OBJECTS = np.array([Payload()], dtype=object)
SCRIPT = f"import os; os.mkdir({MARK!r})\n".encode()
CONTENTS: dict[str, bytes] = {
    **{f"pickle {protocol}": pickle.dumps(Payload(), protocol) for protocol in (0, 2, 5)},
    "torch.save": _saved(lambda buffer: torch.save(Payload(), buffer)),
    "torch.save, old": _saved(lambda buffer: torch.save(Payload(), buffer, _use_new_zipfile_serialization=False)),
    "npy": _saved(lambda buffer: np.save(buffer, OBJECTS, allow_pickle=True)),
    "npz": _saved(lambda buffer: np.savez(buffer, OBJECTS)),
    "python": SCRIPT,
    "shell": f"#!/bin/sh\nmkdir {MARK}\n".encode(),
    "zip with __main__": _zip("__main__.py", SCRIPT),
    "tar": _saved(_tar),
    "safetensors behind a pickle": pickle.dumps(Payload()) + save({"weight/0.weight@0": torch.zeros(12)}),
    "header of 2^60 bytes": (1 << 60).to_bytes(8, "little") + b"{}",
    "tensors of strange names": save({"__reduce__": torch.zeros(12)}),
    "start below 0": save({"weight/0.weight@-1": torch.zeros(13)}),
    "start that is code": save({f"weight/0.weight@os.mkdir({MARK!r})": torch.zeros(13)}),
    "no dimensions": save({"weight/0.weight@0": torch.tensor(1.0)}),
    "two dimensions": save({"weight/0.weight@0": torch.zeros(4, 3)}),
}
"""In place of a rank's part."""

DEEP = 200_000
MANIFESTS: dict[str, bytes] = {
    "pickle": pickle.dumps(Payload()),
    "torch.save": CONTENTS["torch.save"],
    "yaml apply": f"!!python/object/apply:os.mkdir [{MARK}]\n".encode(),
    "yaml new": f"state: !!python/object/new:os.mkdir ['{MARK}']\n".encode(),
    "python": SCRIPT,
    "expression": f"__import__('os').mkdir('{MARK}')".encode(),
    "jsonpickle": json.dumps({"py/reduce": [{"py/function": "os.mkdir"}, {"py/tuple": [MARK]}]}).encode(),
    "deep lists": b"[" * DEEP + b"]" * DEEP,
    "deep objects": b'{"a":' * DEEP + b"1" + b"}" * DEEP,
    "deep and cut": b"[" * DEEP,
    "number of a million digits": b'{"sha256": ' + b"9" * 1_000_000 + b"}",
    "utf-16": '{"sha256": ""}'.encode("utf-16"),
    "entities": b'<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/passwd">]><x>&a;</x>',
    "nulls": bytes(4096),
}
"""In place of a manifest."""

NAMES = [
    *("../../outside/secret", "/etc/passwd", f"../step-00000001/{PART}", f"./{PART}", f"x/../{PART}", "..", ".", ""),
    *("~/.bashrc", "file:///etc/passwd", PART + "\0.pt", "rank-00000.pt", "RANK-00000.SAFETENSORS", PART + " "),
    *("rank-00001.safetensors", "rank-0.safetensors", "manifest.json", "$(mkdir executed)", "pipe:mkdir executed"),
]
"""Of the one file that a manifest names."""

Edit = Callable[[dict[str, Any]], Any]
VALUES: dict[str, Edit] = {
    "files is a list": lambda content: content.update(files=[PART]),
    "files is empty": lambda content: content.update(files={}),
    "more files than ranks": lambda content: content["files"].update(
        {"rank-00001.safetensors": content["files"][PART]}
    ),
    "state is a list": lambda content: content.update(state=[1]),
    "state without step": lambda content: content["state"].pop("step"),
    "step is code": lambda content: content["state"].update(step=f"__import__('os').mkdir('{MARK}')"),
    "step below 0": lambda content: content["state"].update(step=-1),
    "stage is an object": lambda content: content["state"].update(stage={"py/object": "os.mkdir"}),
    "config is text": lambda content: content["state"].update(config="!!python/name:os.mkdir"),
    "shapes of an exabyte": lambda content: content["shapes"].update({"0.weight": [1 << 30, 1 << 28]}),
    "shapes are text": lambda content: content["shapes"].update({"0.weight": ["a", "b"]}),
    "steps are objects": lambda content: content["steps"].update({"0.weight": {}}),
    "bytes is a list": lambda content: content["files"][PART].update(bytes=[]),
    "format is code": lambda content: content.update(format=f"__import__('os').mkdir('{MARK}')"),
}
"""What else a manifest may say."""


@pytest.fixture
def newest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The newer of two checkpoints in `run`; the current folder is another, and 30 s must do."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_bytes(b"not to be touched")
    toy = Toy(tmp_path / "run" / "s")
    for step in (1, 2):
        toy.train(step)
        toy.save(step)

    def late(number: int, frame: object) -> None:
        raise TimeoutError("a checkpoint is being read for 30 s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(30)
    yield tmp_path / "run" / "s" / "step-00000002"
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def sign(folder: Path, edit: Edit = lambda content: None) -> None:
    """Changes a manifest and makes hashes fit."""
    content = json.loads((folder / "manifest.json").read_text())
    del content["sha256"]
    part = (folder / PART).read_bytes()
    content["files"][PART] = {"bytes": len(part), "sha256": hashlib.sha256(part).hexdigest()}
    edit(content)
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps({**content, "sha256": digest}))


def refuse(folder: Path, lgp: Lgp) -> None:
    """All who read a checkpoint refuse it with a sentence, run nothing and change nothing but what they set aside."""
    root = folder.parents[2]
    before = snapshot(root, without=("run",))
    toy = Toy(folder.parent)
    with pytest.raises(UserError):
        toy.restore(str(folder))
    with pytest.raises(UserError):
        consolidate(read_manifest(folder))
    result = lgp("checkpoint", "consolidate", folder, "--out", "whole.safetensors")
    assert "step-00000002" in result.sentence
    for command in ("verify", "show"):
        assert "Traceback" not in lgp("checkpoint", command, folder).err
    assert not (root / MARK).exists() and snapshot(root, without=("run",)) == before


def test_payload_runs_where_pickle_is_read(newest: Path) -> None:
    """What the others rest on: the mark comes once somebody unpickles, and signing alone is no reason to refuse."""
    sign(newest)
    assert Toy(newest.parent).restore(str(newest)) == 2
    for name in ("pickle 0", "pickle 5"):
        pickle.loads(CONTENTS[name])  # noqa: S301
        Path(MARK).rmdir()
    torch.load(io.BytesIO(CONTENTS["torch.save"]), weights_only=False)
    assert Path(MARK).is_dir()


@pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])
@pytest.mark.parametrize("kind", CONTENTS)
def test_part(newest: Path, lgp: Lgp, kind: str, signed: bool) -> None:
    (newest / PART).write_bytes(CONTENTS[kind])
    if signed:
        sign(newest)
    refuse(newest, lgp)


@pytest.mark.parametrize("kind", MANIFESTS)
def test_manifest(newest: Path, lgp: Lgp, kind: str) -> None:
    (newest / "manifest.json").write_bytes(MANIFESTS[kind])
    refuse(newest, lgp)
    assert Toy(newest.parent).restore() == 1, "the one before is taken"


@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_name_that_leaves_the_folder(newest: Path, lgp: Lgp, name: str) -> None:
    def rename(content: dict[str, Any]) -> None:
        content["files"] = {name: content["files"][PART]}

    sign(newest, rename)
    refuse(newest, lgp)
    with pytest.raises(UserError, match="names the file .* has rank-00000.safetensors to rank-00000.safetensors alone"):
        read_manifest(newest)


@pytest.mark.parametrize("kind", VALUES)
def test_value(newest: Path, lgp: Lgp, kind: str) -> None:
    sign(newest, VALUES[kind])
    refuse(newest, lgp)


@pytest.mark.parametrize("name", [PART, "manifest.json"])
@pytest.mark.parametrize("kind", ["link", "link within", "zeros", "fifo", "loop", "folder"])
def test_no_plain_file(newest: Path, lgp: Lgp, kind: str, name: str) -> None:
    """A link is refused although what it leads to has the right bytes."""
    path, other = newest / name, newest.parents[2] / "outside" / name
    shutil.copy(path, other)
    shutil.copy(path, newest / "other")
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to({"link": other, "link within": "other", "zeros": "/dev/zero", "loop": name}[kind])
    refuse(newest, lgp)


@pytest.mark.parametrize(
    "name", ["optimizer.pt", "random_states_0.pkl", "zero_to_fp32.py", "__init__.py", "sitecustomize.py", "latest"]
)
def test_what_lies_beside_is_not_read(newest: Path, lgp: Lgp, name: str) -> None:
    saved = Toy(newest.parent)
    saved.restore()
    content = SCRIPT if name.endswith(".py") else b"../../outside" if name == "latest" else CONTENTS["torch.save"]
    for folder in (newest, newest.parent):
        (folder / name).write_bytes(content)
    toy = Toy(newest.parent)
    assert toy.restore() == 2 and equal(toy.values(), saved.values())
    assert lgp("checkpoint", "consolidate", newest, "--out", "whole.safetensors").status == 0
    assert not Path(MARK).exists()
