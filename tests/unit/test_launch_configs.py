"""Batch files of schedulers: parsed, checked by the scheduler's own models or by shellcheck, and run as far as can be.

What accelerate's files hold is checked in test_launch_check.py, the Slurm script's decisions in test_preemption.py.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml
from run_helpers import call_main
from slurm_cluster import INSIDE, missing

from lgp_dist.cli.parse import Call
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


@pytest.mark.slow
def test_slurm_is_tried_where_it_can_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere scripts/try_slurm says what is missing, and ends well."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv(INSIDE, raising=False)
    for user, expected in ((1000, "only root may start its daemons"), (0, "there is no munged: install slurm-wlm, ")):
        monkeypatch.setattr(os, "geteuid", lambda user=user: user)
        assert missing().startswith(expected)
    script = [sys.executable, ROOT / "tests" / "distributed" / "try_slurm.py"]
    done = subprocess.run(script, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("scripts/try_slurm: skipped, since "), done.stderr


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


def dockerfile() -> list[list[str]]:
    """Instructions of the Dockerfile, each as its words."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    return [shlex.split(line) for line in text.replace("\\\n", " ").splitlines() if line]


def test_the_image_has_what_it_copies() -> None:
    """Sources are in the repository and not ignored; together they hold the package; the environment is the lock's."""
    sources = [word for name, *words in dockerfile() if name == "COPY" for word in words[:-1] if word[:2] != "--"]
    ignored = [line.removeprefix("**/") for line in (ROOT / ".dockerignore").read_text().splitlines()]
    for source in sources:
        tracked = subprocess.run(["git", "ls-files", source], cwd=ROOT, capture_output=True, text=True, check=True)
        assert tracked.stdout and not any(fnmatch(part, rule) for part in Path(source).parts for rule in ignored)
    assert {"lgp_dist", "scripts", "launch_configs", "shards/sample"} < {*sources}
    before = sources[: sources.index("scripts/environment.sh") + 1]
    assert {"pyproject.toml", "requirements.lock", "README.md", "LICENSE", "lgp_dist/__init__.py"} < {*before}
    environment = (ROOT / "scripts" / "environment.sh").read_text()
    assert "lgp_environment()" in environment and "--require-hashes -r requirements.lock" in environment


def test_the_image_is_of_the_locks_cuda_and_not_of_root() -> None:
    """Before anything of the project is copied; its last stage, which has no test in it, is the one that is built."""
    lock = (ROOT / "requirements.lock").read_text()
    cuda = re.search(r"^cuda-toolkit==(\d+\.\d+)", lock, flags=re.MULTILINE)
    stages = [words for name, *words in dockerfile() if name == "FROM"]
    assert cuda and stages[0][0].startswith(f"nvidia/cuda:{cuda[1]}.")
    assert [words[0] for words in stages[1:]] == ["image", "image"] and stages[1][1:] == ["AS", "test"]
    names = [name for name, *_ in dockerfile()]
    assert ["USER", "lgp"] in dockerfile() and names.index("USER") < names.index("COPY") and names.count("USER") == 1
    image = trainjob()["spec"]["trainer"]["image"]
    assert f"docker build -t {image} ." in (ROOT / "Dockerfile").read_text()


def test_commands_in_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it runs as its test, and what it says for people, is understood by the scripts and by `lgp`."""
    monkeypatch.setattr(Call, "__call__", lambda call: None)
    (words,) = [words for name, *words in dockerfile() if name == "RUN" and words[0].startswith("scripts/")]
    script, *rest = words[: words.index("&&")]
    assert script == "scripts/quickstart" and os.access(ROOT / script, os.X_OK)
    shown = re.findall(r"^# +docker run .* (lgp .*)$", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    commands = [["run", "tiny", *rest], words[words.index("lgp") + 1 :], *(shlex.split(line)[1:] for line in shown)]
    assert len(commands) == 3 and [call_main(tuple(command)) for command in commands] == [0, 0, 0]
    assert call_main(("run", "tiny", "--distil.train.max-step", "2")) == 2
