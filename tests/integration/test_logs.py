"""Places of logs that are full or gone: the run computes what it would have, ends well, and says what was lost."""

import json
import logging
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from run_helpers import LIMIT_S, SMALL
from safetensors.torch import load_file

from lgp_dist.run.log import end_log, open_log
from lgp_dist.run.metrics import MetricsFile, read_metrics

pytestmark = pytest.mark.slow  # runs of whole stages

ROOT = Path(__file__).parents[2]
LARGE = 32 << 20
"""Bytes that a file may have in a limited process: all artifacts, but not logs that are longer already."""
LIMITED = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({LARGE}, {LARGE}))"
MAIN = "import sys; from lgp_dist.cli import main; sys.argv[0] = 'lgp'; main()"


def lines_of(stage: str, steps: range) -> list[dict[str, object]]:
    return [{"stage": stage, "step": step, "loss": step / 7} for step in steps]


def test_metrics_lose_whole_lines_on_a_full_disk(tmp_path: Path) -> None:
    """A real limit of the kernel, met in the middle of a line, then lifted: what is there is whole and in order."""
    path, kept, limits = tmp_path / "metrics.jsonl", [], resource.getrlimit(resource.RLIMIT_FSIZE)
    file = MetricsFile(path, "s")
    try:
        for step in range(60):
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000 if step < 50 else limits[0], limits[1]))
            before, problem = file.lost, file.append(lines_of("s", range(2 * step, 2 * step + 2)))
            assert problem == ("" if file.lost == before else "File too large") and file.lost - before in (0, 2)
            kept += [2 * step, 2 * step + 1] if not problem else []
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in found] == kept and len(kept) + file.lost == 120
    assert 0 < kept.index(100) < 100 and file.lost > 50


def test_metrics_that_cannot_begin_keep_what_there_is(tmp_path: Path) -> None:
    """The lines of an earlier attempt go once, and only once, there is room for those of this one."""
    path = tmp_path / "metrics.jsonl"
    MetricsFile(path, "a").append(lines_of("a", range(9)))
    MetricsFile(path, "s").append(lines_of("s", range(9)))
    before, file, limits = path.read_bytes(), MetricsFile(path, "s", 4), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        assert file.append(lines_of("s", range(4, 6))) == "File too large"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before and [entry.name for entry in tmp_path.iterdir()] == [path.name]
    assert file.append(lines_of("s", range(6, 7))) == "" and file.lost == 2
    assert [line["step"] for line in read_metrics(path, "s")] == [0, 1, 2, 3, 6]
    assert len(list(read_metrics(path, "a"))) == 9


def test_log_on_a_full_device(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "log.txt").symlink_to("/dev/full")
    log = logging.getLogger("lgp")
    open_log(tmp_path / "log.txt")
    try:
        for number in range(7):
            log.info("line %d", number)
        end_log()
    finally:
        for handler in list(log.handlers):
            log.removeHandler(handler)
            handler.close()
    shown = capfd.readouterr().err
    assert [int(number) for number in re.findall(r"line (\d)", shown)] == list(range(7))
    assert shown.count("log.txt cannot be written (No space left on device)") == 1
    assert "log.txt has lost 8 lines of the log" in shown, "the sentence about it too"
    assert "Traceback" not in shown and "Logging error" not in shown


@pytest.fixture
def ready(finished: Path, tmp_path: Path) -> Path:
    """A run that is complete up to stage finetune, with logs that are longer than a limited process may write."""
    shutil.copytree(finished, tmp_path / "place")
    run = tmp_path / "place" / "run"
    for stage in ("finetune", "evaluate", "descend", "export"):
        shutil.rmtree(run / stage)
    filling = {"stage": "ancestry", "step": 0, "loss": 0.0, "filling": "x" * LARGE}
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(filling) + "\n")
    os.truncate(run / "log.txt", LARGE + 1)
    return tmp_path / "place"


def finetune(place: Path, limited: bool, gone: bool) -> subprocess.CompletedProcess[str]:
    """Stage finetune in its own process. limited: no log file has room; gone: stdout and stderr are closed pipes."""
    ends = [os.pipe() for _ in range(2)] if gone else []
    for read, _ in ends:
        os.close(read)
    to = [write for _, write in ends] or [subprocess.PIPE, subprocess.PIPE]
    code = f"{LIMITED}; {MAIN}" if limited else MAIN
    done = subprocess.run(
        [sys.executable, "-c", code, "finetune", *SMALL, "--checkpoint.every=1"],
        cwd=place,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=to[0],
        stderr=to[1],
        text=True,
        timeout=LIMIT_S,
    )
    for _, write in ends:
        os.close(write)
    return done


@pytest.mark.parametrize(
    ("limited", "gone"), [(True, False), (True, True)], ids=["files are full", "terminal gone and files full"]
)
def test_run_is_what_it_would_be(ready: Path, finished: Path, limited: bool, gone: bool) -> None:
    """Weights bit for bit, status 0, the checkpoint of step 1, and on a terminal how many lines were lost."""
    sizes = {name: (ready / "run" / name).stat().st_size for name in ("metrics.jsonl", "log.txt")}
    done = finetune(ready, limited, gone)
    assert done.returncode == 0, done.stderr
    found, expected = (load_file(place / "run" / "finetune" / "pool.safetensors") for place in (ready, finished))
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    assert (ready / "run" / "checkpoints" / "finetune" / "step-00000001" / "manifest.json").is_file()
    assert json.loads((ready / "run" / "outcome.json").read_text())["outcome"] == "complete"
    assert {name: (ready / "run" / name).stat().st_size for name in sizes} == sizes, "and nothing half-written"
    if not gone:
        assert "run/log.txt cannot be written (File too large)" in done.stderr
        assert "finetune: run/metrics.jsonl has lost 2 lines" in done.stderr
        assert re.search(r"run/log.txt has lost \d+ lines of the log", done.stderr)
        assert "Traceback" not in done.stderr
