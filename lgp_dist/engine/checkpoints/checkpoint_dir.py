"""The checkpoints of one stage: which exist, which is resumed from, and which are kept."""

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

from lgp_dist.engine.checkpoints.disk import Disk
from lgp_dist.engine.checkpoints.manifest import MANIFEST, Manifest, Unreadable, read_manifest
from lgp_dist.errors import UserError

log = logging.getLogger("lgp")


@dataclass(frozen=True)
class CheckpointDir:
    """A folder of checkpoints. Only one process may change it at a time."""

    folder: Path
    disk: Disk = Disk()

    def final(self, step: int) -> Path:
        """Returns the folder of a step's checkpoint."""
        return self.folder / f"step-{step:08d}"

    def partial(self, step: int) -> Path:
        """Returns the folder in which that checkpoint is written."""
        return self.folder / f".step-{step:08d}.partial"

    def steps(self) -> list[int]:
        """Returns the steps that have a checkpoint under its final name, newest first.

        Raises UserError if the folder cannot be read.
        """
        try:
            names = [path.name for path in self.folder.iterdir()] if self.folder.exists() else []
        except OSError as error:
            raise UserError(f"{self.folder} cannot be read ({error.strerror}): make it a readable folder.") from error
        numbers = [name.removeprefix("step-") for name in names if name.startswith("step-")]
        return sorted((int(number) for number in numbers if number.isdecimal()), reverse=True)

    def find(self, resume: str, stage: str) -> Manifest | None:
        """Returns the newest complete checkpoint, or None to begin anew. Logs damaged newer ones. Changes nothing.

        resume: auto; latest, which requires a checkpoint of any stage of this run; never; or the path of a checkpoint,
        which applies to its own stage alone. Raises UserError if the requested one does not exist, or none is complete.
        """
        if resume not in ("auto", "latest", "never"):
            named = read_manifest(Path(resume))
            if named.state.stage == stage:
                named.check_files()
                return named
            resume = "auto"
        if resume == "never":
            return None
        damaged: list[str] = []
        for step in self.steps():
            try:
                manifest = read_manifest(self.final(step))
                manifest.check_files()
                return manifest
            except Unreadable:
                raise
            except UserError as error:
                damaged.append(str(error))
                log.warning("%s", error)
        if damaged:
            raise UserError(
                f"No checkpoint in {self.folder} is complete, though --resume never begins the stage again and sets "
                f"them aside. The newest: {damaged[0]}"
            )
        if resume == "latest" and not any(self.folder.parent.glob("*/step-*")):
            raise UserError(f"There is no checkpoint in {self.folder.parent}: take --resume auto to begin there.")
        return None

    def begin(self, step: int) -> None:
        """Prepares for a run that resumes from a step: sets newer checkpoints aside, removes unfinished ones."""
        for newer in self.steps():
            if newer > step:
                self.set_aside(self.final(newer))
        for path in self.folder.glob(".step-*") if self.folder.exists() else ():
            shutil.rmtree(path, ignore_errors=True)

    def set_aside(self, path: Path) -> None:
        """Moves a checkpoint out of the way, never over another."""
        shelter, number = self.folder / ".aside", 0
        while (target := shelter / (path.name + (f".{number}" if number else ""))).exists():
            number += 1
        self.disk.make(shelter)
        self.disk.rename(path, target)
        log.warning("%s was set aside as %s", path, target)

    def publish(self, step: int, manifest: Manifest) -> None:
        """Gives its manifest and final name to a checkpoint whose files are all written."""
        partial = self.partial(step)
        self.disk.write_text(partial / MANIFEST, manifest.text())
        read_manifest(partial)
        self.disk.rename(partial, self.final(step))

    def prune(self, keep: int) -> None:
        """Removes all complete checkpoints except the newest `keep` and the one with the best score.

        A checkpoint with a missing or truncated file is neither counted nor removed. A checkpoint loses its name before
        its files.
        """
        scores: dict[int, float | None] = {}
        for step in self.steps():
            try:
                manifest = read_manifest(self.final(step))
                manifest.check_sizes()
                scores[step] = manifest.state.score
            except UserError:
                continue
        kept = set(sorted(scores, reverse=True)[: max(keep, 1)])
        measured = [(score, step) for step, score in scores.items() if score is not None]
        if measured:
            kept.add(max(measured)[1])
        for step in scores.keys() - kept:
            trash = self.folder / f".step-{step:08d}.removed"
            self.disk.rename(self.final(step), trash)
            self.disk.remove(trash)
