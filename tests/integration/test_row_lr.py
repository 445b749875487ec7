"""finetune.row_lr through the stage; tests/distributed compares it with one process under every engine."""

import json
from pathlib import Path

import pytest
from run_helpers import SMALL, Lgp
from safetensors.torch import load_file

pytestmark = pytest.mark.slow  # runs of whole stages


def tuned(lgp: Lgp, *arguments: str) -> tuple[dict, list[dict]]:
    """The weights after six steps of fine-tuning, and their lines of metrics."""
    done = lgp("finetune", *SMALL, "--finetune.train.max-steps=6", "--force", *arguments)
    assert done.status == 0, done.err
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    return load_file("run/finetune/pool.safetensors"), [line for line in lines if line["stage"] == "finetune"]


def test_a_row_of_factor_0_stays_and_factors_of_1_change_nothing(finished_place: Path, lgp: Lgp) -> None:
    """The wide row keeps every bit, narrow row and stitch layers do not; the rate that is logged is the recipe's."""
    before, (plain, lines) = load_file("run/pool/pool.safetensors"), tuned(lgp)
    ones, same = tuned(lgp, "--finetune.row-lr", "1", "1")
    assert all(ones[name].equal(value) for name, value in plain.items())
    assert [line["loss"] for line in same] == [line["loss"] for line in lines]
    still, slow = tuned(lgp, "--finetune.row-lr", "1", "0")
    wide = {name for name in before if name.startswith(("stem.rows.1.", "units.row1_", "head.rows.1."))}
    assert wide and all(still[name].equal(before[name]) for name in wide)
    moved = {name.split(".")[1][:6] for name in before.keys() - wide if not still[name].equal(before[name])}
    assert {"row0_b", "stitch"} <= moved
    assert any(not plain[name].equal(before[name]) for name in wide)
    assert [line["lr"] for line in slow] == [line["lr"] for line in lines]
