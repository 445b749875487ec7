"""`scripts/same_numbers REV`: trains the same in two trees, through the command line alone, and compares the files."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from safetensors.torch import load_file
from torch import Tensor

ROOT = Path(__file__).parents[2]
PARTS = ("metrics.jsonl", "distil", "pool", "finetune", "evaluate", "descend")
"""What is kept of a run directory."""
TENSORS = ("distil/rows", "pool/pool", "finetune/pool", "descend/model")
FREE = {"images_per_s"}
"""Fields of metrics that depend on the machine, as those that end in `_s` (seconds) do."""
RENAMED: dict[str, str] = {}
"""Fields of metrics and of paths.json, and tensors, that were renamed on purpose: REV's name to this tree's."""
RENAMED_OPTIONS: dict[str, str] = {}
"""Options below that were renamed on purpose: this tree's name to REV's."""
OPTIONS = (
    "--engine.threads=1",
    "--pool.stitch-init=least_squares",
    "--finetune.sandwich",
    "--finetune.train.accumulate=4",
    "--distil.train.max-steps=60",
    "--finetune.train.max-steps=60",
    "--checkpoint.every=0",
    "--evaluate.no-before",
    "--export.formats",
    "--export.images=4",
)
LAUNCH = [
    "accelerate.commands.launch",
    "--config_file",
    "launch_configs/cpu_2.yaml",
    "--zero_stage",
    "1",
    "-m",
    "lgp_dist",
]
RUNS = {
    "one process": (["lgp_dist"], ()),
    "two ranks, ZeRO-1": (LAUNCH, ("--finetune.train.accumulate=2",)),
}
"""Arguments of `python -m`, and options."""


@dataclass(frozen=True)
class Options:
    """Compares losses, paths, learning rates, accuracies and weights of two trees; status 1 where they differ."""

    rev: tyro.conf.Positional[str]
    """A commit, or a folder that holds another tree."""
    keep: Path | None = None
    """Folder of results by commit, for both trees where they are clean. Results of another machine do not count."""


@contextlib.contextmanager
def tree_of(rev: str) -> Iterator[Path]:
    """The folder `rev`, or a temporary worktree of that commit."""
    if Path(rev).is_dir():
        yield Path(rev).resolve()
        return
    with tempfile.TemporaryDirectory(prefix="same_numbers_") as folder:
        tree = Path(folder) / "tree"
        git(ROOT, "worktree", "add", "--quiet", "--detach", str(tree), rev)
        try:
            yield tree
        finally:
            git(ROOT, "worktree", "remove", "--force", str(tree))


def git(tree: Path, *arguments: str) -> str:
    """What git prints."""
    return subprocess.run(["git", "-C", str(tree), *arguments], check=True, stdout=subprocess.PIPE, text=True).stdout


def results(tree: Path, folder: Path, keep: Path | None, renamed: dict[str, str]) -> Path:
    """A folder with a run directory of each of RUNS, in `keep` where the tree is a clean commit."""
    if keep and not git(tree, "status", "--porcelain"):
        folder = keep / git(tree, "rev-parse", "HEAD").strip()
        if folder.is_dir():
            print(f"{tree}: results of this commit are in {folder}", flush=True)
            return folder
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for name, (module, options) in RUNS.items():
        print(f"{tree}: {name} ...", flush=True)
        target = partial / name
        with tempfile.TemporaryDirectory(prefix="same_numbers_") as place:
            train(tree, module, [renamed.get(option, option) for option in (*OPTIONS, *options)], Path(place) / "run")
            for part in PARTS:
                copy = shutil.copytree if (Path(place) / "run" / part).is_dir() else shutil.copyfile
                target.mkdir(parents=True, exist_ok=True)
                copy(Path(place) / "run" / part, target / part)
    return partial.rename(folder)


def train(tree: Path, module: list[str], options: list[str], run: Path) -> None:
    """`python -m MODULE run tiny_paper OPTIONS` in a tree, with its package."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONSAFEPATH": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    where = [sys.executable, "-c", "import lgp_dist; print(lgp_dist.__path__[0])"]
    package = subprocess.run(where, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    if Path(package) != tree / "lgp_dist":
        sys.exit(f"{tree} would train with the package of {package}.")
    call = [sys.executable, "-m", *module, "run", "tiny_paper", "--run-dir", str(run), *options]
    done = subprocess.run(
        call, cwd=tree, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{tree}: {' '.join(call)} has failed:\n{done.stdout[-6000:]}")


def first_difference(old: Path, new: Path) -> str:
    """Where two run directories differ first, or nothing."""
    lines = [[counted(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (old, new)]
    if len(lines[0]) != len(lines[1]):
        return f"metrics.jsonl: {len(lines[0])} lines and {len(lines[1])}"
    for one, other in zip(*lines, strict=True):
        if found := of_values(one, other):
            return f"metrics.jsonl, stage {other['stage']}, step {other['step']}: {found}"
    for name in TENSORS:
        pair = [load_file(run / f"{name}.safetensors") for run in (old, new)]
        if found := of_tensors(*pair):
            return f"{name}.safetensors: {found}"
    tables = [[counted(json.dumps(row)) for row in json.loads((run / "evaluate" / "paths.json").read_text())]
              for run in (old, new)]  # fmt: skip
    for one, other in zip(*tables, strict=True):
        if found := of_values(one, other):
            return f"evaluate/paths.json, {other['key']}: {found}"
    return ""


def counted(line: str) -> dict[str, Any]:
    """A JSON object without what is about the machine, under this tree's names."""
    fields = {RENAMED.get(name, name): value for name, value in json.loads(line).items()}
    return {name: value for name, value in fields.items() if name not in FREE and not name.endswith("_s")}


def of_values(old: dict[str, Any], new: dict[str, Any]) -> str:
    """The first field of REV in which two objects differ; fields that this tree adds are no difference."""
    for name in old:
        if name not in new or old[name] != new[name]:
            return f"{name} is {old[name]} and {new.get(name, 'absent')}"
    return ""


def of_tensors(old: dict[str, Tensor], new: dict[str, Tensor]) -> str:
    """The first tensor of which type, shape or bytes differ."""
    old = {RENAMED.get(name, name): value for name, value in old.items()}
    if old.keys() != new.keys():
        return f"tensors of one tree alone: {', '.join(sorted(old.keys() ^ new.keys()))}"
    for name, value in new.items():
        before = old[name]
        if (before.dtype, before.shape) != (value.dtype, value.shape):
            return f"{name} is {before.dtype} {tuple(before.shape)} and {value.dtype} {tuple(value.shape)}"
        if before.numpy().tobytes() != value.numpy().tobytes():
            return f"{name} differs by up to {float((before - value).abs().max()):.3g}"
    return ""


def main() -> int:
    options, status = tyro.cli(Options, prog="scripts/same_numbers"), 0
    with tempfile.TemporaryDirectory(prefix="same_numbers_") as folder, tree_of(options.rev) as tree:
        old = results(tree, Path(folder) / "old", options.keep, RENAMED_OPTIONS)
        new = results(ROOT, Path(folder) / "new", options.keep, {})
        for name in RUNS:
            found = first_difference(old / name, new / name)
            status |= bool(found)
            steps = len((new / name / "metrics.jsonl").read_text().splitlines())
            print(f"{name}: {found or f'metrics of {steps} steps, weights and accuracies are identical'}", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
