"""The file system as checkpoints use it. Tests replace it to truncate, fail and record every change."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from lgp_dist.files import flush


class Disk:
    """Changes that survive a power cut once they return. All raise OSError, or SafetensorError for tensors."""

    def make(self, folder: Path) -> None:
        """Creates a folder and its parents."""
        folder.mkdir(parents=True, exist_ok=True)

    def write_tensors(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        """Writes a new safetensors file."""
        save_file(dict(tensors), path)
        path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors makes it unreadable for others
        flush(path)

    def write_text(self, path: Path, text: str) -> None:
        """Writes a new text file."""
        path.write_text(text)
        flush(path)

    def rename(self, old: Path, new: Path) -> None:
        """Renames a folder within its file system, completely or not at all."""
        flush(old)
        os.rename(old, new)
        flush(new.parent)

    def remove(self, folder: Path) -> None:
        """Removes a folder with its content."""
        shutil.rmtree(folder)
