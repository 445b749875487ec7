"""The file system as checkpoints use it: every change passes here, so that tests can cut, fail and record each."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from lgp_dist.files import flush


class Disk:
    """Changes that survive a loss of power once they return. All raise OSError, or SafetensorError for tensors."""

    def make(self, folder: Path) -> None:
        """Makes a folder and those above it."""
        folder.mkdir(parents=True, exist_ok=True)

    def write_tensors(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        """A new safetensors file."""
        save_file(dict(tensors), path)
        path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors makes it unreadable for others
        flush(path)

    def write_text(self, path: Path, text: str) -> None:
        """A new text file."""
        path.write_text(text)
        flush(path)

    def rename(self, old: Path, new: Path) -> None:
        """Gives a folder another name on the same file system, at once or not at all."""
        flush(old)
        os.rename(old, new)
        flush(new.parent)

    def remove(self, folder: Path) -> None:
        """Removes a folder and what it holds."""
        shutil.rmtree(folder)
