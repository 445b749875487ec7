"""`lgp checkpoint verify|show|consolidate PATH`."""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro

from lgp_dist.errors import UserError
from lgp_dist.files import replacing


@dataclass(frozen=True)
class VerifyCheckpoint:
    """Compare every byte of checkpoints with their manifests; status 2 at the first file that differs."""

    path: Annotated[Path, tyro.conf.Positional]
    """A checkpoint (step-...), or a folder with some in it."""


@dataclass(frozen=True)
class ShowCheckpoint:
    """Print stage, step, ranks and score of checkpoints."""

    path: Annotated[Path, tyro.conf.Positional]
    """A checkpoint (step-...), or a folder with some in it."""
    json: bool = False
    """Print a list of objects."""


@dataclass(frozen=True)
class Consolidate:
    """Write the weights of all ranks as one safetensors file, for --finetune.weights."""

    path: Annotated[Path, tyro.conf.Positional]
    """A checkpoint (step-...)."""
    out: Path
    """File to write; must not exist."""


CHECKPOINT = {"verify": VerifyCheckpoint, "show": ShowCheckpoint, "consolidate": Consolidate}
"""Action -> its arguments."""


def run_checkpoint(action: VerifyCheckpoint | ShowCheckpoint | Consolidate) -> None:
    """Does what the arguments ask for."""
    from lgp_dist.engine.checkpoints.manifest import read_manifest

    if isinstance(action, Consolidate):
        _consolidate(action)
        return
    manifests = [read_manifest(folder) for folder in _folders(action.path)]
    if isinstance(action, VerifyCheckpoint):
        for manifest in manifests:
            manifest.check_files()
            size = sum(size for size, _ in manifest.files.values())
            sys.stdout.write(f"{manifest.folder}: whole, {len(manifest.files)} file(s), {size} bytes\n")
    elif action.json:
        rows = [{**asdict(manifest.state), "path": str(manifest.folder)} for manifest in manifests]
        sys.stdout.write(json.dumps(rows, indent=2) + "\n")
    else:
        for manifest in manifests:
            state = manifest.state
            score = "" if state.score is None else f", mean top-1 {state.score:.2f} %"
            sys.stdout.write(
                f"{manifest.folder}: stage {state.stage}, step {state.step} of {state.steps}, written {state.created} "
                f"by {state.world} rank(s) of {state.engine}, position {state.data.get('position')}{score}\n"
            )


def _folders(path: Path) -> list[Path]:
    """The checkpoint itself, or those that lie in a folder, oldest first."""
    if path.name.startswith("step-"):
        return [path]
    found = sorted(path.rglob("step-*")) if path.is_dir() else []
    found = [folder for folder in found if not any(part.startswith(".") for part in folder.relative_to(path).parts)]
    if not found:
        raise UserError(f"{path} holds no checkpoint: name a step-... folder, or one with some in it.")
    return found


def _consolidate(action: Consolidate) -> None:
    from safetensors import SafetensorError

    from lgp_dist.engine.checkpoints.disk import Disk  # torch, as above
    from lgp_dist.engine.checkpoints.manifest import read_manifest
    from lgp_dist.engine.checkpoints.tensor_slices import consolidate

    if action.out.exists():
        raise UserError(f"--out {action.out} is there already: choose another file.")
    weights = consolidate(read_manifest(action.path))
    try:
        with replacing(action.out) as partial:
            Disk().write_tensors(partial, weights)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"--out {action.out} cannot be written ({error}): choose a file in a folder that can."
        ) from None
    sys.stdout.write(f"{action.out}: {sum(tensor.numel() for tensor in weights.values())} parameters\n")
