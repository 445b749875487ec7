"""metrics.jsonl: what an attempt replaces, read from the file's end, against a rule that reads it whole."""

import json
import random
import tracemalloc
from collections.abc import Iterable
from pathlib import Path

import pytest

from lgp_dist.run import metrics
from lgp_dist.run.metrics import MetricsFile, read_lines, read_metrics

ORDER = ["ancestry", "distil", "finetune"]


def text_of(lines: Iterable[tuple[str, int]]) -> str:
    return "".join(json.dumps({"stage": stage, "step": step, "loss": step / 7}) + "\n" for stage, step in lines)


def kept(text: str, stage: str, first: int) -> list[dict[str, object]]:
    """Every whole line of a file but those of this stage from its first step on and those of later stages."""
    found = [json.loads(line) for line in text.split("\n")[:-1]]
    later = ORDER[ORDER.index(stage) + 1 :]
    return [
        line
        for line in found
        if not (line["stage"] in later or (line["stage"] == stage and int(str(line["step"])) >= first))
    ]


@pytest.mark.slow
def test_resume_over_half_a_million_lines_needs_no_memory(tmp_path: Path) -> None:
    """Neither the first write of a resumed stage nor a pass over its lines holds the file."""
    path = tmp_path / "metrics.jsonl"
    text = text_of([("distil", step) for step in range(100_000)] + [("finetune", step) for step in range(400_000)])
    path.write_text(text)
    tracemalloc.start()
    file = MetricsFile(path, "finetune", 390_000)
    assert file.append([{"step": 390_000, "loss": 1.0}]) == ""
    count = sum(1 for _ in read_metrics(path, "finetune"))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 390_001 and peak < 1 << 20 < len(text) / 20
    *before, last = path.read_text().splitlines()
    assert [json.loads(line) for line in before] == kept(text, "finetune", 390_000)
    assert json.loads(last) == {"stage": "finetune", "step": 390_000, "loss": 1.0}


@pytest.mark.parametrize("block", [1, 7, 100, 1 << 16])
def test_cut_is_that_of_the_whole_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    """Files of some stages and steps, with and without a cut-off line, resumed anywhere, in blocks of any size."""
    monkeypatch.setattr(metrics, "BLOCK", block)
    chance, path = random.Random(block), tmp_path / "metrics.jsonl"
    for _ in range(60):
        text = text_of((stage, step) for stage in ORDER for step in range(chance.randrange(6)))
        cut = chance.choice(["", "", '{"stage": "fine', '{"stage": "distil", "step": 3}'])
        stage, first = chance.choice(ORDER), chance.randrange(7)
        path.write_text(text + cut)
        file, steps = MetricsFile(path, stage, first), [{"step": first}, {"step": first + 1}]
        assert file.append(steps[:1]) == file.append(steps[1:]) == ""
        assert list(read_lines(path)) == kept(text, stage, first) + [{"stage": stage, **line} for line in steps]


def test_stage_of_no_pipeline_keeps_other_stages(tmp_path: Path) -> None:
    """Training that is no stage of the pipeline replaces its own lines alone."""
    path = tmp_path / "metrics.jsonl"
    for first in (0, 2):
        for stage in ("finetune", "downstream"):
            if first == 0 or stage == "downstream":
                MetricsFile(path, stage, first).append([{"step": step} for step in range(first, 4)])
    found = [(line["stage"], line["step"]) for line in read_lines(path)]
    assert found == [(stage, step) for stage in ("finetune", "downstream") for step in range(4)]


def test_missing_file_and_lines_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert list(read_lines(path)) == list(read_metrics(path, "distil")) == []
    path.write_bytes(b'{"stage": "distil", "step": 0}\n{"stage": "dis\n\xff\xfe\n{"stage": "distil", "step": 1}\n')
    assert [line["step"] for line in read_metrics(path, "distil")] == [0, 1]
