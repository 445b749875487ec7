"""`lgp doctor`: what this machine lacks for training, one line for each thing that training needs."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from lgp_dist.config.run_config import DataConfig
from lgp_dist.data.remote.roots import open_root
from lgp_dist.data.shards.manifest import ShardManifest
from lgp_dist.engine.launch.machine import open_file_limit, shm_bytes, stale_shm
from lgp_dist.errors import UserError

PATIENCE_S = 120.0
"""How long torch may take to say what it has; a driver that hangs does not hang the doctor."""

OPEN_FILES = 1024
"""Files a rank may need open at once: data.window (256) shards, those being fetched, logs and connections."""

NVIDIA = (Path("/dev/nvidiactl"), Path("/proc/driver/nvidia/version"))
"""Traces of a driver."""


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    name: str
    ok: bool
    text: str
    """What there is, or what to do."""


def examine(data: str = "") -> list[Finding]:
    """All findings, in the order in which to fix them; data: a data.root to read, empty for none."""
    return [
        *check_versions("lgp_dist"),
        *check_backends(ask_torch(), any(path.exists() for path in NVIDIA)),
        check_compiler(os.environ.get("CXX", "c++"), Path(sysconfig.get_path("include"))),
        check_shm(stale_shm()),
        check_open_files(*open_file_limit()),
        *([check_data(data)] if data else []),
    ]


def check_versions(package: str) -> Iterator[Finding]:
    """The requirements of a package, without its extras, against what is installed."""
    try:
        wanted = [Requirement(text) for text in distribution(package).requires or ()]
    except PackageNotFoundError:
        yield Finding("versions", False, f"{package} is not installed: run `pip install -e .` in its folder.")
        return
    needed = [one for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})]
    problems = [problem for one in needed if (problem := _unmet(package, one))]
    for problem in problems:
        yield Finding("versions", False, problem)
    if not problems:
        shown = ", ".join(f"{name} {version(name)}" for name in ("torch", "accelerate", "deepspeed", "timm"))
        yield Finding("versions", True, shown)


def _unmet(package: str, requirement: Requirement) -> str:
    """What is wrong with a requirement, as one sentence; empty if it is met."""
    try:
        found = version(requirement.name)
    except PackageNotFoundError:
        return f"{package} needs {requirement}, which is not installed: run `pip install '{requirement}'`."
    if requirement.specifier.contains(found, prereleases=True):
        return ""
    return f"{package} needs {requirement}, but {found} is installed: run `pip install '{requirement}'`."


def ask_torch() -> dict[str, Any] | str:
    """What launch/backends.py prints in a process of its own, or why it prints nothing."""
    command = [sys.executable, "-m", "lgp_dist.engine.launch.backends"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    except subprocess.TimeoutExpired:
        return f"torch said nothing in {PATIENCE_S:.0f} s"
    try:
        return json.loads(done.stdout)
    except ValueError:
        lines = done.stderr.strip().splitlines()
        return f"torch cannot be used ({lines[-1] if lines else f'status {done.returncode}'})"


def check_backends(found: dict[str, Any] | str, driver: bool) -> Iterator[Finding]:
    """GPU and the libraries by which ranks communicate; driver: whether the machine has one of NVIDIA's."""
    if isinstance(found, str):
        yield Finding("gpu", False, f"{found}: run `python -c 'import torch'` and fix what it says.")
        return
    devices = found["devices"]
    if devices:
        yield Finding("gpu", True, f"{len(devices)} x {devices[0]}, CUDA {found['cuda']}")
    elif driver and not found["cuda"]:
        yield Finding("gpu", False, "There is a driver, but torch is built for the CPU: install torch with CUDA.")
    elif driver:
        why = f"CUDA {found['cuda']} may be too new for it, or CUDA_VISIBLE_DEVICES is empty"
        yield Finding("gpu", False, f"There is a driver, but torch sees no GPU: run nvidia-smi; {why}.")
    else:
        yield Finding("gpu", True, "none; training runs on the CPU over gloo")
    if devices and not found["nccl"]:
        yield Finding("nccl", False, "This torch has no NCCL, which GPUs need: install torch from pytorch.org.")
    elif devices:
        yield Finding("nccl", True, found["nccl"])
    gloo = "yes" if found["gloo"] else "This torch has no gloo, which ranks need: install torch from pytorch.org."
    yield Finding("gloo", found["gloo"], gloo)


def check_compiler(name: str, headers: Path) -> Finding:
    """Whether there is a C++ compiler, and the folder of Python's headers."""
    needed = "engine.compile inductor, kernels on GPUs and DeepSpeed's CPU operators need it"
    if shutil.which(name) is None:
        return Finding("compiler", False, f"There is no {name}: install g++, or set CXX; {needed}.")
    if not (headers / "Python.h").is_file():
        return Finding("compiler", False, f"{headers} has no Python.h: install Python's headers; {needed}.")
    return Finding("compiler", True, f"{shutil.which(name)}")


def check_shm(stale: list[Path]) -> Finding:
    """Files that killed runs left in shared memory."""
    if not stale:
        return Finding("shared memory", True, f"{shm_bytes() / 2**20:.0f} MiB, nothing stale")
    size = sum(path.stat().st_size for path in stale if path.exists()) / 2**20
    names = " ".join(map(str, stale[:3])) + (" ..." if len(stale) > 3 else "")
    text = f"{len(stale)} file(s) of {size:.0f} MiB that no process of yours uses: rm {names}"
    return Finding("shared memory", False, text)


def check_open_files(soft: int, hard: int) -> Finding:
    """The limit of open files that ranks inherit; -1 for no limit."""
    if soft < 0 or soft >= OPEN_FILES:
        return Finding("open files", True, "no limit" if soft < 0 else str(soft))
    may_raise = hard < 0 or hard >= OPEN_FILES
    how = "run `ulimit -n 65536`" if may_raise else "ask the machine's administrator to raise its hard limit"
    return Finding("open files", False, f"The limit is {soft}, but a rank may need {OPEN_FILES}: {how} before a start.")


def check_data(root: str) -> Finding:
    """Whether manifest and shards of a data.root can be reached; a remote one gets one short try."""
    try:
        opened = open_root(DataConfig(root=root, timeout_s=10.0, retries=0))
        manifest = ShardManifest.load(opened.folder)
        for split in manifest.splits:
            opened.open_index(manifest, split)
    except UserError as error:
        return Finding("data", False, str(error))
    splits = ", ".join(f"{sum(one.samples for one in shards)} in {name}" for name, shards in manifest.splits.items())
    return Finding("data", True, f"{root}: {splits}")
