"""Trackers: one run of each for all stages, which a resume continues; none ends a run."""

import json
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate import PartialState
from accelerate.tracking import GeneralTracker
from run_helpers import SMALL, Lgp
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lgp_dist.engine import tracking
from lgp_dist.engine.tracking import Tracking
from lgp_dist.run.metrics import read_lines

KEY = "r0.0-0+r1.0-5"
SETTINGS = {"seed": 3, "recipe": "tiny", "trackers": ["a"], "finetune.train.lr": 1e-3}


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    PartialState(cpu=True)
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)


def start(run: Path, tracker: str, **options: Any) -> Tracking:
    run.mkdir(exist_ok=True)
    return Tracking.start({tracker: options}, "tiny", run, SETTINGS, 600.0)


def lines_of(first: int, loss: float) -> list[dict[str, Any]]:
    about = {"world": 2, "path": [KEY], "skipped": 0, "bad_samples": 1, "cache_misses": 2}
    return [{"step": first + step, "loss": loss, f"top1/{KEY}": 40.5, **about} for step in range(2)]


def use(run: Path, tracker: str) -> None:
    """A run of two stages that stops, resumes in the second and ends with results."""
    begun = start(run, tracker)
    begun.add("distil", lines_of(0, 0.75))
    begun.add("finetune", lines_of(0, 0.5))
    begun.close(60.0)
    resumed = start(run, tracker)
    resumed.add("finetune", lines_of(2, 0.25))
    for name in ("report.html", "paths.csv"):
        (run / name).write_text(name)
    choice = {"key": KEY, "params": 5, "flops": 6, "top1": 60.25}
    resumed.results(run, [{"key": KEY, "top1": 60.25, "top5": 90.5}], choice)
    resumed.close(60.0)


Curve = list[tuple[int, float]]


def read_tensorboard(folder: Path) -> dict[str, Curve]:
    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def check_curves(curves: dict[str, Curve], key: str = KEY) -> None:
    assert curves["distil/loss"] == [(0, 0.75), (1, 0.75)]
    assert curves["finetune/loss"] == [(0, 0.5), (1, 0.5), (2, 0.25), (3, 0.25)]
    assert curves[f"finetune/top1/{key}"] == [(step, 40.5) for step in range(4)]
    for name, value in (("skipped", 0), ("bad_samples", 1), ("cache_misses", 2)):
        assert curves[f"finetune/{name}"] == [(step, value) for step in range(4)]
    assert "finetune/path" not in curves


def test_tensorboard(tmp_path: Path) -> None:
    use(tmp_path / "mine", "tensorboard")
    curves = read_tensorboard(tmp_path / "mine" / "tracking")
    check_curves(curves)
    assert curves[f"evaluate/top1/{KEY}"] == curves["choice/top1"] == [(0, 60.25)]


@pytest.mark.slow
def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)
    use(tmp_path / "mine", "mlflow")
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("tiny")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "mine" and run.info.status == "FINISHED"
    assert run.data.params["finetune.train.lr"] == "0.001" and run.data.tags["choice/key"] == KEY
    history = {name: client.get_metric_history(run.info.run_id, name) for name in run.data.metrics}
    curves = {name: sorted((point.step, point.value) for point in points) for name, points in history.items()}
    check_curves(curves, KEY.replace("+", "_"))
    assert curves[f"evaluate/top1/{KEY.replace('+', '_')}"] == [(0, 60.25)]
    assert {file.path for file in client.list_artifacts(run.info.run_id)} == {"report.html", "paths.csv"}


def records_of(content: bytes) -> Iterator[bytes]:
    """The records of a .wandb file: a LevelDB log after 7 bytes; parts of type 1 and 4 end one."""
    place, known = 7, b""
    while place + 7 <= len(content):
        if (left := 2**15 - place % 2**15) < 7:
            place += left
            continue
        size, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        known += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):
            yield known
            known = b""


@pytest.mark.slow
def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline: each start writes a file of records, which `wandb sync` joins by the run's id."""
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    use(tmp_path / "mine", "wandb")
    records = []
    for file in sorted((tmp_path / "mine" / "tracking" / "wandb").glob("offline-run-*/*.wandb")):
        records += [Record.FromString(found) for found in records_of(file.read_bytes())]
    runs = [record.run for record in records if record.HasField("run")]
    assert {(run.project, run.display_name) for run in runs} == {("tiny", "mine")}
    assert {run.run_id for run in runs} == {json.loads((tmp_path / "mine/tracking/runs.json").read_text())["wandb"]}
    rows = []
    for record in records:
        items = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        rows += [items] if items else []
    curves: dict[str, Curve] = {}
    for row in rows:
        for name, value in row.items():
            stage = name.split("/")[0]
            curves.setdefault(name, []).append((row.get(f"{stage}/step", -1), value))
    check_curves(curves)
    summary = {"/".join(item.nested_key) or item.key: item.value_json for r in records for item in r.summary.update}
    assert json.loads(summary[f"evaluate/top1/{KEY}"]) == 60.25 and json.loads(summary["choice/key"]) == KEY
    kept = [entry.path for record in records for entry in record.request.log_artifact.artifact.manifest.contents]
    kept += [entry.path for record in records for entry in record.artifact.manifest.contents]
    assert {"report.html", "paths.csv"} <= set(kept)


@pytest.mark.slow
def test_trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "store"))  # read when it is imported
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    use(tmp_path / "mine", "trackio")
    assert SQLiteStorage.get_runs("tiny") == ["mine"]
    curves: dict[str, Curve] = {}
    for row in SQLiteStorage.get_logs("tiny", "mine"):
        for name, value in row.items():
            curves.setdefault(name, []).append((row["step"], value))
    check_curves(curves)
    assert curves[f"evaluate/top1/{KEY}"] == [(0, 60.25)] and curves["choice/key"] == [(0, KEY)]
    blobs = [path.read_text() for path in (tmp_path / "store/artifacts/tiny/blobs").rglob("*") if path.is_file()]
    assert sorted(blobs) == ["paths.csv", "report.html"]


def test_a_run_reaches_its_tracker(finished: Path) -> None:
    """Numbers of metrics.jsonl, the gradient norm among them, and every path's accuracy, in one run for all stages."""
    curves = read_tensorboard(finished / "run" / "tracking")
    for stage in ("distil", "finetune"):
        lines = [line for line in read_lines(finished / "run" / "metrics.jsonl") if line["stage"] == stage]
        assert len(lines) == 2
        for name in ("loss", "grad_norm", "skipped", "bad_samples", "lr", "images_per_s"):
            written = [(line["step"], pytest.approx(line[name])) for line in lines]
            assert curves[f"{stage}/{name}"] == written
    rows = json.loads((finished / "run" / "paths.json").read_text())
    assert len(rows) == 18
    for row in rows:
        assert curves[f"evaluate/top1/{row['key']}"] == [(0, pytest.approx(row["top1"]))]
    chosen = json.loads((finished / "run" / "descend" / "descendant.json").read_text())
    assert curves["choice/params"] == [(0, chosen["params"])]


# What goes wrong


class Odd(GeneralTracker):
    """A tracker of a user, that does what its argument says."""

    name = "odd"
    requires_logging_directory = False
    ended = threading.Event()
    seen: list[Any] = []

    def __init__(self, project: str, does: str = "", **options: Any):
        super().__init__()
        self.project, self.does, self.options = project, does, options

    @property
    def tracker(self) -> None:
        return None

    def start(self) -> None:
        if self.does == "refuse":
            raise RuntimeError("no key\nset one")
        if self.does == "hang":
            self.ended.wait()

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.seen.append((self.project, self.options, values))

    def log(self, values: dict[str, Any], step: int | None = None, **more: Any) -> None:
        if self.does == "fail":
            raise RuntimeError("no room")
        if self.does == "hang later":
            self.ended.wait()
        self.seen.append((step, values))

    def finish(self) -> None:
        self.seen.append("finished")


@pytest.fixture
def odd(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Odd]]:
    monkeypatch.setattr(tracking, "LOGGER_TYPE_TO_CLASS", tracking.LOGGER_TYPE_TO_CLASS | {"odd": Odd})
    Odd.ended.clear()
    Odd.seen.clear()
    yield Odd
    Odd.ended.set()


@pytest.mark.parametrize(
    ("does", "said"),
    [
        ("refuse", "Tracker odd cannot start (RuntimeError: no key set one)"),
        ("hang", "Tracker odd cannot start (it does not answer)"),
        ("fail", "Tracker odd cannot take a line (RuntimeError: no room)"),
        ("hang later", "Tracker odd has lost 1"),
    ],
)
def test_a_tracker_that_fails_is_named_and_left(
    tmp_path: Path,
    odd: type[Odd],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    does: str,
    said: str,
) -> None:
    if does == "hang later":
        monkeypatch.setattr(tracking, "WAITING", 10)
    hangs = does == "hang"
    options = {"odd": {"does": does}} | ({} if hangs else {"tensorboard": {}})
    found = Tracking.start(options, "tiny", tmp_path, SETTINGS, 0.2 if hangs else 600.0)
    names = [name for name in options if does not in ("refuse", "hang") or name != "odd"]
    assert [thread.name for thread in found.threads] == names
    found.add("finetune", [line for first in range(0, 16, 2) for line in lines_of(first, 0.5)])
    found.close(0.5 if does == "hang later" else 60.0)
    assert said in caplog.text
    if does in ("refuse", "fail"):  # one that hangs later uses up the time in which trackers end
        assert len(read_tensorboard(tmp_path / "tracking")["finetune/loss"]) == 16
        assert set(json.loads((tmp_path / "tracking" / "runs.json").read_text())) == set(names)


def test_arguments_and_names(tmp_path: Path, odd: type[Odd]) -> None:
    """The recipe names the project, unless an argument does; settings are sent once, as numbers and text."""
    for _ in range(2):
        start(tmp_path / "mine", "odd", entity="team").close(60.0)
    start(tmp_path / "other", "odd", project="vits").close(60.0)
    plain = {**SETTINGS, "trackers": "['a']"}
    given = ("tiny", {"entity": "team"}, plain)
    assert odd.seen == [given, "finished", "finished", ("vits", {}, plain), "finished"]


@pytest.mark.parametrize("damage", ["{", "[1]", "null"])
def test_ids_that_are_damaged_begin_anew(tmp_path: Path, damage: str) -> None:
    start(tmp_path, "tensorboard").close(60.0)
    (tmp_path / "tracking" / "runs.json").write_text(damage)
    start(tmp_path, "tensorboard").close(60.0)
    assert json.loads((tmp_path / "tracking" / "runs.json").read_text()) == {"tensorboard": tmp_path.name}


@pytest.mark.slow
@pytest.mark.parametrize("tracker", ["mlflow", "wandb"])
def test_a_run_without_its_trackers_server(
    lgp: Lgp, finished_place: Path, monkeypatch: pytest.MonkeyPatch, tracker: str
) -> None:
    """Nobody listens; the run is complete, and the log names the tracker."""
    pytest.importorskip(tracker)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        at = f"http://127.0.0.1:{taken.getsockname()[1]}"
        for name, value in (("MLFLOW_TRACKING_URI", at), ("WANDB_BASE_URL", at), ("WANDB_API_KEY", "0" * 40)):
            monkeypatch.setenv(name, value)
        result = lgp("descend", *SMALL, "--force", "--trackers", tracker)
    assert result.status == 0 and f"Tracker {tracker} cannot start (" in result.err


def test_tracker_on_a_full_disk(tmp_path: Path, caplog: pytest.LogCaptureFixture, recwarn: object) -> None:
    """TensorBoard on a file system of 64 KiB takes some lines, then raises in its own thread and in ours."""
    if shutil.which("mount") is None:
        pytest.skip("there is no command mount")
    options = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)]
    mounted = subprocess.run(options, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount: {mounted.stderr.strip()}")
    try:
        found = start(tmp_path, "tensorboard")
        found.add("finetune", [{"step": step, "loss": 1.0, "lr": 0.1} for step in range(2000)])
        found.close(60.0)
        assert shutil.disk_usage(tmp_path).free == 0 and 0 < found.threads[0].lost < 2000
    finally:
        subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)
    assert "Tracker tensorboard cannot take a line" in caplog.text and "No space left" in caplog.text
