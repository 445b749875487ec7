"""distil.ancestry_precision and finetune.ancestry_precision through their stages."""

import json
from pathlib import Path

import pytest
from run_helpers import SMALL, Lgp

from lgp_dist.run.metrics import read_metrics

pytestmark = pytest.mark.slow  # runs of whole stages


@pytest.mark.parametrize("stage", ["distil", "finetune"])
def test_targets_are_rounded_and_labels_are_not(finished_place: Path, lgp: Lgp, stage: str) -> None:
    """In fp32 with an ancestry in bf16: the first step's losses to the labels are the same numbers, those to the
    ancestry nearly; the artifact says so, and a run with another setting does not take it for its own."""
    option = f"--{stage}.ancestry-precision"
    found = []
    for precision in ("fp32", "bf16"):
        done = lgp(stage, *SMALL, "--engine.precision=fp32", option, precision, "--force")
        assert done.status == 0, done.err
        found.append(next(read_metrics(Path("run/metrics.jsonl"), stage)))
    exact, rounded = found
    for name in exact:
        if name.endswith("cls"):
            assert rounded[name] == exact[name]
        elif name.endswith(("pred", "block", "attention", "inverse")):
            assert rounded[name] != exact[name] and rounded[name] == pytest.approx(exact[name], rel=2e-2)
    assert any(name.endswith("pred") for name in exact)
    about = json.loads(Path(f"run/{stage}/artifact.json").read_text())
    assert about["config"][f"{stage}.ancestry_precision"] == "bf16"
    other = lgp(stage, *SMALL, "--engine.precision=fp32", option, "fp32")
    assert other.status == 2 and f"{stage}.ancestry_precision" in other.sentence
