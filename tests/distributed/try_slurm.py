"""Runs of launch_configs/slurm/train.sbatch under Slurm, by scripts/try_slurm.

Ranks wait where a trial wants them (slurm_held.py), so that what happens to them happens there on any machine.
"""

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))

from run_helpers import LIMIT_S, SAMPLE, SMALL, outcome_of, snapshot, write_ancestry, write_shard
from slurm_cluster import Cluster, alone, call, cluster, missing

from lgp_dist.config.flat import STAGES
from lgp_dist.data.shards.index import index_shards

ROOT = Path(__file__).parents[2]
SLURM = ROOT / "launch_configs" / "slurm" / "train.sbatch"
STEPS = ("--distil.train.max-steps=4", "--finetune.train.max-steps=4", "--checkpoint.every=1")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")
MINUTES = 60
"""Time limit of a job that is not to meet it."""
HELD = """#!/usr/bin/env bash
words=()
for word; do
    [ "$word" != lgp_dist ] || word=slurm_held
    words+=("$word")
done
exec {accelerate} "${{words[@]}}"
"""
"""`accelerate` for the jobs: the real one, whose ranks can be held."""


@dataclass(frozen=True)
class Options:
    """Runs trials under Slurm and prints a line for each; status 1 if one fails."""

    only: tuple[str, ...] = ()
    """Names of trials, next to those with which they are compared; all if empty."""
    keep: bool = False
    """Keep the folder with runs and logs."""


@dataclass
class Job:
    """A job of the Slurm script, and the place at which its ranks wait."""

    cluster: Cluster
    name: str
    ranks: int = 2
    number: str = ""

    @property
    def run(self) -> Path:
        return self.cluster.folder / "runs" / self.name

    @property
    def file(self) -> Path:
        """Its log, but for the ending; tasks of an array share one."""
        return self.cluster.folder / self.name.partition("/")[0]

    @property
    def log(self) -> str:
        path = self.file.with_suffix(".out")
        return path.read_text() if path.exists() else ""

    def hold(self, place: str = "") -> None:
        """Where ranks are to wait from now on."""
        self.file.with_suffix(".hold").write_text(place)

    def held(self, place: str) -> None:
        """Waits until all ranks wait there."""
        marks = [self.run / f"held-{rank}" for rank in range(self.ranks)]
        self.wait(lambda: all(mark.exists() and mark.read_text() == place for mark in marks), f"ranks in {place}")

    def submit(self, *words: str, hold: str = "", options: tuple[str, ...] = ()) -> "Job":
        """sbatch of the script; options: of sbatch. One rank on each node."""
        self.hold(hold)
        variables = {"RUN": self.run, "LGP_TEST_HOLD": self.file.with_suffix(".hold"), "RANKS_PER_NODE": 1}
        variables["CONFIG"] = ROOT / "launch_configs" / "cpu_multinode.yaml"
        os.environ.update({name: str(value) for name, value in variables.items()})
        asked = ("--gpus-per-node=0", "--cpus-per-task=1", f"--time={MINUTES}", f"--output={self.file}.out", *options)
        self.number = call("sbatch", "--parsable", *asked, SLURM, "run", *SMALL, *STEPS, *words)
        return self

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        """Waits for the condition, unless the job ends before it holds."""
        until = time.monotonic() + LIMIT_S
        while not condition():
            over = time.monotonic() > until or self.cluster.state(self.number) in ENDED and not condition()
            assert not over, (
                f"{self.name}: no {what}, the job is {self.cluster.state(self.number)}:\n{self.log[-6000:]}"
            )
            time.sleep(0.5)

    def again(self, starts: int) -> None:
        """Waits until Slurm has put the job into its queue again for this many times."""
        self.wait(lambda: self.cluster.restarts(self.number) == starts, f"restart {starts}")

    def complete(self) -> dict[str, str]:
        """Waits for the end, which must be a good one; returns hashes of what the run has made."""
        self.wait(lambda: self.cluster.state(self.number) == "COMPLETED", "end")
        return made(self.run)


def made(run: Path) -> dict[str, str]:
    """Hashes of weights and accuracies of a complete run."""
    assert outcome_of(run).outcome == "complete", run
    files = snapshot(run, without=("checkpoints",))
    return {name: files[name] for name in files if name.endswith(".safetensors") or name == "evaluate/paths.json"}


def reference(cluster: Cluster) -> dict[str, str]:
    """Of the run that nothing disturbs."""
    return made(cluster.folder / "runs" / "completion")


def completion(cluster: Cluster) -> str:
    found = Job(cluster, "completion").submit().complete()
    assert {"distil/rows.safetensors", "finetune/pool.safetensors", "evaluate/paths.json"} <= found.keys(), found
    return "two CPU nodes, all stages"


def limits(cluster: Cluster) -> str:
    job = Job(cluster, "limits").submit(hold=STAGES[0])
    for starts, stage in enumerate(STAGES, 1):
        job.held(stage)
        cluster.set_limit(job.number, minutes=cluster.minutes(job.number) + 2)
        job.again(starts)
        cluster.set_limit(job.number, minutes=MINUTES)
        job.hold(STAGES[starts] if starts < len(STAGES) else "")
    assert job.complete() == reference(cluster)
    assert job.log.count("the run is preempted, status") == len(STAGES), job.log
    return f"the time limit came in {', '.join(STAGES)}"


def preemption(cluster: Cluster) -> str:
    job = Job(cluster, "preemption").submit(hold="start")
    for starts, place in enumerate(("start", "finetune"), 1):
        job.held(place)
        call(
            "sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=urgent.out", "--wrap", "srun hostname"
        )
        job.again(starts)
        job.hold("finetune" if starts == 1 else "")
    assert job.complete() == reference(cluster)
    return "by jobs of another partition, in start-up and in training"


def death(cluster: Cluster) -> str:
    job = Job(cluster, "death").submit(hold="finetune")
    job.held("finetune")
    cluster.kill("n2")
    job.hold()
    job.again(1)
    cluster.begin("n2")
    said = "lgp: Rank 1 on n2 has exited"
    assert said in job.log, job.log
    assert job.complete() == reference(cluster)
    return f'kill -9 of all that ran on a node in training: "{said}"'


ONE_NODE = ("--nodes=1", "--nodelist=n1")


def together(cluster: Cluster) -> str:
    jobs = [Job(cluster, f"together-{seed}", ranks=1) for seed in (0, 1)]
    for seed, job in enumerate(jobs):
        job.submit(f"--seed={seed}", hold="finetune", options=ONE_NODE)
    for job in jobs:
        job.held("finetune")
    for job in jobs:
        job.hold()
    first, second = (job.complete() for job in jobs)
    assert first != second
    return "two jobs trained on one node at the same time"


def array(cluster: Cluster) -> str:
    job = Job(cluster, "array").submit("--seed=%a", hold="finetune", options=(*ONE_NODE, "--array=0-1"))
    tasks = [Job(cluster, f"array/{task}", 1, f"{job.number}_{task}") for task in (0, 1)]
    for task in tasks:
        task.held("finetune")
    for task in tasks:
        call("scancel", "--batch", "--signal=USR1", task.number)
    for task in tasks:
        task.again(1)
    job.hold()
    for seed, task in enumerate(tasks):
        assert task.complete() == made(cluster.folder / "runs" / f"together-{seed}")
        assert cluster.restarts(task.number) == 1
    return "each of two tasks was asked to leave, and came back alone"


TRIALS = {trial.__name__: trial for trial in (completion, death, preemption, together, array, limits)}


def prepare(folder: Path) -> None:
    """The first images of the sample, an untrained ancestry, and what jobs find on PATH."""
    (folder / "shards").mkdir()
    for name, samples in (("fashion-mnist-train-0000.tar", 64), ("fashion-mnist-test-00.tar", 32)):
        write_shard(SAMPLE / name, folder / "shards" / name, samples)
    index_shards(folder / "shards", progress=lambda line: None)
    write_ancestry(folder / "ancestry.safetensors")
    programs = folder / "bin"
    programs.mkdir()
    (programs / "accelerate").write_text(HELD.format(accelerate=shutil.which("accelerate")))
    (programs / "accelerate").chmod(0o755)
    os.environ["PATH"] = f"{programs}:{os.environ['PATH']}"
    os.environ["PYTHONPATH"] = f"{ROOT}:{ROOT / 'tests' / 'distributed'}"
    os.environ["DS_ACCELERATOR"] = "cpu"
    os.chdir(folder)


def main(options: Options) -> None:
    if reason := missing():
        print(f"scripts/try_slurm: skipped, since {reason}.")
        return
    alone()
    wanted = {"completion", *(options.only or TRIALS)} | ({"together"} if "array" in options.only else set())
    folder, failed = Path(tempfile.mkdtemp(prefix="lgp-slurm-")), 0
    try:
        prepare(folder)
        with cluster(folder) as made_here:
            for name in [name for name in TRIALS if name in wanted]:
                began = time.monotonic()
                try:
                    said = TRIALS[name](made_here)
                except AssertionError as error:
                    failed += 1
                    said = f"FAILED: {error}"
                    made_here.empty()
                print(f"{name}: {said} ({time.monotonic() - began:.0f} s)", flush=True)
    finally:
        if options.keep or failed:
            print(f"Runs and logs are in {folder}.")
        else:
            shutil.rmtree(folder)
    sys.exit(min(failed, 1))


if __name__ == "__main__":
    main(tyro.cli(Options))
