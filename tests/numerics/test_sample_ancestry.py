"""The ancestry that ships with the sample is what its record says."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lgp_dist.data.stream import evaluation_batches, open_split
from lgp_dist.models.build import ancestry_vit
from lgp_dist.recipes import tiny

SAMPLE = Path(__file__).parents[2] / "shards" / "sample"


@pytest.mark.slow
@torch.no_grad()
def test_accuracy_and_hash_are_as_recorded() -> None:
    record = json.loads((SAMPLE / "ancestry.json").read_text())
    path = SAMPLE / record["file"]
    assert hashlib.sha256(path.read_bytes()).hexdigest() == record["sha256"]
    config = tiny()
    vit = ancestry_vit(config).eval()
    vit.load_state_dict(load_file(path), strict=True)
    data = config.data
    index = open_split(type(data)(**{**vars(data), "root": str(SAMPLE)}), data.val_split)
    hits = [
        (vit(batch.images).argmax(1) == batch.targets)[batch.weight > 0]
        for batch in evaluation_batches(index, data, 250, rank=0, world=1)
    ]
    top1 = 100 * torch.cat(hits).float().mean().item()
    assert torch.cat(hits).numel() == 2000
    assert abs(top1 - record["top1_sample_test_2000"]) < 0.1  # two images of 2,000: rounding differs between processors
    assert top1 > 86
