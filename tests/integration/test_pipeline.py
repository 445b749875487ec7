"""The whole pipeline through `accelerate launch` on two processes with DeepSpeed, on real images, cut short."""

import csv
import json
import os
import signal
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from run_helpers import LIMIT_S, shared_memory_goes
from safetensors.torch import load_file

from lgp_dist.config.flat import STAGES
from lgp_dist.errors import PREEMPTED
from lgp_dist.models.descendant import load_descendant

pytestmark = pytest.mark.slow  # runs of whole stages

ROOT = Path(__file__).parents[2]
STEPS = 12
SHORT = ["--distil.train.max-steps", str(STEPS), "--finetune.train.max-steps", str(STEPS), "--evaluate.no-before"]


def lgp(*arguments: str, launched: bool) -> subprocess.CompletedProcess[str]:
    """Runs `lgp`, alone or under `accelerate launch` with the shipped file."""
    launcher = ["accelerate.commands.launch", "--config_file", "launch_configs/cpu_2.yaml", "-m"] if launched else []
    command = [sys.executable, "-m", *launcher, "lgp_dist", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT_S)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run's directory and what it printed."""
    run = tmp_path_factory.mktemp("run") / "tiny"
    with shared_memory_goes():
        done = lgp("run", "tiny", "--run-dir", str(run), *SHORT, launched=True)
        assert done.returncode == 0, done.stderr[-4000:]
    return run, done.stdout


def test_every_stage_leaves_a_complete_artifact(finished: tuple[Path, str]) -> None:
    run, _ = finished
    for stage in STAGES:
        record = json.loads((run / stage / "artifact.json").read_text())
        assert record["stage"] == stage
        assert record["world"] == 2
        assert all((run / stage / name).is_file() for name in record["files"])
    assert not list(run.glob(".*partial*"))


def test_the_log_begins_with_what_differs_from_the_recipe(finished: tuple[Path, str]) -> None:
    """Once, though two ranks run."""
    log = (finished[0] / "log.txt").read_text()
    before, _, after = log.partition("begins on 2 process(es)")
    for setting in ("distil.train.max_steps 12 (recipe 0)", "evaluate.before False (recipe True)"):
        assert before.count(setting) == 1 and setting not in after
    assert "run_dir" not in before


def test_metrics_have_a_line_per_step(finished: tuple[Path, str]) -> None:
    run, _ = finished
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for stage in ("distil", "finetune"):
        steps = [line for line in lines if line["stage"] == stage]
        assert [line["step"] for line in steps] == list(range(STEPS))
        for line in steps:
            assert {"loss", "lr", "images_per_s", "data_wait_s", "step_time_s"} <= line.keys()
    finetune = [line for line in lines if line["stage"] == "finetune"]
    assert all({"cls", "pred"} <= line.keys() and len(line["path"]) == 8 for line in finetune)
    assert any(line["path"][0] != line["path"][1] for line in finetune), "ranks should draw different paths"
    for line in finetune:
        assert line["loss"] == pytest.approx(line["cls"] + line["pred"], rel=1e-5)
    distil = next(line for line in lines if line["stage"] == "distil")
    names = {f"row{row}/{part}" for row in (0, 1) for part in ("cls", "pred", "block", "attention")}
    assert names | {"row0/inverse"} <= distil.keys()
    assert "row1/inverse" not in distil, "the wide row needs no map to its own width"


def test_paths_are_evaluated_and_shown(finished: tuple[Path, str]) -> None:
    run, printed = finished
    rows = json.loads((run / "paths.json").read_text())
    planned = json.loads(lgp("paths", "tiny", "--json", launched=False).stdout)
    assert [{**row, "top1": None, "top5": None} for row in rows] == planned
    assert all(0 <= row["top1"] <= row["top5"] <= 100 for row in rows)
    with (run / "paths.csv").open() as file:
        assert [line["key"] for line in csv.DictReader(file)] == [row["key"] for row in rows]
    assert all(row["key"] in printed for row in rows)
    assert str(run) in printed


def test_plots_report_and_tracking(finished: tuple[Path, str]) -> None:
    run, _ = finished
    assert (run / "pareto.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (run / "pareto.svg").read_text()
    external: list[str] = []

    class Links(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            external.extend(value for name, value in attrs if name in ("src", "href") and value and "//" in value)

    Links().feed((run / "report.html").read_text())
    assert not external
    assert list((run / "tracking").rglob("events.out.tfevents.*"))
    environment = json.loads((run / "environment.json").read_text())
    assert environment["versions"]["torch"] == torch.__version__.split("+")[0]
    assert json.loads((run / "config.json").read_text())["finetune.train.max_steps"] == STEPS
    assert "finetune" in (run / "log.txt").read_text()


def test_export_loads_and_meets_the_budget(finished: tuple[Path, str]) -> None:
    run, _ = finished
    config = json.loads((run / "export" / "config.json").read_text())
    model = load_descendant(config, load_file(run / "export" / "model.safetensors"))
    assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    chosen = json.loads((run / "descend" / "descendant.json").read_text())
    assert config["lgp"]["path"] == chosen["key"]
    rows = json.loads((run / "paths.json").read_text())
    fitting = [row for row in rows if row["params"] <= 400e3]
    assert chosen["top1"] == max(row["top1"] for row in fitting)
    assert sum(parameter.numel() for parameter in model.parameters()) == chosen["params"] <= 400e3


def test_run_again_skips_everything(finished: tuple[Path, str]) -> None:
    """The same command, on one process this time, finds all artifacts complete and leaves them as they are."""
    run, _ = finished
    before = {path: path.read_bytes() for stage in STAGES for path in (run / stage).iterdir()}
    again = lgp("run", "tiny", "--run-dir", str(run), *SHORT, launched=False)
    assert again.returncode == 0, again.stderr[-4000:]
    assert again.stderr.count("skipped") == len(STAGES)
    assert before == {path: path.read_bytes() for stage in STAGES for path in (run / stage).iterdir()}


def test_ctrl_c_saves_and_says_so(tmp_path: Path) -> None:
    """After the first line of training, which comes at once: status 75, a checkpoint, and the sentence."""
    command = [sys.executable, "-m", "lgp_dist", "run", "tiny", "--run-dir", str(tmp_path / "run")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "distil  step 1/" in line:
                process.send_signal(signal.SIGINT)
                break
        rest = process.stderr.read()
        assert process.wait(LIMIT_S) == PREEMPTED
    assert "was asked to end at step" in rest and "has saved" in rest
    assert list((tmp_path / "run/checkpoints/distil").glob("step-*"))
    assert json.loads((tmp_path / "run/outcome.json").read_text())["outcome"] == "preempted"
