"""`lgp study` from end to end: real runs, a kill in the middle, the same numbers from the commands that it names."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from run_helpers import SMALL, Lgp, call_main, eventually
from scipy import stats

from lgp_dist.config.flat import STAGES

pytestmark = pytest.mark.slow  # runs of whole stages

ROOT = Path(__file__).parents[2]
OPTIONS = [option for option in SMALL[1:] if not option.startswith(("--run-dir", "--evaluate"))]
STUDY = ("study", "stitch_init", "tiny", "--variants", "random", "--seeds", "0", "1", "--jobs", "2", "--out", "out")
VARIANTS = ("transformation_paper", "random")


def kill_in_the_middle(arguments: list[str], moment: Path) -> None:
    """Runs the study as a person does and kills it with all that it has started, once a file is there."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "lgp_dist", *arguments]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, start_new_session=True) as process:
        eventually(lambda: moment.exists() or process.poll() is not None, f"{moment} comes")
        os.killpg(process.pid, signal.SIGKILL)
        assert moment.exists(), process.stderr.read().decode()[-3000:]


def table(text: str, title: str) -> dict[str, dict[str, str]]:
    """A Markdown table below a line that begins so: cells by variant and column."""
    lines = text[text.index(title) :].splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[: lines.index("")] if line]
    return {line[0]: dict(zip(cells[0], line, strict=True)) for line in cells[2:]}


def test_a_killed_study_gives_the_table_of_its_commands(place: Path, lgp: Lgp) -> None:
    """Two variants on two seeds. Killed after a trial's ancestry, and started again: every trial's accuracies are those
    of the command that study.json names, run alone from the beginning, and the table those of SciPy on them."""
    arguments = [*STUDY, *OPTIONS, "--finetune.watch-every=1", "--finetune.watch-images=8"]
    first = place / "out" / VARIANTS[0]
    kill_in_the_middle(arguments, first / "seed0" / "ancestry" / "artifact.json")
    assert not (place / "out" / "study.json").exists() and not (first / "seed0" / "evaluate").exists()
    done = lgp(*arguments)
    assert done.status == 0, done.err
    found = json.loads((place / "out" / "study.json").read_text())
    assert [(trial["arm"], trial["seed"]) for trial in found["cells"]] == [
        (variant, seed) for variant in VARIANTS for seed in (0, 1)
    ]
    assert found["seeds"] == [0, 1] and found["versions"]["torch"] and found["machine"]["cores"]
    values: dict[tuple[str, str], list[float]] = {}
    for trial in found["cells"]:
        folder = place / "out" / trial["arm"] / f"seed{trial['seed']}"
        assert (folder / "distil" / "rows.safetensors").samefile(first / f"seed{trial['seed']}/distil/rows.safetensors")
        assert trial["starts"]["count"] == 1 and trial["starts"]["cpu_s"] > 0
        alone = f"alone/{trial['arm']}{trial['seed']}"
        assert call_main((*shlex.split(trial["command"])[1:], "--run-dir", alone)) == 0
        rows, before = (
            json.loads((place / alone / "evaluate" / name).read_text()) for name in ("paths.json", "before.json")
        )
        assert (trial["rows"], trial["before"]) == (rows, before)
        made = {stage: json.loads((place / alone / stage / "artifact.json").read_text()) for stage in STAGES}
        same = STAGES[:-1]  # an export's card has a latency, which is measured
        assert {stage: trial["ids"][stage] for stage in same} == {stage: made[stage]["id"] for stage in same}
        exported = json.loads((folder / "export" / "artifact.json").read_text())
        assert exported["files"]["model.safetensors"] == made["export"]["files"]["model.safetensors"]
        lines = [json.loads(line) for line in (place / alone / "metrics.jsonl").read_text().splitlines()]
        watched = {str(line["step"] + 1): {name[5:]: line[name] for name in line if name.startswith("top1/")}
                   for line in lines if line["stage"] == "finetune"}  # fmt: skip
        assert trial["curve"] == watched and len(watched) == 2
        assert set(trial["r2"]) == {row["key"] for row in rows if row["stitch"] is not None}
        check_cost(trial, rows, lines)
        wide = {row["key"]: row["top1"] for row in rows}["r1.0-5"]
        for name, value in (("wide", wide), ("all paths", sum(row["top1"] for row in rows) / len(rows))):
            values.setdefault((trial["arm"], name), []).append(value)
    text = (place / "out" / "table.md").read_text()
    assert text in done.out
    means, pairs = table(text, "Mean and"), table(text + "\n", "Difference from")
    for (variant, name), each in values.items():
        low, high = (
            stats.t.interval(0.95, 1, loc=sum(each) / 2, scale=stats.sem(each)) if stats.sem(each) else (each[0],) * 2
        )
        assert numbers(means[variant][name]) == pytest.approx([(low + high) / 2, (high - low) / 2], abs=0.011)
        change = [one - other for one, other in zip(each, values[VARIANTS[0], name], strict=True)]
        if variant != VARIANTS[0]:
            assert numbers(pairs[variant][name])[0] == pytest.approx(sum(change) / 2, abs=0.011)
    starts = (place / "out" / "starts.jsonl").read_text()
    again = lgp(*arguments)
    assert again.status == 0 and "4 runs, 4 of them complete" in again.err
    assert (place / "out" / "table.md").read_text() == text and (place / "out" / "starts.jsonl").read_text() == starts
    other = lgp(*arguments, "--pool.samples=77")
    assert "pool.samples was 2000, now 77" in other.sentence and "--out" in other.sentence


def numbers(cell: str) -> list[float]:
    return [float(number) for number in re.findall(r"-?\d+\.\d+", cell)]


def check_cost(trial: dict, rows: list[dict], lines: list[dict]) -> None:
    """Multiply-adds of training: 8 images in each of two steps of distillation (both rows forward and backward, the
    ancestry forward) and of fine-tuning (the path that was drawn, the ancestry)."""
    flops = {row["key"]: row["flops"] for row in rows}
    tokens, width, depth = 17, 96, 12
    block = tokens * 12 * width**2 + 2 * tokens**2 * width + 2 * 5 * tokens * width
    ancestry = 16 * 49 * width + depth * block + 5 * tokens * width + 10 * width
    distil = 2 * 8 * (3 * (flops["r0.0-5"] + flops["r1.0-5"]) + ancestry)
    drawn = [flops[line["path"][0]] for line in lines if line["stage"] == "finetune"]
    assert trial["flops"] == pytest.approx(distil + 8 * (3 * sum(drawn) + 2 * ancestry), rel=1e-6)


def test_a_trial_that_fails_is_named_and_keeps_its_sentence(place: Path, lgp: Lgp) -> None:
    """What the run said, with the run's name."""
    done = lgp("study", "rows", "tiny", "--seeds", "0", "--out", "out", *OPTIONS, "--distil.train.batch-size=65")
    assert "published, seed 0" in done.sentence and "batch_size" in done.sentence
    assert not (place / "out" / "study.json").exists()
