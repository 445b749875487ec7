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

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from lgp_dist.errors import UserError

MANIFEST = "manifest.json"
FORMAT = 1
"""Of folder, manifest and names of tensors; another is refused."""


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
    """ddp, zero0 .. zero3."""
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

    def check_file(self, name: str) -> None:
        """Reads one file; UserError where it is missing, cut or changed."""
        size, digest = self.files[name]
        path = self.folder / name
        try:
            found = path.stat().st_size
            if found == size:
                with path.open("rb") as file:
                    content = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}): {ADVICE}.") from error
        if found != size:
            raise UserError(f"{path} has {found} bytes, but its manifest says {size}: {ADVICE}.")
        if content != digest:
            raise UserError(f"{path} is damaged: its sha256 is {content}, not {digest}: {ADVICE}.")


ADVICE = "resume from another checkpoint, or copy this one again from where it is whole"


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint; UserError where it is missing, damaged or of another format."""
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_text())
        given = content.pop("sha256")
        version = content["format"]
    except OSError as error:
        raise UserError(f"{folder} is not a checkpoint: {MANIFEST} cannot be read ({error.strerror}).") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged (it is no manifest of a checkpoint): {ADVICE}.") from error
    if version != FORMAT and given == _digest(content):
        raise UserError(f"{path} has format {version!r}, this version reads {FORMAT}: resume with the one it is of.")
    if given != _digest(content):
        raise UserError(f"{path} is damaged: its sha256 is {_digest(content)}, not {given}: {ADVICE}.")
    names = {item.name for item in fields(TrainState)}
    return Manifest(
        folder=folder,
        state=TrainState(**{name: value for name, value in content["state"].items() if name in names}),
        shapes={name: tuple(shape) for name, shape in content["shapes"].items()},
        steps=content["steps"],
        files={name: (entry["bytes"], entry["sha256"]) for name, entry in content["files"].items()},
        digest=given,
    )


def rank_file(rank: int) -> str:
    """The name of a rank's part."""
    return f"rank-{rank:05d}.safetensors"


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
