"""Defects of DeepSpeed 0.19.8, shown on DeepSpeed alone, and that our way round each of them works.

A test named `..._is_there` fails when DeepSpeed has fixed the defect: then take its way round out of
engine/defects.py.
"""

import json
import os
import subprocess
from typing import Any

import pytest
import torch
from exact_launch import HERE, ROOT, command
from run_helpers import LIMIT_S
from workarounds_worker import Two

pytestmark = pytest.mark.slow  # launches of several ranks


def moves() -> list[float]:
    """How far torch's SGD at rate 1 moves layer b in four steps that use a, b, a, b."""
    torch.manual_seed(0)
    module, moved = Two(), []
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    for which in "abab":
        before = module.b.weight.detach().clone()
        optimizer.zero_grad()
        module(torch.ones(2, 4), which).backward()
        optimizer.step()
        moved.append(float((module.b.weight.detach() - before).abs().max()))
    return moved


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the worker measured on two ranks."""
    folder = tmp_path_factory.mktemp("defects")
    call = [*command(2, deepspeed=True), str(HERE / "workarounds_worker.py"), str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(call, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_stages_0_to_2_leave_an_unused_layer_alone(found: dict[str, Any], stage: int) -> None:
    assert found[f"stale {stage}"] == pytest.approx(moves())


@pytest.mark.parametrize("name", ["stale 3", "stale 1 offload", "stale 2 offload", "stale 3 offload"])
def test_stale_gradients_is_there(found: dict[str, Any], name: str) -> None:
    """A layer moves in a step that does not use it: with the gradient of the last step that did."""
    assert found[name][2] > 0.1


@pytest.mark.parametrize("name", ["stale 3", "stale 1 offload", "stale 2 offload", "stale 3 offload"])
def test_forgotten_gradients_do_not_come_again(found: dict[str, Any], name: str) -> None:
    assert found[f"{name} fixed"] == pytest.approx(moves())


def test_weights_left_partitioned_is_there(found: dict[str, Any]) -> None:
    """After ZeRO-3 is destroyed the module has empty weights."""
    assert found["partitioned"] == [0, 0]


def test_made_whole_a_module_is_plain_again(found: dict[str, Any]) -> None:
    assert found["partitioned fixed"] == [16, 16]


def test_settings_of_group_0_for_all_is_there(found: dict[str, Any]) -> None:
    """ZeRO-3's universal load gives every group the decay and the step count of the first: ours is another."""
    assert found["universal"]["saved"] == {"decay": [0.5, 0.0], "steps": [2.0, 1.0]}
    assert found["universal"]["loaded"] == {"decay": [0.5, 0.5], "steps": [2.0, 2.0]}
