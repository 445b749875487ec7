"""Where and with what a result was made."""

import os
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from lgp_dist.files import sha256

PACKAGES = (
    *("torch", "torchvision", "accelerate", "deepspeed", "timm", "webdataset", "numpy", "pillow", "simplejpeg"),
    *("safetensors", "triton"),
)


def versions() -> dict[str, str]:
    """Versions of Python, this package and what it computes with."""
    found = {"python": platform.python_version()}
    for name in ("lgp_dist", *PACKAGES):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def git_commit() -> str:
    """The commit of this source tree, empty outside a checkout; `+changes` where files outside benchmarks/ differ."""
    here = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(here), *arguments], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        commit = git("rev-parse", "HEAD")
        changed = commit and git(
            "status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)benchmarks"
        )
        return commit + ("+changes" if changed else "")
    except OSError:
        return ""


def code_hashes() -> dict[str, str]:
    """sha256 of every source file of the package, hex, by its path in the package."""
    root = Path(__file__).resolve().parents[1]
    files = sorted(root.rglob("*.py"))
    return {file.relative_to(root).as_posix(): sha256(file) for file in files}


def command() -> str:
    """The command line of this process, as a shell takes it; without the program's path."""
    return shlex.join(["lgp", *sys.argv[1:]])


def repeated_options() -> list[str]:
    """What is said of options that this process's command line has more than once."""
    options = [word.split("=")[0].replace("_", "-") for word in sys.argv[1:] if word.startswith("--")]
    found = dict.fromkeys(option for option in options if options.count(option) > 1)
    return [f"{option} is given {options.count(option)} times: the last counts" for option in found]


class Environment(TypedDict):
    """environment.json: what a run is made with."""

    machine: dict[str, Any]
    versions: dict[str, str]
    commit: str
    """Of the source tree."""
    command: str
    recipe_source: NotRequired[str]
    """Text of the file of a person's own recipe."""


def environment(recipe_source: str = "") -> Environment:
    """That of this process. recipe_source: text of the file of a person's own recipe."""
    about: Environment = {
        "machine": {
            "system": platform.system(),
            "release": platform.release(),
            "architecture": platform.machine(),
            "processor": processor(),
            "cores": os.cpu_count(),
        },
        "versions": versions(),
        "commit": git_commit(),
        "command": command(),
    }
    if recipe_source:
        about["recipe_source"] = recipe_source
    return about


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
