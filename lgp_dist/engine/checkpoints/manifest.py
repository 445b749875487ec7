"""What a checkpoint is: a folder with the parts of all ranks and a manifest that was written after them.

    RUN/checkpoints/STAGE/
      step-00000500/
        manifest.json           what the run was at this step, and size and sha256 of every other file
        rank-00000.safetensors  this rank's part: KIND/PARAMETER@START for weights and optimizer state, fp32
        ...
      .step-00001000.partial/   being written; removed at the next start
      .aside/                   damaged checkpoints, and those of an attempt that was given up

A folder gets its name after all ranks have written, read back and hashed their parts, so a checkpoint is complete or
absent. There is no pointer to the latest: it is the one with the highest step that is whole.
"""

import errno
import hashlib
import itertools
import json
import stat
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from lgp_dist.errors import UserError
from lgp_dist.files import sha256

MANIFEST = "manifest.json"
FORMAT = 1
"""Of folder, manifest and names of tensors; another is refused."""
LARGEST = 1 << 28
"""Bytes of a manifest that is read."""


@dataclass(frozen=True)
class TrainState:
    """All that a run needs to go on, beside weights and optimizer state."""

    stage: str
    """Of the pipeline."""
    step: int
    """Optimizer steps done."""
    steps: int
    """Optimizer steps of the whole run; the schedule is a function of both."""
    seed: int
    """The recipe's; paths, order, augmentation and stochastic depth are functions of it and the step."""
    data: Mapping[str, Any]
    """Where the training stream stands: position, fingerprint, bad samples of each epoch."""
    config: Mapping[str, Any]
    """Settings and sources that the stage depends on, by dotted key."""
    world: int
    """Ranks that wrote it."""
    engine: str
    """`Launch.engine_name`: zero0 .. zero3, ddp or one."""
    loss_scale: float | None = None
    """fp16's."""
    good_steps: int = 0
    """Steps since fp16's scale last changed."""
    guard: Mapping[str, Any] = field(default_factory=dict)
    """What the judge of bad steps remembers."""
    score: float | None = None
    """Mean top-1 of all paths at this step, where it was measured; the best of a run is kept."""
    best: float | None = None
    """The highest score so far."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Of Python, this package and what it computes with."""
    created: str = ""
    """UTC, for people."""


@dataclass(frozen=True)
class Manifest:
    """A checkpoint's state and what its files must be."""

    folder: Path
    state: TrainState
    shapes: Mapping[str, tuple[int, ...]]
    """Of every trained parameter."""
    steps: Mapping[str, float]
    """Updates that the optimizer has made of each parameter."""
    files: Mapping[str, tuple[int, str]]
    """Bytes and sha256 of every rank's file."""
    digest: str = ""
    """sha256 over all of the above."""

    def text(self) -> str:
        """The manifest as a file."""
        content = {
            "format": FORMAT,
            "state": asdict(self.state),
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "steps": dict(self.steps),
            "files": {name: {"bytes": size, "sha256": digest} for name, (size, digest) in self.files.items()},
        }
        return json.dumps({**content, "sha256": _digest(content)}, indent=1) + "\n"

    def check_files(self) -> None:
        """Reads every file; UserError naming the first that is missing, cut or changed."""
        for name in self.files:
            self.check_file(name)

    def check_sizes(self) -> None:
        """Reads no file; UserError naming the first that is missing or cut."""
        for name in self.files:
            self._check_size(name)

    def _check_size(self, name: str) -> None:
        path, size = self.folder / name, self.files[name][0]
        found = _of_part(path, _size)
        if found != size:
            raise UserError(f"{path} has {found} bytes, but its manifest says {size}: {ADVICE}.")

    def check_file(self, name: str) -> None:
        """Reads one file; UserError where it is missing, cut or changed."""
        self._check_size(name)
        path, digest = self.folder / name, self.files[name][1]
        content = _of_part(path, sha256)
        if content != digest:
            raise UserError(f"{path} is damaged: its sha256 is {content}, not {digest}: {ADVICE}.")


ADVICE = "resume from another checkpoint, or copy this one again from where it is whole"
PASSING = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EINTR, errno.EREMOTEIO}
"""Errors of storage that say nothing about a file."""
TRIES, PAUSE_S = 3, 0.5


class Unreadable(UserError):
    """Storage fails, again and again: what lies there may be whole."""


def _reading(path: Path, read: Callable[[Path], Any]) -> Any:
    """What `read` gives, tried again where storage fails: Unreadable if it does TRIES times. Other OSErrors pass."""
    for attempt in itertools.count(1):
        try:
            return read(path)
        except OSError as error:
            if error.errno not in PASSING:
                raise
            if attempt == TRIES:
                raise Unreadable(
                    f"{path} cannot be read ({error.strerror}, {TRIES} times): the storage fails, so nothing was set "
                    "aside; start again when it works."
                ) from error
        time.sleep(PAUSE_S)


def _of_part(path: Path, read: Callable[[Path], Any]) -> Any:
    try:
        return _reading(path, read)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): {ADVICE}.") from error


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint; UserError where it is missing, damaged or of another format."""
    path = folder / MANIFEST
    try:
        content = json.loads(_reading(path, _text))
        given, found = content.pop("sha256"), _digest(content)
        version = content["format"]
        manifest = _parsed(folder, content, found) if (given, version) == (found, FORMAT) else None
    except Unreadable:
        raise
    except OSError as error:
        raise UserError(f"{folder} is not a checkpoint: {MANIFEST} cannot be read ({error.strerror}).") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged (it is no manifest of a checkpoint): {ADVICE}.") from error
    if given != found:
        raise UserError(f"{path} is damaged: its sha256 is {found}, not {given}: {ADVICE}.")
    if manifest is None:
        raise UserError(f"{path} has format {version!r}, this version reads {FORMAT}: resume with the one it is of.")
    legal = {rank_file(rank) for rank in range(len(manifest.files))}
    for name in sorted(manifest.files.keys() - legal):
        raise UserError(
            f"{path} names the file {name!r}, but a checkpoint of {len(legal)} file(s) has {rank_file(0)} to "
            f"{rank_file(len(legal) - 1)} alone: {ADVICE}."
        )
    return manifest


def _parsed(folder: Path, content: Mapping[str, Any], digest: str) -> Manifest:
    """A manifest whose values are of their types; TypeError, ValueError, KeyError or AttributeError if not."""
    names = {item.name for item in fields(TrainState)}
    state = TrainState(**{name: value for name, value in content["state"].items() if name in names})
    for kind, values in (
        (int, (state.step, state.steps, state.seed, state.world)),
        (str, (state.stage, state.engine)),
        (dict, (state.data, state.config, state.guard, state.versions)),
    ):
        if not all(isinstance(value, kind) for value in values):
            raise TypeError(f"{values} are not all of type {kind.__name__}")
    files = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in content["files"].items()}
    if state.step < 0 or state.world != len(files):
        raise ValueError(f"step {state.step}, {state.world} ranks, {len(files)} files")
    return Manifest(
        folder=folder,
        state=state,
        shapes={name: tuple(map(int, shape)) for name, shape in content["shapes"].items()},
        steps={name: float(count) for name, count in content["steps"].items()},
        files=files,
        digest=digest,
    )


def _text(path: Path) -> str:
    if _size(path) > LARGEST:
        raise ValueError(f"more than {LARGEST} bytes")
    return path.read_text()


def _size(path: Path) -> int:
    """Bytes of a file; OSError where it is none, or a link, which may lead anywhere."""
    found = path.lstat()
    if not stat.S_ISREG(found.st_mode):
        raise OSError(0, "it is no plain file")
    return found.st_size


def rank_file(rank: int) -> str:
    """The name of a rank's part."""
    return f"rank-{rank:05d}.safetensors"


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
