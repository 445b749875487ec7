"""Saves and resumes: every rank writes its slices while it trains, all agree, then the checkpoint gets its name.

    main thread                            writer thread
    save: copies the slices to memory -->  writes, flushes, reads back, compares, hashes
    at the end of each step: the highest   -> WRITTEN or FAILED
    status over ranks
    all WRITTEN: rank 0 gathers sizes and hashes, writes the manifest and renames the folder
    one FAILED: all ranks drop the save; the checkpoint before stays

Beyond the copy, a save in progress costs training one small all-reduce per step. A new save waits for the last one.
"""

import logging
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from lgp_dist.config.run_config import CheckpointConfig
from lgp_dist.engine.checkpoints.checkpoint_dir import CheckpointDir
from lgp_dist.engine.checkpoints.disk import Disk
from lgp_dist.engine.checkpoints.manifest import Manifest, TrainState, rank_file, read_manifest
from lgp_dist.engine.checkpoints.tensor_slices import TensorSlice, check_shapes, open_slices, same
from lgp_dist.engine.fragments import Fragments
from lgp_dist.engine.progress import progress
from lgp_dist.engine.workers import Workers
from lgp_dist.errors import UserError
from lgp_dist.files import sha256

log = logging.getLogger("lgp")

WRITTEN, RUNNING, FAILED = range(3)
"""Status of a save on one rank. The highest over ranks decides."""

LOOK_S = 0.01
"""Seconds between two looks at a save that is waited for."""


class _Save:
    """One checkpoint in progress: this rank's slices, and the thread that writes them."""

    def __init__(self, state: TrainState, steps: dict[str, float], slices: list[TensorSlice], path: Path, disk: Disk):
        self.state, self.steps, self.slices, self.path, self.disk = state, steps, slices, path, disk
        self.status, self.problem, self.bytes, self.digest = RUNNING, "", 0, ""
        self.thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        status = FAILED
        try:
            self.disk.make(self.path.parent)
            self.disk.write_tensors(self.path, {one.name: one.values for one in self.slices})
            if not same(self.path, self.slices):
                raise OSError("what was read back differs from what was written")
            self.bytes, self.digest, status = self.path.stat().st_size, sha256(self.path), WRITTEN
        except (OSError, SafetensorError) as error:
            self.problem = str(error)
        except BaseException as error:
            self.problem = repr(error)
            raise
        finally:
            self.status = status

    def written(self) -> int:
        """Bytes of the file so far."""
        return self.path.stat().st_size if self.path.is_file() else 0


class Checkpointer:
    """The checkpoints of one stage of one run. Every rank calls every method."""

    def __init__(self, checkpoint_dir: CheckpointDir, workers: Workers, fragments: Fragments, config: CheckpointConfig):
        self.checkpoint_dir, self.workers, self.fragments, self.config = checkpoint_dir, workers, fragments, config
        self._save: _Save | None = None
        self._buffers: dict[str, Tensor] = {}

    @property
    def busy(self) -> bool:
        """Whether a save is in progress, the same on every rank."""
        return self._save is not None

    @property
    def status(self) -> int:
        """Status of the save in progress on this rank."""
        return WRITTEN if self._save is None else self._save.status

    def save(self, state: TrainState) -> None:
        """Begins a checkpoint of the engine's present state, once the last save has ended."""
        self.wait()
        steps = self._all_steps()
        slices = [self._copy(one) for one in self.fragments.written()]
        path = self.checkpoint_dir.partial(state.step) / rank_file(self.workers.rank)
        self._save = _Save(state, steps, slices, path, self.checkpoint_dir.disk)

    def settle(self, worst: int) -> None:
        """Ends the save in progress, given the highest status over ranks: publishes or drops it, or lets it run."""
        if self._save is None or worst == RUNNING:
            return
        save, self._save = self._save, None
        if worst == WRITTEN:
            worst = self._publish(save)
        if worst == FAILED:
            self._drop(save)

    def wait(self) -> None:
        """Waits until no save is in progress on any rank; rank 0 shows how far it is with its file."""
        if self._save is None:
            return
        what, size = f"checkpoint: step {self._save.state.step}", sum(one.values.nbytes for one in self._save.slices)
        with progress(self.workers.is_main, what, size, "B") as at:
            while self._save is not None:
                self._save.thread.join(LOOK_S)
                at(min(size, self._save.written()))
                self.settle(int(self.workers.highest([self.status])[0]))

    def _copy(self, held: TensorSlice) -> TensorSlice:
        """A copy in host memory, in the buffer of the save before."""
        values = held.values
        if held.name not in self._buffers:
            self._buffers[held.name] = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
        return replace(held, values=self._buffers[held.name].copy_(values))

    def _all_steps(self) -> dict[str, float]:
        """Update counts of every parameter, whichever rank holds it."""
        mine, names = self.fragments.steps(), sorted(self.fragments.shapes)
        found = self.workers.highest([mine.get(name, -1.0) for name in names])
        return {name: count for name, count in zip(names, found, strict=True) if count >= 0}

    def _publish(self, save: _Save) -> int:
        """Lets rank 0 name the checkpoint and remove old ones. Returns the same status on every rank."""
        status = WRITTEN
        written = self.workers.gather([save.bytes, save.digest])
        if self.workers.is_main:
            files = {rank_file(rank): (size, digest) for rank, (size, digest) in enumerate(written)}
            manifest = Manifest(save.path.parent, save.state, self.fragments.shapes, save.steps, files)
            try:
                self.checkpoint_dir.publish(save.state.step, manifest)
            except OSError as error:
                save.problem, status = str(error), FAILED
            else:
                log.info("checkpoint: step %d in %s", save.state.step, self.checkpoint_dir.final(save.state.step))
                try:
                    self.checkpoint_dir.prune(self.config.keep)
                except OSError as error:
                    folder = self.checkpoint_dir.folder
                    log.warning("checkpoint: an old one in %s could not be removed (%s)", folder, error)
        return int(self.workers.highest([status])[0])

    def _drop(self, save: _Save) -> None:
        """Logs why the save failed, on the ranks where it did, and removes what was written."""
        save.thread.join()
        self.workers.highest([0])  # no rank removes while another writes
        sentence = ""
        if save.problem:
            target, needed = self.checkpoint_dir.folder, sum(one.values.nbytes for one in save.slices)
            free = shutil.disk_usage(target if target.is_dir() else Path.cwd()).free
            sentence = (
                f"The checkpoint of step {save.state.step} could not be written to {target} by rank "
                f"{self.workers.rank} ({save.problem}; its part needs {needed} bytes, {free} are free): the one before "
                "stays; free space, or choose another --run-dir."
            )
            log.warning("%s", sentence)
        if self.workers.is_main:
            shutil.rmtree(save.path.parent, ignore_errors=True)
        if self.config.on_error == "stop":
            raise UserError(sentence or f"Another rank could not write the checkpoint of step {save.state.step}.")

    def restore(self, resume: str, stage: str, check: Callable[[TrainState], None]) -> TrainState | None:
        """Loads the checkpoint that rank 0 finds into the engine. Returns its state; None if rank 0 finds none.

        check: raises UserError if a state does not fit, before anything is changed. If a rank fails, all raise
        UserError.
        """
        manifest = self._choose(resume, stage, check)
        if manifest is None:
            return None
        problem = ""
        try:
            with open_slices(manifest) as fill, torch.no_grad():
                for wanted in self.fragments.read():
                    fill(wanted)
            self.fragments.set_steps(manifest.steps)
        except (UserError, OSError, SafetensorError) as error:
            problem = str(error)
        self._all_or_none(problem)
        return manifest.state

    def _choose(self, resume: str, stage: str, check: Callable[[TrainState], None]) -> Manifest | None:
        """The same manifest on every rank. One rank of every node reads its files in full."""
        found, problem = None, ""
        if self.workers.is_main:
            try:
                found = self.checkpoint_dir.find(resume, stage)
                if found:
                    check(found.state)
                    check_shapes(found, self.fragments.shapes)
                self.checkpoint_dir.begin(found.state.step if found else -1)
            except (UserError, OSError) as error:
                problem = str(error)
        self._all_or_none(problem)
        by_path = found is not None and found.folder != self.checkpoint_dir.final(found.state.step)
        chosen = self.workers.highest([found.state.step if found else -1, by_path])
        step, digest = int(chosen[0]), 0
        if step < 0:
            return None
        try:
            if found is None:
                found = read_manifest(Path(resume) if chosen[1] else self.checkpoint_dir.final(step))
                if self.workers.rank == self.workers.first_of_node:
                    found.check_files()
            digest = int(found.digest[:12], 16)
        except UserError as error:
            problem = str(error)
        self._all_or_none(problem)
        if not self.workers.equal(digest):
            raise UserError(
                f"Ranks see different checkpoints of step {step} in {self.checkpoint_dir.folder}: the run directory "
                "must be one that all nodes share."
            )
        return found

    def _all_or_none(self, problem: str) -> None:
        """Raises UserError on every rank if one has a problem: its own, or that of the first rank that has one."""
        problems = [told for told in self.workers.gather(problem) if told]
        if problems:
            raise UserError(problem or problems[0])
