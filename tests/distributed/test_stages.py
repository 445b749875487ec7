"""All stages through the command line on two processes: every engine makes the same models."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from exact_launch import command
from run_helpers import LIMIT_S, SMALL
from safetensors.torch import load_file

pytestmark = pytest.mark.slow  # launches of several ranks

ENGINES = ("zero1", "zero3", "ddp", *["zero2"] * ("LGP_LONG_TESTS" in os.environ))
"""LGP_LONG_TESTS=1 runs ZeRO-2 too."""
EPS = [f"--{stage}.train.eps=1e-3" for stage in ("distil", "finetune")]
"""With AdamW's default, rounding of a gradient that is zero in exact arithmetic would become a step of full size."""
WATCH = ["--finetune.watch-every=2", "--finetune.watch-images=8", "--finetune.policy=spread"]
COMPILERS = ("cc", "c++", "gcc", "g++", "clang", "clang++", "nvcc", "ninja", "cmake", "as", "ld")
"""And what they call."""


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of compilers that fail, and note in `noted` that they were called."""
    folder = tmp_path_factory.mktemp("compilers")
    for name in COMPILERS:
        (folder / name).write_text(f'#!/bin/sh\necho "{name} $*" >> {folder}/noted\nexit 1\n')
        (folder / name).chmod(0o755)
    return folder


@pytest.fixture(scope="module")
def runs(inputs: Path, calls: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Run directories by engine."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{calls}:{os.environ['PATH']}"}
    environment |= {"CC": f"{calls}/cc", "CXX": f"{calls}/c++", "TORCH_EXTENSIONS_DIR": str(calls / "built")}
    found = {}
    for engine in ENGINES:
        place = tmp_path_factory.mktemp(engine) / "place"
        shutil.copytree(inputs, place)
        launch = command(2, deepspeed=engine != "ddp")
        stage = [] if engine == "ddp" else ["--zero_stage", engine[-1]]
        done = subprocess.run(
            [*launch, *stage, "-m", "lgp_dist", "run", *SMALL, *EPS, *WATCH, "--engine.device=cpu"],
            cwd=place,
            env=environment,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        found[engine] = place / "run"
    return found


@pytest.mark.parametrize("engine", ENGINES[1:])
@pytest.mark.parametrize("file", ["distil/rows.safetensors", "finetune/pool.safetensors"])
def test_engines_make_the_same_weights(runs: dict[str, Path], engine: str, file: str) -> None:
    """Distillation trains everything on every rank, fine-tuning a path for each."""
    left, right = load_file(runs["zero1"] / file), load_file(runs[engine] / file)
    assert left.keys() == right.keys()
    assert max(float((left[name] - right[name]).abs().max()) for name in left) <= 1e-5


@pytest.mark.parametrize("engine", ENGINES)
def test_paths_are_measured_while_they_train(runs: dict[str, Path], engine: str) -> None:
    """Under ZeRO-3 too: all 18 of them, as many forwards on both ranks; the last line has what every rank drew."""
    lines = [json.loads(line) for line in (runs[engine] / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if line["stage"] == "finetune"][-1]
    measured = {name: value for name, value in last.items() if name.startswith("top1/")}
    assert len(measured) == 18 and all(0 <= value <= 100 for value in measured.values())
    assert last["world"] == 2 and len(last["path"]) == 2
    ledger = json.loads((runs[engine] / "finetune" / "ledger.json").read_text())
    assert ledger["draws"] == 4 and ledger["ranks"] == 2


def test_nothing_is_compiled(runs: dict[str, Path], calls: Path) -> None:
    """As `engine.compile`, kernels and offload are off: a run needs no compiler, and builds nothing."""
    assert not (calls / "noted").exists(), (calls / "noted").read_text()
    assert not (calls / "built").exists() or not [path for path in (calls / "built").rglob("*") if path.is_file()]
    called = subprocess.run([calls / "cc", "x.c"], check=False)
    assert called.returncode == 1 and (calls / "noted").read_text() == "cc x.c\n", "they would have been noted"
