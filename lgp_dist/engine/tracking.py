"""Experiment trackers of accelerate: one run of each tracker for all stages of a run directory, continued by a resume.

Trackers are other people's code and talk to other people's servers, so each works in a thread of its own. One that does
not start in time is dropped; one that fails or hangs later loses lines. Neither ends a run or delays a step.
"""

import json
import logging
import os
import queue
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers
from accelerate.utils import LoggerType

from lgp_dist.config.flat import STAGES
from lgp_dist.errors import UserError
from lgp_dist.files import write_json

log = logging.getLogger("lgp")

PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3", "WANDB_INIT_TIMEOUT": "20"}
"""Variables with which libraries say within a minute that a server is down, unless the user sets others."""
WAITING = 20_000
"""Steps that may wait for a tracker."""
IDS = {"wandb": "id", "mlflow": "info.run_id"}
"""Tracker -> where its own run object has an id."""


def check_trackers(names: Iterable[str]) -> None:
    """Raises UserError unless accelerate knows all these trackers and they are installed."""
    known = sorted(str(name) for name in LoggerType.list() if name != "all")
    installed = {str(name) for name in get_available_trackers()}
    for name in names:
        if name not in known:
            raise UserError(f"trackers names {name!r}, which accelerate does not know: choose from {', '.join(known)}.")
        if name not in installed:
            raise UserError(f"trackers names {name!r}, which is not installed: `pip install {name}`, or leave it out.")


class TrackerThread:
    """A tracker and the thread in which all of its code runs. Only `starts` and `end` wait for it."""

    def __init__(self, name: str, start: Callable[[], GeneralTracker]):
        self.name, self.id, self.lost = name, "", 0
        self._calls = queue.Queue[Callable[[GeneralTracker], None] | None](WAITING)
        self._started = Future[GeneralTracker]()
        self._thread = threading.Thread(target=self._work, args=(start,), name=f"lgp-{name}", daemon=True)
        self._thread.start()

    def _work(self, start: Callable[[], GeneralTracker]) -> None:
        try:
            tracker = start()
        except Exception as error:  # whatever a tracker raises
            self._started.set_exception(error)
            return
        self._started.set_result(tracker)
        for call in iter(self._calls.get, None):
            try:
                call(tracker)
            except Exception as error:  # noqa: BLE001  whatever a tracker raises
                self._lose(_shown(error))

    def starts(self, until: float) -> bool:
        """Whether it has started by a time of the monotonic clock; the log says so if not, and it ends once it has."""
        try:
            tracker = self._started.result(max(0.0, until - time.monotonic()))
        except Exception as error:  # noqa: BLE001  whatever a tracker raises
            why = _shown(error) if self._started.done() else "it does not answer"
            log.warning("Tracker %s cannot start (%s): the run goes on without it", self.name, why)
            self.end(0.0)
            return False
        self.id = str(attrgetter(IDS[self.name])(tracker.tracker)) if self.name in IDS else ""
        return True

    def do(self, call: Callable[[GeneralTracker], None] | None) -> None:
        """Calls something with the tracker, after all earlier calls. None ends the thread."""
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            self._lose(f"{WAITING} calls wait")

    def _lose(self, why: str) -> None:
        self.lost += 1
        if self.lost == 1:
            log.warning("Tracker %s cannot take a line (%s): the run continues, lines are lost", self.name, why)

    def end(self, until: float) -> None:
        """Waits until a time of the monotonic clock for what it still has to do, and ends it."""
        self.do(lambda tracker: tracker.finish())
        self.do(None)
        if until:
            self._thread.join(max(0.0, until - time.monotonic()))
            lost = self.lost + self._calls.qsize()
            if lost or self._thread.is_alive():
                log.warning("Tracker %s has lost %d lines or could not end", self.name, lost)


class Tracking:
    """The trackers of a run directory. Without any, as on all ranks but the first, it does nothing."""

    def __init__(self, threads: Sequence[TrackerThread] = ()):
        self.threads = threads

    @classmethod
    def start(
        cls, options: Mapping[str, dict[str, Any]], project: str, run: Path, settings: Mapping[str, Any], limit_s: float
    ) -> "Tracking":
        """Starts trackers within some seconds, or goes on with the runs whose ids RUN/tracking/runs.json has.

        options: arguments of each by name; `project` replaces the project's name. settings: logged once, flat.
        """
        folder, until = run / "tracking", time.monotonic() + limit_s
        try:
            ids = dict(json.loads((folder / "runs.json").read_text()))
        except (OSError, TypeError, ValueError):
            ids = {}
        for variable, value in PATIENCE.items():
            os.environ.setdefault(variable, value)
        own, threads = run.absolute().name, []
        for name, given in options.items():
            where = {"project": "" if name == "tensorboard" else project}
            arguments = where | _run_of(name, own, folder, ids.get(name)) | given
            threads.append(TrackerThread(name, partial(_started, name, folder, arguments)))
        threads = [thread for thread in threads if thread.starts(until)]
        new = {thread.name: thread.id or own for thread in threads if thread.name not in ids}
        plain = {key: value if isinstance(value, int | float | str) else str(value) for key, value in settings.items()}
        for thread in threads:
            if thread.name in new:
                thread.do(lambda tracker: tracker.store_init_configuration(plain))
        if new:
            write_json(folder / "runs.json", ids | new)
        return cls(threads)

    def add(self, stage: str, lines: Iterable[Mapping[str, Any]]) -> None:
        """Logs the numbers of finished steps as STAGE/NAME. Each line has a `step`."""
        for line in lines:
            numbers = {f"{stage}/{key}": value for key, value in line.items() if isinstance(value, int | float)}
            for thread in self.threads:
                thread.do(partial(_log, facts=numbers, step=line["step"]))

    def results(self, run: Path, rows: Iterable[Mapping[str, Any]], choice: Mapping[str, Any]) -> None:
        """Logs the accuracy of each path and what was chosen, and hands over report, tables and figure.

        rows: of paths.json. choice: the row of stage export or descend; empty without one.
        """
        facts = {f"evaluate/{name}/{row['key']}": row[name] for row in rows for name in ("top1", "top5")}
        facts |= {f"choice/{name}": choice[name] for name in ("key", "params", "flops", "top1") if name in choice}
        files = [run / name for name in ("report.html", "paths.csv", "paths.json", "pareto.png")]
        for thread in self.threads:
            thread.do(partial(_log, facts=facts))
            thread.do(partial(_hand_over, files=[str(file) for file in files if file.is_file()]))

    def close(self, limit_s: float) -> None:
        """Ends the trackers within some seconds; the log says what is lost."""
        until = time.monotonic() + limit_s
        for thread in self.threads:
            thread.end(until)


def _run_of(tracker: str, name: str, folder: Path, known: str | None) -> dict[str, Any]:
    """Arguments that begin a run of this name, or go on with the one that is known by its id."""
    if tracker == "wandb":
        return {"name": name, "dir": str(folder), "resume": "allow", "id": known}
    if tracker == "trackio":  # its runs are known by their names
        return {"name": name, "resume": "allow" if known else "never"}
    return {"run_name": name, "run_id": known} if tracker == "mlflow" else {}


def _started(name: str, folder: Path, arguments: dict[str, Any]) -> GeneralTracker:
    """A tracker that has started. folder: for those that write files."""
    kind, project = LOGGER_TYPE_TO_CLASS[name], arguments.pop("project")
    folder.mkdir(exist_ok=True)
    tracker = kind(project, *([str(folder)] if kind.requires_logging_directory else []), **arguments)
    tracker.start()
    for stage in (*STAGES, "downstream") if name == "wandb" else ():
        tracker.tracker.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
    return tracker


def _log(tracker: GeneralTracker, facts: dict[str, Any], step: int | None = None) -> None:
    """Logs what is known of a step, or of the whole run."""
    if tracker.name == "wandb":  # its own step may not decrease, but each stage counts from 0
        tracker.tracker.summary.update(facts) if step is None else tracker.log(facts)
        return
    if tracker.name == "mlflow":  # it has a place of its own for text, and refuses the + in keys of paths
        if texts := {key: value for key, value in facts.items() if isinstance(value, str)}:
            sys.modules["mlflow"].set_tags(texts)
        facts = {key.replace("+", "_"): value for key, value in facts.items() if key not in texts}
    tracker.log(facts, step=step or 0)


def _hand_over(tracker: GeneralTracker, files: Iterable[str]) -> None:
    """Makes files artifacts, if the tracker has such."""
    for file in files if tracker.name in ("mlflow", "trackio", "wandb") else ():
        (tracker if tracker.name == "mlflow" else tracker.tracker).log_artifact(file)


def _shown(error: BaseException) -> str:
    """An exception on one line."""
    return textwrap.shorten(f"{type(error).__name__}: {error}", 300)
