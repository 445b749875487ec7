"""examples/two_branches.py on two ranks, each on another branch in every step, against one process of torch alone."""

import importlib.util
import json
import shutil
from pathlib import Path
from types import ModuleType

import pytest
import torch
from exact_launch import HERE, ROOT, TOLERANCE, run_workers
from safetensors.torch import load_file
from torch import Tensor, nn

from lgp_dist.api import StepContext

EXAMPLE = ROOT / "examples" / "two_branches.py"
STEPS, WORLD = 6, 2


def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("two_branches", EXAMPLE)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def alone(steps: int = STEPS, branches: str = "") -> dict[str, Tensor]:
    """The weights when one process runs every rank's branch in turn and averages their gradients: torch's own AdamW.

    branches: of both ranks in every step, in place of the example's.
    """
    torch.set_num_threads(1)
    two = example()
    torch.manual_seed(0)
    network = two.TwoBranches()
    groups = [{"params": [weight], "weight_decay": 0.05 if weight.ndim > 1 else 0.0} for weight in network.parameters()]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, eps=1e-3)
    for step in range(steps):
        optimizer.zero_grad()
        for rank in range(WORLD):
            place = StepContext(step, 0, rank, WORLD)
            batch = two.batches(place)
            logits = network(batch.images, branches[rank] if branches else two.branch(place))
            (nn.functional.cross_entropy(logits, batch.targets) / WORLD).backward()
        optimizer.step()
    return {name: value.detach() for name, value in network.state_dict().items()}


def difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - value).abs().max()) for name, value in other.items())


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["2", "3", "ddp"])
def test_ranks_equal_one_process(tmp_path: Path, engine: str) -> None:
    """ZeRO-2, of which the page speaks, ZeRO-3 and DDP."""
    stage = [] if engine == "ddp" else ["--zero_stage", engine]
    done = run_workers(WORLD, engine != "ddp", [*stage, str(EXAMPLE), str(tmp_path)])
    assert done.returncode == 0, done.stderr[-6000:]
    assert difference(load_file(tmp_path / "network.safetensors"), alone()) <= TOLERANCE


@pytest.mark.slow
def test_a_training_that_ends_early_goes_on(tmp_path: Path) -> None:
    """From its newest checkpoint, without an earlier batch; under ZeRO-2 and, from the same, under ZeRO-3 and DDP. Then
    the same processes train again."""
    worker, folder = str(HERE / "own_task_worker.py"), tmp_path / "out"
    done = run_workers(WORLD, True, ["--zero_stage", "2", worker, str(folder), "4"])
    assert done.returncode != 0 and "the disk of this node is gone" in done.stderr
    assert (folder / "checkpoints" / "step-00000002").is_dir()
    for engine in ("2", "3", "ddp"):
        place = Path(shutil.copytree(folder, tmp_path / engine))
        stage = [] if engine == "ddp" else ["--zero_stage", engine]
        done = run_workers(WORLD, engine != "ddp", [*stage, worker, str(place), "1"])
        assert done.returncode == 0, done.stderr[-6000:]
        assert "The training goes on from step" in done.stderr
        for trained in (place, place / "second"):
            steps = [json.loads(line)["step"] for line in (trained / "metrics.jsonl").read_text().splitlines()]
            assert steps == [*range(STEPS)]
            assert difference(load_file(trained / "network.safetensors"), alone()) <= TOLERANCE


def test_the_comparison_is_not_empty() -> None:
    """Ranks are on different branches in every step, every weight moves, and other branches give other weights."""
    two, expected = example(), alone()
    for step in range(STEPS):
        assert {two.branch(StepContext(step, 0, rank, WORLD)) for rank in range(WORLD)} == {"w", "n"}
    before = alone(steps=0)
    assert all(float((value - before[name]).abs().max()) > 100 * TOLERANCE for name, value in expected.items())
    assert difference(alone(branches="ww"), expected) > 100 * TOLERANCE
