"""`lgp doctor`: whether this machine can train, one line for each thing that has to be right."""

import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from lgp_dist.config.run_config import DataConfig
from lgp_dist.data.remote.roots import open_root
from lgp_dist.data.shards.manifest import ShardManifest
from lgp_dist.engine.launch.machine import open_file_limit, shm_bytes, stale_shm
from lgp_dist.errors import UserError

PATIENCE_S = 120.0
"""How long torch may take to say what it has; a driver that hangs does not hang the doctor."""

OPEN_FILES = 1024
"""Files a rank may need open at once: data.window (256) shards with what is fetched, logs and connections."""

ENDLESS = """
import io, tarfile
member = tarfile.TarInfo("__x__")
member.size = 2**60
shard = io.BytesIO(member.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
try:
    list(tarfile.open(fileobj=shard, mode="r|"))
except tarfile.TarError:
    pass
"""
"""Reads a tar of 1,536 bytes in which a member claims 2^60: Pythons without the change of #151982 never end."""
ENDLESS_S = 2.0
"""After which it is taken not to end; it takes milliseconds."""

NVIDIA = (Path("/dev/nvidiactl"), Path("/proc/driver/nvidia/version"))
"""Traces of a driver."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    name: str
    ok: bool
    text: str
    """What there is, or what to do."""


def examine(data: str = "") -> list[Finding]:
    """Everything, in the order in which it should be put right; data: a data.root to read, empty for none."""
    checks: list[Callable[[], Iterable[Finding]]] = [
        lambda: [check_python()],
        lambda: check_versions("lgp_dist"),
        lambda: [check_tarfile(ENDLESS)],
        lambda: check_backends(ask_torch(), any(path.exists() for path in NVIDIA)),
        lambda: [check_compiler(os.environ.get("CXX", "c++"))],
        lambda: [check_shm(stale_shm())],
        lambda: [check_open_files(*open_file_limit())],
        lambda: [check_data(data)] if data else [],
    ]
    return [finding for check in checks for finding in check()]


def check_python() -> Finding:
    """The interpreter, against what the package asks for."""
    found = platform.python_version()
    try:
        wanted = distribution("lgp_dist").metadata.get("Requires-Python", "")
    except PackageNotFoundError:
        wanted = ""
    if SpecifierSet(wanted).contains(found, prereleases=True):
        return Finding("python", True, found)
    return Finding(
        "python", False, f"{found} runs, but lgp_dist wants {wanted}: make an environment with one of these."
    )


def check_tarfile(code: str) -> Finding:
    """Whether Python's own reader of tars ends on a member that claims more than there is; no shard is read with it."""
    try:
        subprocess.run([sys.executable, "-I", "-c", code], timeout=ENDLESS_S, check=False)
    except subprocess.TimeoutExpired:
        return Finding(
            "tarfile",
            True,
            "training does not use it, but Python's tarfile (and webdataset with it) never ends on some damaged tars "
            "(CVE-2026-11972): give it no strange ones, or take a Python of June 2026 or later",
        )
    return Finding("tarfile", True, "ends on damaged tars")


def check_versions(package: str) -> Iterator[Finding]:
    """The package's requirements, and those that they have of each other, against what is installed."""
    try:
        wanted = _requirements(package)
    except PackageNotFoundError:
        yield Finding("versions", False, f"{package} is not installed: run `pip install -e .` in its folder.")
        return
    names = {requirement.name for requirement in wanted}
    problems = []
    for owner in [package, *sorted(names)]:
        try:
            problems += [
                problem
                for requirement in _requirements(owner)
                if owner == package or requirement.name in names
                for problem in [_unmet(owner, requirement)]
                if problem
            ]
        except PackageNotFoundError:
            continue  # named as a requirement of the package
    for problem in problems:
        yield Finding("versions", False, problem)
    if not problems:
        shown = ", ".join(f"{name} {version(name)}" for name in ("torch", "accelerate", "deepspeed", "timm"))
        yield Finding("versions", True, shown)


def _requirements(package: str) -> list[Requirement]:
    """What a package needs here, without its extras."""
    found = [Requirement(text) for text in distribution(package).requires or ()]
    return [one for one in found if one.marker is None or one.marker.evaluate({"extra": ""})]


def _unmet(owner: str, requirement: Requirement) -> str:
    """What is wrong with a requirement, as one sentence; empty if it is met."""
    try:
        found = version(requirement.name)
    except PackageNotFoundError:
        return f"{owner} needs {requirement}, which is not installed: run `pip install '{requirement}'`."
    if requirement.specifier.contains(found, prereleases=True):
        return ""
    return f"{owner} needs {requirement}, but {found} is installed: run `pip install '{requirement}'`."


def ask_torch() -> dict[str, Any] | str:
    """What engine/backends.py says in a process of its own, or why it says nothing."""
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
    """GPU, and what ranks would talk over; driver: whether the machine has one of NVIDIA's."""
    if isinstance(found, str):
        yield Finding("gpu", False, f"{found}: run `python -c 'import torch'` and put right what it says.")
        return
    devices = found["devices"]
    if devices:
        yield Finding("gpu", True, f"{len(devices)} x {devices[0]}, CUDA {found['cuda']}")
    elif driver and not found["cuda"]:
        yield Finding("gpu", False, "There is a driver, but torch is built for the CPU: install torch with CUDA.")
    elif driver:
        yield Finding(
            "gpu",
            False,
            f"There is a driver, but torch sees no GPU: run nvidia-smi; CUDA {found['cuda']} may be too new for it, or "
            "CUDA_VISIBLE_DEVICES is empty.",
        )
    else:
        yield Finding("gpu", True, "none; training runs on the CPU over gloo")
    if devices and not found["nccl"]:
        yield Finding("nccl", False, "This torch has no NCCL, over which GPUs talk: install torch from pytorch.org.")
    elif devices:
        yield Finding("nccl", True, found["nccl"])
    gloo = "yes" if found["gloo"] else "This torch has no gloo, over which ranks agree: install torch from pytorch.org."
    yield Finding("gloo", found["gloo"], gloo)


def check_compiler(name: str) -> Finding:
    """Whether a C++ compiler makes a Python extension here."""
    needed = "engine.compile inductor, kernels on GPUs and DeepSpeed's CPU operators need it"
    if shutil.which(name) is None:
        return Finding("compiler", False, f"There is no {name}: install g++, or set CXX; {needed}.")
    include = sysconfig.get_path("include")
    command = [name, "-x", "c++", "-shared", "-fPIC", f"-I{include}", "-", "-o", os.devnull]
    try:
        done = subprocess.run(
            command, input="#include <Python.h>\n", capture_output=True, text=True, timeout=PATIENCE_S
        )
        said = [line for line in done.stderr.splitlines() if "error" in line] or [f"status {done.returncode}"]
    except (OSError, subprocess.TimeoutExpired) as error:
        done, said = None, [type(error).__name__]
    if done is None or done.returncode:
        text = f"{name} builds no extension ({said[0]}): install Python's headers; {needed}."
        return Finding("compiler", False, text)
    ninja = shutil.which("ninja") or Path(sysconfig.get_path("scripts"), "ninja").exists()
    return Finding("compiler", True, f"{shutil.which(name)}{', ninja' if ninja else ''}")


def check_shm(stale: list[Path]) -> Finding:
    """What runs that were killed left in shared memory."""
    if not stale:
        return Finding("shared memory", True, f"{shm_bytes() / 2**20:.0f} MiB, nothing stale")
    size = sum(path.stat().st_size for path in stale if path.exists()) / 2**20
    names = " ".join(map(str, stale[:3])) + (" ..." if len(stale) > 3 else "")
    return Finding(
        "shared memory", False, f"{len(stale)} file(s) of {size:.0f} MiB that no process of yours uses: rm {names}"
    )


def check_open_files(soft: int, hard: int) -> Finding:
    """The limit that ranks inherit; -1 is none."""
    if soft < 0 or soft >= OPEN_FILES:
        return Finding("open files", True, "no limit" if soft < 0 else str(soft))
    how = (
        "run `ulimit -n 65536`"
        if hard < 0 or hard >= OPEN_FILES
        else "ask who runs the machine to raise its hard limit"
    )
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
