"""Saving and resuming: every rank writes its part beside training, all agree, then the checkpoint gets its name.

    main thread                          writer thread
    snapshot: copy to memory  ------->   write, flush, read back, compare, hash
    pulse at each step's end: the        -> WRITTEN or FAILED
    worst status over ranks
    all written: sizes and hashes of all ranks to rank 0, which writes the manifest and renames
    one failed: all drop it; the checkpoint before stays

While a save is under way the pulse is the only cost beside the copy. A save waits for the one before.
"""

import logging
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from lgp_dist.config.run_config import CheckpointConfig
from lgp_dist.engine.checkpoints.checkpoint_dir import CheckpointDir
from lgp_dist.engine.checkpoints.manifest import Manifest, TrainState, rank_file, read_manifest
from lgp_dist.engine.checkpoints.tensor_slices import SliceReader, TensorSlice, check_shapes, same
from lgp_dist.engine.fragments import Fragments
from lgp_dist.engine.workers import Workers
from lgp_dist.errors import UserError
from lgp_dist.files import sha256

log = logging.getLogger("lgp")

WRITTEN, RUNNING, FAILED = range(3)
"""Of a save on one rank; the highest over ranks decides."""

LOOK_S = 0.01
"""Between two looks at a save that is waited for, seconds."""


class _Save:
    """One checkpoint that is being written."""

    def __init__(
        self,
        state: TrainState,
        steps: dict[str, float],
        slices: list[TensorSlice],
        path: Path,
        checkpoint_dir: CheckpointDir,
    ):
        self.state, self.steps, self.slices, self.path, self.checkpoint_dir = state, steps, slices, path, checkpoint_dir
        self.status, self.problem, self.bytes, self.digest = RUNNING, "", 0, ""
        self.thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        status = FAILED
        try:
            self.checkpoint_dir.disk.make(self.path.parent)
            self.checkpoint_dir.disk.write_tensors(self.path, {part.name: part.values for part in self.slices})
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


class Checkpointer:
    """The checkpoints of one stage of one run."""

    def __init__(self, checkpoint_dir: CheckpointDir, workers: Workers, fragments: Fragments, config: CheckpointConfig):
        self.checkpoint_dir, self.workers, self.fragments, self.config = checkpoint_dir, workers, fragments, config
        self._save: _Save | None = None
        self._buffers: dict[str, Tensor] = {}
        self.stall_s = 0.0
        """Seconds for which the last save held up training."""

    @property
    def busy(self) -> bool:
        """Whether a save is under way, the same on every rank."""
        return self._save is not None

    @property
    def status(self) -> int:
        """Of the save that is under way on this rank."""
        return WRITTEN if self._save is None else self._save.status

    def save(self, state: TrainState) -> None:
        """Begins a checkpoint of the engine as it stands, after the one before has ended. Every rank calls it."""
        began = time.monotonic()
        self.wait()
        steps = self._all_steps()
        slices = [self._copy(part) for part in self.fragments.written()]
        path = self.checkpoint_dir.partial(state.step) / rank_file(self.workers.rank)
        self._save = _Save(state, steps, slices, path, self.checkpoint_dir)
        self.stall_s = time.monotonic() - began

    def settle(self, worst: int) -> None:
        """Ends the save that is under way, given the highest status over ranks: names it or drops it."""
        if self._save is None or worst == RUNNING:
            return
        save, self._save = self._save, None
        if worst == WRITTEN:
            worst = self._publish(save)
        if worst == FAILED:
            self._drop(save)

    def wait(self) -> None:
        """Until no save is under way on any rank."""
        while self._save is not None:
            self._save.thread.join(LOOK_S)
            self.settle(int(self.workers.highest([self.status])[0]))

    def _copy(self, part: TensorSlice) -> TensorSlice:
        """In this machine's memory, in a buffer of the save before."""
        values = part.values
        if part.name not in self._buffers:
            self._buffers[part.name] = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
        return replace(part, values=self._buffers[part.name].copy_(values))

    def _all_steps(self) -> dict[str, float]:
        """Updates of every parameter, whichever rank holds it."""
        mine, names = self.fragments.steps(), sorted(self.fragments.shapes)
        found = self.workers.highest([mine.get(name, -1.0) for name in names])
        return {name: count for name, count in zip(names, found, strict=True) if count >= 0}

    def _publish(self, save: _Save) -> int:
        """Rank 0 names the checkpoint and removes old ones; whether that went well, on every rank."""
        outcome = WRITTEN
        mine = [save.bytes, *bytes.fromhex(save.digest)]
        table = self.workers.table(mine)
        if self.workers.is_main:
            files = {rank_file(rank): (row[0], bytes(row[1:]).hex()) for rank, row in enumerate(table)}
            manifest = Manifest(save.path.parent, save.state, self.fragments.shapes, save.steps, files)
            try:
                self.checkpoint_dir.publish(save.state.step, manifest)
            except OSError as error:
                save.problem, outcome = str(error), FAILED
            else:
                log.info("checkpoint: step %d in %s", save.state.step, self.checkpoint_dir.final(save.state.step))
                self._prune()
        return int(self.workers.highest([outcome])[0])

    def _prune(self) -> None:
        try:
            self.checkpoint_dir.prune(self.config.keep)
        except OSError as error:
            log.warning("checkpoint: an old one in %s could not be removed (%s)", self.checkpoint_dir.folder, error)

    def _drop(self, save: _Save) -> None:
        """Says why the save failed, on the ranks where it did, and removes what there is of it."""
        save.thread.join()
        self.workers.highest([0])  # no rank removes while another writes
        folder, needed = save.path.parent, sum(part.values.nbytes for part in save.slices)
        sentence = ""
        if save.problem:
            target = self.checkpoint_dir.folder
            free = shutil.disk_usage(target if target.is_dir() else Path.cwd()).free
            sentence = (
                f"The checkpoint of step {save.state.step} could not be written to {target} by rank "
                f"{self.workers.rank} ({save.problem}; its part needs {needed} bytes, {free} are free): the one before "
                "stays; free space, or choose another --run-dir."
            )
            log.warning("%s", sentence)
        if self.workers.is_main:
            shutil.rmtree(folder, ignore_errors=True)
        if self.config.on_error == "stop":
            raise UserError(sentence or f"Another rank could not write the checkpoint of step {save.state.step}.")

    def restore(self, resume: str, stage: str, check: Callable[[TrainState], None]) -> TrainState | None:
        """Loads the checkpoint that rank 0 finds into the engine, on every rank; None where there is none to load.

        check: raises UserError where its state does not fit, before anything is changed. UserError on every rank where
        one fails.
        """
        manifest = self._choose(resume, stage, check)
        if manifest is None:
            return None
        problem = ""
        try:
            self._load(manifest)
        except (UserError, OSError, SafetensorError) as error:
            problem = str(error)
        self._all_or_none(problem, f"{manifest.folder} could not be loaded")
        return manifest.state

    def _choose(self, resume: str, stage: str, check: Callable[[TrainState], None]) -> Manifest | None:
        """The same on every rank, its files read in full on every node."""
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
        self._all_or_none(problem, "Rank 0 could not choose a checkpoint")
        named = found is not None and found.folder != self.checkpoint_dir.final(found.state.step)
        step, named = map(int, self.workers.highest([found.state.step if found else -1, named]))
        if step < 0:
            return None
        try:
            if found is None:
                found = read_manifest(Path(resume) if named else self.checkpoint_dir.final(step))
                if self.workers.rank % self.workers.launch.local_world == 0:
                    found.check_files()
            digest = int(found.digest[:12], 16)
        except UserError as error:
            digest, problem = 0, str(error)
        self._all_or_none(problem, "Another rank could not read the checkpoint")
        if not self.workers.equal(digest):
            raise UserError(
                f"Ranks see different checkpoints of step {step} in {self.checkpoint_dir.folder}: the run directory "
                "must be one that all nodes share."
            )
        return found

    def _load(self, manifest: Manifest) -> None:
        with SliceReader(manifest) as reader, torch.no_grad():
            for part in self.fragments.read():
                reader.fill(part)
        self.fragments.set_steps(manifest.steps)

    def _all_or_none(self, problem: str, elsewhere: str) -> None:
        """UserError on every rank where one has a problem."""
        if self.workers.highest([bool(problem)])[0]:
            raise UserError(problem or f"{elsewhere}: see the log.")
