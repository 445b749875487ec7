"""Batch files of schedulers: parsed, checked by the scheduler's own models or by shellcheck, and run as far as can be.

What accelerate's files hold is checked in test_launch_check.py, the Slurm script's decisions in test_preemption.py.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from lgp_dist.engine.launch.environment import Launch
from lgp_dist.engine.launch.file import read_launch_file

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "launch_configs"
SLURM = CONFIGS / "slurm" / "train.sbatch"
MULTINODE = CONFIGS / "multinode.yaml"


def trainjob() -> dict[str, Any]:
    return yaml.safe_load((CONFIGS / "k8s" / "trainjob.yaml").read_text())


def runtime() -> dict[str, Any]:
    return yaml.safe_load((CONFIGS / "k8s" / "runtime.yaml").read_text())


def skypilot() -> dict[str, Any]:
    return yaml.safe_load((CONFIGS / "skypilot" / "train.yaml").read_text())


def shellcheck(text: str, *options: str) -> str:
    """What shellcheck says of a script; empty if nothing."""
    found = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if found is None:
        pytest.skip("shellcheck is not installed: it comes with `pip install -e .[dev]`")
    done = subprocess.run([found, *options, "-"], input=text, capture_output=True, text=True)
    return done.stdout + done.stderr


@pytest.mark.parametrize("path", [SLURM, ROOT / "tests" / "distributed" / "two_nodes.sh"], ids=lambda path: path.name)
def test_shell_files(path: Path) -> None:
    """shellcheck has nothing to say, and would have."""
    assert shellcheck(path.read_text()) == ""
    assert "SC2086" in shellcheck(path.read_text() + "\nrm $RUN\n")


def test_every_file_is_in_the_readme() -> None:
    """The README says of each file for which machine it is, and names no other."""
    named = set(re.findall(r"^\| `([^`]+)`", (CONFIGS / "README.md").read_text(), flags=re.MULTILINE))
    there = {path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*") if path.is_file()}
    assert named == there - {"README.md"}


def test_slurm_asks_for_what_the_launch_file_starts() -> None:
    """Nodes and GPUs at the top of the script are those of the launch file; one task on each node; it is requeued."""
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", SLURM.read_text(), flags=re.MULTILINE))
    stored = read_launch_file(MULTINODE)
    assert int(options["nodes"]) == stored["num_machines"] and options["ntasks-per-node"] == "1"
    assert int(options["nodes"]) * int(options["gpus-per-node"]) == stored["num_processes"]
    assert int(options["cpus-per-task"]) % int(options["gpus-per-node"]) == 0, "CPUs for each rank"
    assert "requeue" in options and options["signal"].startswith("B:USR1@")


def test_trainjob_fits_kubeflows_models() -> None:
    """Kubeflow's models take it, and give back all of it: they drop what they do not know."""
    models = pytest.importorskip("kubeflow_trainer_api.models", reason="kubeflow-trainer-api is not installed ([dev])")
    model = models.TrainerV1alpha1TrainJob
    job = trainjob()
    assert model.from_dict(job).to_dict() == job
    typo = trainjob()
    typo["spec"]["trainer"]["numNodez"] = typo["spec"]["trainer"].pop("numNodes")
    assert model.from_dict(typo).to_dict() != typo
    assert models.TrainerV1alpha1TrainingRuntime.from_dict(runtime()).to_dict() == runtime()


def test_trainjob_is_of_the_runtime() -> None:
    """By name and kind, with the container that it patches; all pods of a run start again together."""
    job, made = trainjob()["spec"], runtime()
    assert job["runtimeRef"] == {"kind": made["kind"], "name": made["metadata"]["name"]}
    spec = made["spec"]["template"]["spec"]
    (patch,) = job["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    (node,) = spec["replicatedJobs"]
    pods = [each["template"]["spec"]["template"]["spec"] for each in (patch, node)]
    assert patch["name"] == node["name"] and len({pod["containers"][0]["name"] for pod in pods}) == 1
    assert pods[1]["containers"][0]["image"] == job["trainer"]["image"]
    assert spec["failurePolicy"]["maxRestarts"] > 0 and node["template"]["spec"]["backoffLimit"] == 0
    asked = {item["name"]: item["value"] for item in job["trainer"]["env"]}
    assert any(
        asked["HF_HOME"].startswith(mount["mountPath"] + "/") for mount in pods[0]["containers"][0]["volumeMounts"]
    )
    resources = job["trainer"]["resourcesPerNode"]
    assert resources["requests"]["nvidia.com/gpu"] == resources["limits"]["nvidia.com/gpu"]


@pytest.mark.slow
def test_trainjob_starts_all_ranks(tmp_path: Path) -> None:
    """Its command under Trainer's variables, for one node of two ranks: torchrun starts both, DeepSpeed is asked for.

    `accelerate launch` under the same variables starts one rank, which is why the file does without it.
    """
    trainer = trainjob()["spec"]["trainer"]
    assert trainer["command"] == ["torchrun", "-m", "lgp_dist"]
    pet = {"PET_NNODES": "1", "PET_NPROC_PER_NODE": "2", "PET_NODE_RANK": "0"}
    pet |= {"PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": "0"}
    asked = {item["name"]: item["value"] for item in trainer["env"]}
    script = tmp_path / "show.py"
    script.write_text(
        "import json, os, pathlib, sys\n"
        "pathlib.Path(sys.argv[1], os.environ.get('RANK', '0')).write_text(json.dumps(dict(os.environ)))\n"
    )
    plain = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HOME": str(tmp_path)}  # no defaults, no GPUs
    environment = {**os.environ, **plain, **pet, **asked}
    found = {}
    for name, command in (
        ("torchrun", ["-m", "torch.distributed.run"]),
        ("accelerate", ["-m", "accelerate.commands.launch"]),
    ):
        folder = tmp_path / name
        folder.mkdir()
        subprocess.run([sys.executable, *command, script, folder], env=environment, check=True, capture_output=True)
        found[name] = {path.name: json.loads(path.read_text()) for path in folder.iterdir()}
    assert set(found["torchrun"]) == {"0", "1"} and set(found["accelerate"]) == {"0"}
    launch = Launch.from_environment(found["torchrun"]["1"])
    assert (launch.world, launch.local_world, launch.deepspeed, launch.zero_stage) == (2, 2, True, 1)
    assert launch.unsupported == ()


def test_trainjob_has_time_to_save() -> None:
    """Pods live longer than the launcher waits for ranks; NCCL gets its shared memory; GPUs are as many as ranks."""
    spec = trainjob()["spec"]
    trainer = spec["trainer"]
    (job,) = spec["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = job["template"]["spec"]["template"]["spec"]
    asked = {item["name"]: item["value"] for item in trainer["env"]}
    assert int(asked["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < pod["terminationGracePeriodSeconds"]
    assert {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "8Gi"}} in pod["volumes"]
    mounted = {mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}
    assert int(trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"]) == trainer["numProcPerNode"]


SKYPILOT_KEYS = {"name", "workdir", "num_nodes", "resources", "volumes", "envs", "setup", "run"}
"""Of SkyPilot's task YAML, as its reference has them (docs.skypilot.co, yaml-spec)."""


def test_skypilot(tmp_path: Path) -> None:
    """Known keys and types; its commands are sound shell; a node's command is what the launch file needs."""
    task = skypilot()
    assert set(task) <= SKYPILOT_KEYS and isinstance(task["num_nodes"], int)
    stored = read_launch_file(MULTINODE)
    card, count = task["resources"]["accelerators"].split(":")
    assert card and task["num_nodes"] * int(count) == stored["num_processes"]
    for name in ("setup", "run"):
        assert shellcheck("#!/usr/bin/env bash\n" + task[name], "--exclude=SC1091") == ""
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").touch()
    (tmp_path / "accelerate").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "accelerate").chmod(0o755)
    node = {"SKYPILOT_NODE_IPS": "10.0.0.5\n10.0.0.6", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}
    node |= {"SKYPILOT_NUM_GPUS_PER_NODE": "8", "PATH": f"{tmp_path}:{os.environ['PATH']}", **task["envs"]}
    done = subprocess.run(
        ["bash", "-c", task["run"]],
        cwd=tmp_path,
        env={**os.environ, **node},
        capture_output=True,
        text=True,
        check=True,
    )
    words = (
        "launch --config_file launch_configs/multinode.yaml --num_machines 2 --num_processes 16 --machine_rank 1"
        " --main_process_ip 10.0.0.5 -m lgp_dist run pool12 --data.root=s3://bucket/imagenet --run-dir=/runs/pool12"
    )
    assert " ".join(done.stdout.split()) == words
