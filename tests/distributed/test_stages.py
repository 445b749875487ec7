"""All stages through the command line on two processes: every engine makes the same models."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from exact_launch import ROOT, command
from run_helpers import LIMIT_S, SMALL, outcome_of
from safetensors.torch import load_file
from torture import free_port

from lgp_dist.errors import USER
from lgp_dist.run.provenance import processor
from lgp_dist.run.run_status import RunStatus

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


def by_hand(*arguments: str, **variables: str) -> list[subprocess.Popen[str]]:
    """`lgp ARGUMENTS` as two processes, with variables in which RANK stands for 0 and 1."""
    command = [sys.executable, "-m", "lgp_dist", *arguments]
    return [
        subprocess.Popen(
            command,
            env={**os.environ, **{name: value.replace("RANK", str(rank)) for name, value in variables.items()}},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]


RANKS = {"RANK": "RANK", "LOCAL_RANK": "RANK", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
MPIRUN = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "RANK", "OMPI_COMM_WORLD_LOCAL_RANK": "RANK"}
SRUN = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "RANK", "SLURM_LOCALID": "RANK"}
LAUNCHERS = {
    "torchrun": (["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"], "ddp"),
    "torch.distributed.launch": (["torch.distributed.launch", "--nproc-per-node=2", "--master-port=PORT", "-m"], "ddp"),
    "deepspeed": (["deepspeed.launcher.runner", "--num_gpus=2", "--master_port=PORT", "--module"], "zero1"),
    "accelerate launch": (
        ["accelerate.commands.launch", f"--config_file={ROOT / 'launch_configs' / 'cpu_2.yaml'}", "-m"],
        "zero1",
    ),
    "RANK and WORLD_SIZE": ([], "ddp"),
}
"""How two ranks are started, and the engine that they get."""


@pytest.mark.parametrize("name", LAUNCHERS)
def test_every_launcher_joins_two_ranks(place: Path, mark: str, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """And the log says so first, with engine, precision and devices."""
    (launch, engine), call = LAUNCHERS[name], ["ancestry", *SMALL, "--engine.device=cpu"]
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("LGP_TEST_MARK", mark)
    port = str(free_port())
    if launch:
        command = [sys.executable, "-m", *(word.replace("PORT", port) for word in launch), "lgp_dist", *call]
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
        assert done.returncode == 0, done.stderr[-4000:]
    else:
        assert [rank.wait(LIMIT_S) for rank in by_hand(*call, **RANKS, MASTER_PORT=port)] == [0, 0]
    said = [line[9:] for line in Path("run/log.txt").read_text().splitlines()]
    shown = "torchrun" if name == "torch.distributed.launch" else name
    assert said[0] == f"launch: {shown}, engine {engine} on 2 process(es), precision fp32"
    assert said[1] == f"node 0 ({socket.gethostname()}): 2 x cpu: {processor()}, 1 thread(s) per rank"
    assert outcome_of(Path("run")) == RunStatus("complete", "ancestry")


@pytest.mark.parametrize(
    ("variables", "words"),
    [(MPIRUN, "OMPI_COMM_WORLD_SIZE is 2"), (SRUN, "SLURM_STEP_NUM_TASKS is 2"), (RANKS, "MASTER_PORT are not set")],
    ids=["mpirun", "srun", "no address"],
)
def test_ranks_without_a_launcher_are_refused(place: Path, variables: dict[str, str], words: str) -> None:
    """Each with a sentence, before anything is written."""
    for rank in by_hand("ancestry", *SMALL, **variables):
        _, said = rank.communicate(timeout=LIMIT_S)
        assert rank.returncode == USER and words in said and "accelerate launch" in said and said.count("\n") == 1
    assert not Path("run").exists()


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
