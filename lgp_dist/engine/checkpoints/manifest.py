"""What a checkpoint is: a folder with the files of all ranks, and a manifest that is written after them.

    RUN/checkpoints/STAGE/
      step-00000500/
        manifest.json           the state of the run at this step, and size and sha256 of every other file
        rank-00000.safetensors  this rank's slices of weights and optimizer state, named KIND/PARAMETER@START, fp32
        ...
      .step-00001000.partial/   being written; removed at the next start
      .aside/                   damaged checkpoints, and those of an attempt that was abandoned

A folder gets its name after all ranks have written, read back and hashed their files, so a checkpoint is complete or
absent. There is no pointer to the latest checkpoint: it is the complete one with the highest step.
"""

import errno
import hashlib
import json
import stat
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from lgp_dist.config.flat import changed_keys
from lgp_dist.config.ranges import check_types
from lgp_dist.config.run_config import RunConfig
from lgp_dist.errors import UserError, nearest
from lgp_dist.files import sha256

T = TypeVar("T")

MANIFEST = "manifest.json"
FORMAT = 1
"""Of folder, manifest and tensor names; another is refused."""
LARGEST = 1 << 28
"""Bytes of a manifest that is read."""
ADVICE = "resume from another checkpoint, or copy this one again from a complete copy"
PASSING = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EINTR, errno.EREMOTEIO}
"""Errors of storage, which say nothing about a file."""
TRIES, PAUSE_S = 3, 0.5
"""Attempts to read from such storage, and the seconds between them."""
SHOWN = 8
"""Settings that a message names."""
RESUME = ("auto", "latest", "never")
"""What --resume takes next to the folder of a checkpoint."""


@dataclass(frozen=True)
class TrainState:
    """All that a run needs to resume, besides weights and optimizer state."""

    stage: str
    """Of the pipeline."""
    step: int
    """Optimizer steps done."""
    steps: int
    """Optimizer steps of the whole run. The learning rate depends on both."""
    seed: int
    """The recipe's. Paths, order, augmentation and stochastic depth depend on it and on the step alone."""
    data: Mapping[str, Any]
    """State of the training stream: position, fingerprint, bad samples of each epoch."""
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
    """State of the step filter."""
    score: float | None = None
    """Mean top-1 of all paths at this step, if it was measured. The best checkpoint of a run is kept."""
    best: float | None = None
    """The highest score so far."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Of Python, this package and its libraries."""
    created: str = ""
    """UTC, for people."""


def check_settings(was: TrainState, now: TrainState, allow: tuple[str, ...]) -> None:
    """Raises UserError if settings differ that are not allowed to, and names them."""
    refused = [key for key in changed_keys(was.config, now.config) if key not in allow]
    if not refused:
        return
    shown = "; ".join(f"{key} was {was.config.get(key)!r}, now {now.config.get(key)!r}" for key in refused[:SHOWN])
    more = f"; and {len(refused) - SHOWN} more" if len(refused) > SHOWN else ""
    raise UserError(
        f"The checkpoint of step {was.step} of stage {was.stage} was made with other settings ({shown}{more}): set "
        f"them as before, name them with --allow-change {' '.join(refused[:SHOWN])}, or take --resume never."
    )


@dataclass(frozen=True)
class Manifest:
    """A checkpoint's state and what its files must be."""

    folder: Path
    state: TrainState
    shapes: Mapping[str, tuple[int, ...]]
    """Of every trained parameter."""
    steps: Mapping[str, float]
    """How often the optimizer has updated each parameter."""
    files: Mapping[str, tuple[int, str]]
    """Bytes and sha256 of every rank's file."""
    digest: str = ""
    """sha256 of all of the above."""

    def text(self) -> str:
        """Returns the manifest as the content of a file."""
        content = {
            "format": FORMAT,
            "state": asdict(self.state),
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "steps": dict(self.steps),
            "files": {name: {"bytes": size, "sha256": digest} for name, (size, digest) in self.files.items()},
        }
        return json.dumps({**content, "sha256": _digest(content)}, indent=1) + "\n"

    def check_sizes(self) -> None:
        """Raises UserError naming the first file that is missing or truncated. Reads no content."""
        for name, (size, _) in self.files.items():
            if (found := self._read(name, _size)) != size:
                raise UserError(f"{self.folder / name} has {found} bytes, but its manifest says {size}: {ADVICE}.")

    def check_files(self) -> None:
        """Raises UserError naming the first file that is missing, truncated or changed."""
        self.check_sizes()
        for name, (_, digest) in self.files.items():
            if (found := self._read(name, sha256)) != digest:
                raise UserError(f"{self.folder / name} is damaged: its sha256 is {found}, not {digest}: {ADVICE}.")

    def _read(self, name: str, read: Callable[[Path], T]) -> T:
        try:
            return _reading(self.folder / name, read)
        except OSError as error:
            raise UserError(f"{self.folder / name} cannot be read ({error.strerror}): {ADVICE}.") from error


class Unreadable(UserError):
    """Storage fails repeatedly. The checkpoint itself may be complete."""


def _reading(path: Path, read: Callable[[Path], T]) -> T:
    """Returns what `read` returns, and tries again if storage fails: Unreadable after TRIES times. Raises OSError."""
    tries = 0
    while True:
        try:
            return read(path)
        except OSError as error:
            tries += 1
            if error.errno not in PASSING:
                raise
            if tries == TRIES:
                raise Unreadable(
                    f"{path} cannot be read ({error.strerror}, {TRIES} times): the storage fails, so nothing was set "
                    "aside; start again when it works."
                ) from error
        time.sleep(PAUSE_S)


def read_manifest(folder: Path) -> Manifest:
    """Returns a checkpoint's manifest. Raises UserError if it is missing, damaged or of another format."""
    path = folder / MANIFEST
    try:
        content = json.loads(_reading(path, _text))
        given, found = content.pop("sha256"), _digest(content)
        version = content["format"]
        manifest = _parsed(folder, content, found) if (given, version) == (found, FORMAT) else None
    except Unreadable:  # a ValueError too
        raise
    except OSError as error:
        raise UserError(f"{folder} is not a checkpoint: {MANIFEST} cannot be read ({error.strerror}).") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged (it is not a checkpoint's manifest): {ADVICE}.") from error
    if given != found:
        raise UserError(f"{path} is damaged: its sha256 is {found}, not {given}: {ADVICE}.")
    if manifest is None:
        raise UserError(
            f"{path} has format {version!r}, this version reads {FORMAT}: resume with the version it is of."
        )
    legal = {rank_file(rank) for rank in range(len(manifest.files))}
    for name in sorted(manifest.files.keys() - legal):
        raise UserError(
            f"{path} names the file {name!r}, but a checkpoint of {len(legal)} file(s) has {rank_file(0)} to "
            f"{rank_file(len(legal) - 1)} alone: {ADVICE}."
        )
    return manifest


def _parsed(folder: Path, content: Mapping[str, Any], digest: str) -> Manifest:
    """A manifest whose values have their types; otherwise ValueError, TypeError, KeyError or AttributeError."""
    names = {item.name for item in fields(TrainState)}
    state = TrainState(**{name: value for name, value in content["state"].items() if name in names})
    check_types(state)
    files = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in content["files"].items()}
    if state.step < 0 or state.world != len(files):
        raise ValueError(f"step {state.step}, {state.world} ranks, {len(files)} files")
    shapes = {name: tuple(map(int, shape)) for name, shape in content["shapes"].items()}
    steps = {name: float(count) for name, count in content["steps"].items()}
    return Manifest(folder, state, shapes, steps, files, digest)


def _text(path: Path) -> str:
    if _size(path) > LARGEST:
        raise ValueError(f"more than {LARGEST} bytes")
    return path.read_text()


def _size(path: Path) -> int:
    """Bytes of a plain file; OSError for anything else, such as a link, which may lead anywhere."""
    found = path.lstat()
    if not stat.S_ISREG(found.st_mode):
        raise OSError(0, "it is no plain file")
    return found.st_size


def rank_file(rank: int) -> str:
    """Returns the name of a rank's file."""
    return f"rank-{rank:05d}.safetensors"


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def check_resume(config: RunConfig) -> None:
    """UserError where --resume names neither a checkpoint nor auto, latest or never."""
    given, folder = config.resume, Path(config.directory)
    if given in RESUME:
        return
    if not (Path(given) / MANIFEST).is_file():
        there = [str(path) for path in sorted(folder.glob("checkpoints/*/step-*"))]
        known = f"; {folder} has {', '.join(there)}" if there else f"; {folder} has no checkpoint"
        advice = nearest(given, [*RESUME, *there], "name the folder of a checkpoint, such as step-00000500")
        raise UserError(
            f"--resume is {given!r}, but there is no checkpoint (a folder with {MANIFEST}) of that name{known}. Take "
            f"{', '.join(RESUME)} or a checkpoint: {advice}."
        )
    read_manifest(Path(given))
