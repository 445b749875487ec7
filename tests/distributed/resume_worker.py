"""Run by `accelerate launch`: trains jobs of tests/distributed/resume_jobs.py one after the other.

Arguments: a JSON list of jobs, and a folder. Each writes FOLDER/NAME: checkpoints/, metrics.jsonl, end.safetensors.
"""

import json
import resource
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from exact_worker import workers_of
from resume_jobs import Job
from safetensors.torch import save_file

from lgp_dist.config.run_config import CheckpointConfig, FaultConfig
from lgp_dist.engine.loop import RunSetup, TrainingPlan, train
from lgp_dist.engine.saver import SaverConfig
from lgp_dist.engine.step_filter import StepFilter
from lgp_dist.engine.workers import Workers
from lgp_dist.errors import UserError
from lgp_dist.protocols import Batch
from lgp_dist.tasks.finetune import FinetuneTask


def run(job: Job, started: Workers, root: Path) -> None:
    """Trains one job, or writes down the sentence that it ends with."""
    trial, folder = job.trial, root / job.name
    workers = workers_of(trial, started)
    if job.elsewhere:  # every rank on a node of its own
        workers = replace(workers, launch=replace(workers.launch, local_world=1))
    pool, ancestry, sampler = trial.build()
    task, at = FinetuneTask(pool, ancestry, sampler, trial.finetune_config()), [0, 0]

    def batches(start: int, steps: int) -> Iterator[Batch]:
        assert start == at[0], "the stream goes on where the checkpoint says"
        for step in range(start, start + steps):
            for micro in range(trial.accumulate):
                yield job.batch(at[1] + step - at[0], micro, workers.rank)

    def position(step: int) -> dict[str, int]:
        return {"position": at[1] + step - at[0]}

    def restore(state: Mapping[str, Any], step: int) -> None:
        assert state == {"position": step} or job.bad
        at[:] = step, state["position"]

    saver = SaverConfig(
        folder=(root / job.elsewhere if job.elsewhere and workers.rank else folder) / "checkpoints" / "job",
        checkpoint=CheckpointConfig(every=job.every, keep=1000, on_error=job.on_error),
        seed=trial.seed,
        settings=job.settings,
        versions={},
        data_state=position,
        data_restore=restore,
        resume=str(root / job.resume) if "/" in job.resume else job.resume,
        allow=tuple(job.allow),
    )
    folder.mkdir(exist_ok=True)
    if job.limit and workers.rank + 1 == workers.world:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job.limit, resource.RLIM_INFINITY))
    try:
        step_filter = StepFilter(task, workers, trial.accumulate, FaultConfig(rollback=job.rollback), "job")
        plan = TrainingPlan(task, job.train_config(), gradients=trial.finetune_config().gradients)
        train(plan, RunSetup("job", batches, trial.steps, folder, step_filter=step_filter, saver=saver), workers)
    except UserError as error:
        (folder / f"error-{workers.rank}.txt").write_text(str(error))
        return
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    if workers.is_main:
        save_file({name: value.clone() for name, value in pool.state_dict().items()}, folder / "end.safetensors")


def main() -> None:
    jobs = [Job.from_dict(fields) for fields in json.loads(Path(sys.argv[1]).read_text())]
    workers = Workers.start(jobs[0].trial.engine_config())
    torch.set_num_threads(1)
    for job in jobs:
        run(job, workers, Path(sys.argv[2]))
    workers.barrier()
    workers.close()


if __name__ == "__main__":
    main()
