"""Two processes under DeepSpeed ZeRO-1, each on its own path, against one process that runs all paths in turn."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cases import BATCH, CASES, SEED, STEPS, Case, build, small_data, train_config
from safetensors.torch import load_file

from lgp_dist.data.stream import TrainStream, open_split
from lgp_dist.sampling import PathSampler

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).parent / "finetune_worker.py"
TOPOLOGIES = [(1, 1), (2, 0), (2, 1)]
"""Processes and ZeRO stage."""


def launch(folder: Path, world: int, stage: int) -> None:
    """Runs the worker through the shipped launch file on so many processes, with that ZeRO stage."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "launch_configs/cpu_2.yaml"]
    command += ["--num_processes", str(world), "--zero_stage", str(stage)]
    folder.mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(WORKER), str(folder)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zero1")
    before = set(os.listdir("/dev/shm"))
    for world, stage in TOPOLOGIES:
        launch(folder / f"zero{stage}-{world}", world, stage)
    assert set(os.listdir("/dev/shm")) <= before, "the run left shared memory behind"
    return folder


def rate(step: int) -> float:
    """Warm-up over 2 of 5 steps from 1e-3 to 1e-2, then a cosine to 1e-3 at step 5."""
    if step < 2:
        return 1e-3 + step * (1e-2 - 1e-3) / 2
    return 1e-3 + 0.5 * (1e-2 - 1e-3) * (1 + math.cos(math.pi * step / STEPS))


def reference(case: Case, world: int) -> dict[str, torch.Tensor]:
    """What one process computes: every rank's loss in turn, gradients averaged, clipped, one AdamW step.

    Gradients are summed over micro-steps first, then over ranks, as the two ranks do.
    """
    torch.set_num_threads(1)
    pool, ancestry = build()
    data, config = small_data(), train_config(case)
    streams = [TrainStream(open_split(data, "train"), data, config, SEED, rank, world) for rank in range(world)]
    batches = [list(stream.batches(0, STEPS)) for stream in streams]
    sampler = PathSampler(pool.space.paths, case.policy, SEED)
    matrices = [p for n, p in pool.named_parameters() if p.ndim > 1 and "token" not in n and "pos_embed" not in n]
    others = [p for n, p in pool.named_parameters() if not any(p is m for m in matrices)]
    groups = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.1, eps=case.eps)
    for step in range(STEPS):
        totals = [torch.zeros_like(parameter) for parameter in pool.parameters()]
        for rank in range(world):
            for parameter in pool.parameters():
                parameter.grad = torch.zeros_like(parameter)
            for micro in range(case.accumulate):
                batch = batches[rank][step * case.accumulate + micro]
                path = sampler.draw(step, micro, rank, world)
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=case.precision == "bf16"):
                    logits, target = pool(batch.images, path).float(), ancestry(batch.images)[0].float()
                loss = F.cross_entropy(logits, batch.targets)
                loss = loss - (target.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()
                (loss / (world * case.accumulate)).backward()
            totals = [total + parameter.grad for total, parameter in zip(totals, pool.parameters(), strict=True)]
        for total, parameter in zip(totals, pool.parameters(), strict=True):
            parameter.grad = total
        if case.clip_grad:
            torch.nn.utils.clip_grad_norm_(pool.parameters(), case.clip_grad)
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        optimizer.step()
    return pool.state_dict()


def largest_difference(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    assert left.keys() == right.keys()
    return max(float((left[name] - right[name]).abs().max()) for name in left)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize(("world", "stage"), TOPOLOGIES)
def test_ranks_equal_one_process(results: Path, case: Case, world: int, stage: int) -> None:
    """fp32 to 1e-6; bf16 computes under autocast with fp32 gradients, so its order of summation is the same too."""
    expected = reference(case, world)
    for rank in range(world):
        found = load_file(results / f"zero{stage}-{world}" / f"{case.name}-rank{rank}-of{world}.safetensors")
        assert largest_difference(found, expected) <= 1e-6


def test_ranks_took_different_paths_and_the_choice_matters() -> None:
    """The comparison is not empty: ranks differ in their paths, and another seed of paths gives other weights."""
    pool, _ = build()
    sampler = PathSampler(pool.space.paths, "independent", SEED)
    pairs = [(sampler.draw(step, 0, 0, 2), sampler.draw(step, 0, 1, 2)) for step in range(STEPS)]
    assert any(left != right for left, right in pairs)
    independent, shared = (reference(case, world=2) for case in (CASES[1], CASES[0]))
    assert largest_difference(independent, shared) > 1e-3


def test_global_batch_does_not_depend_on_the_number_of_ranks() -> None:
    """The images of a step on two ranks are those of one rank."""
    data, config = small_data(), train_config(CASES[0])
    index = open_split(data, "train")
    parts = [next(TrainStream(index, data, config, SEED, rank, 2).batches(0, 1)).images for rank in range(2)]
    whole = next(TrainStream(index, data, config, SEED, 0, 1).batches(0, 1)).images
    assert whole.shape[0] == BATCH
    assert torch.equal(torch.cat(parts), whole)
