"""A campaign of kills and faults against stage finetune on the sample, by scripts/torture.

Each life of a run is two ranks, forked from a process that has imported everything, so that a life takes seconds;
their clocks are wrong, by up to an hour. A fault meets it at a random moment; the next life resumes it. A run that
reaches its end must have the weights, the metrics and the ledger of one that nothing happened to, bit for bit, and
nothing but checkpoints beside its checkpoints. Everything is a function of seed and run number.
"""

import contextlib
import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).parents[1]))

import deepspeed.runtime.zero.muon.muon_optimizer  # with torch's inductor: seconds that each life would spend again
import numpy as np
import safetensors.torch
import torch
import transformers
import tyro
from run_helpers import SAMPLE, SMALL, call_main, write_ancestry, write_shard

import lgp_dist.pipeline
import lgp_dist.report.plots
from lgp_dist.data.shards.index import index_shards
from lgp_dist.engine.checkpoints.disk import Disk
from lgp_dist.engine.checkpoints.manifest import read_manifest
from lgp_dist.engine.watch.watchdog import longest
from lgp_dist.errors import BUG, HUNG, PREEMPTED, USER, UserError
from lgp_dist.run.provenance import environment

STEPS, EVERY = 18, 2
ENGINES = ("zero0", "zero1", "zero2", "zero3", "ddp")
KILLS = ("kill one", "kill all")
CALLS = ("make", "write_tensors", "write_text", "rename", "remove")
"""Of `checkpoints.disk.Disk`, in which a rank dies."""
PLACES = tuple(
    (rank, call, when)
    for rank, calls in ((0, CALLS), (1, CALLS[:2]))  # rank 0 alone names and removes
    for call in calls
    for when in (("before", "half", "after") if call.startswith("write") else ("before", "after"))
)
"""In a save, where a rank can die."""
SIGNALS = ("SIGTERM", "SIGUSR1", "SIGTERM twice", "SIGUSR1 twice")
KINDS = (*KILLS * 4, "SIGTERM", "SIGUSR1", "stop one", "full disk", "damage")
"""Faults that are drawn from, in proportion to how often each stands here."""
PATIENCE_S, STEP_S = 1200.0, 10.0
"""Longest life of two ranks, and longest time for the other to end once one is dead: so long, and so much a step. An
idle machine needs a tenth of it; a busy one must not look like a hang."""
HANG_S = 5.0
"""The watchdog's."""
IN_STEPS = ("data", "forward", "backward", "step", "save")
"""Phases that have the watchdog's own time, from the second step of a life on; all else has ten times as long."""
ALONE_S = 120.0
"""For a rank whose peer was killed to leave by itself, in addition to the watchdog's time; an idle one needs 15 s."""
GOES_ON, BEGINS = "finetune: resumes from step ", "finetune: begins at step "
"""What rank 0 says of its start."""
METRICS_LINE = 500
"""Bytes of a line of metrics.jsonl, or fewer: a full disk shall meet checkpoints, not the file of all lines."""
RECIPE = (*SMALL, "--finetune.train.log-every=1", "--engine.device=cpu", "--trackers")


@dataclass
class Report:
    """What a campaign tried and saw."""

    tried: Counter[str] = field(default_factory=Counter)
    seen: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)
    longest_leave_s: float = 0.0
    """From a signal to the end of both ranks."""
    alone_s: list[float] = field(default_factory=list)
    """From the kill of a rank to the end of the other, where no launcher ended it."""
    hung: list[tuple[str, float]] = field(default_factory=list)
    """Phase that was named, and seconds beyond the watchdog's time for it until it had ended the rank that waited."""
    useful_s: float = 0.0
    """In the steps of runs that ended exactly, those left out that were done again."""
    spent_s: float = 0.0
    """From the first start to the end of those runs."""

    @classmethod
    def read(cls, known: dict[str, Any]) -> "Report":
        """As `as_dict` gave it."""
        found = {each.name: known[each.name] for each in fields(cls) if each.name in known}
        return cls(**found | {"tried": Counter(known["tried"]), "seen": Counter(known["seen"])})

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        goodput = round(self.useful_s / self.spent_s, 3) if self.spent_s else None
        return {**vars(self), "goodput": goodput}

    def show(self) -> str:
        """For people."""
        lines = [f"tried: {', '.join(f'{name} {count}' for name, count in sorted(self.tried.items()))}"]
        lines += [f"seen:  {', '.join(f'{name} {count}' for name, count in sorted(self.seen.items()))}"]
        spent = self.as_dict()
        lines += [f"goodput {spent['goodput']}, longest from a signal to the end {self.longest_leave_s} s"]
        if self.alone_s:
            lines += [f"alone after a kill: left within {_spread(self.alone_s)}"]
        if self.hung:
            lines += [f"hung: ended beyond the watchdog's time within {_spread([over for _, over in self.hung])}"]
        return "\n".join([*lines, f"violations: {len(self.violations)}", *self.violations])


def _spread(seconds: list[float]) -> str:
    half, most = (float(value) for value in np.percentile(seconds, (50, 99)))
    return f"{half:.1f} s in half of {len(seconds)} cases, {most:.1f} s in 99 %"


def variables(engine: str, rank: int, port: int) -> dict[str, str]:
    """What `accelerate launch` sets for a rank of two."""
    found = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    found |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": ""}
    found |= {"TORCHELASTIC_RUN_ID": "torture", "ACCELERATE_MIXED_PRECISION": "no"}
    if engine != "ddp":
        found |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": engine[-1]}
    return found


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return int(opened.getsockname()[1])


class Life:
    """Two ranks of one start."""

    def __init__(
        self,
        place: Path,
        engine: str,
        log: Path,
        arguments: tuple[str, ...],
        prepare: Callable[[int], None] = lambda rank: None,
    ):
        port, self.statuses, self.arguments = free_port(), [None, None], arguments
        self.ended = [0.0, 0.0]
        self.began = time.monotonic()
        self.pids = [self._fork(place, variables(engine, rank, port), log, prepare, rank) for rank in range(2)]

    def _fork(self, place: Path, launch: dict[str, str], log: Path, prepare: Callable[[int], None], rank: int) -> int:
        number = os.fork()
        if number:
            return number
        try:
            os.chdir(place)
            os.environ.update(launch)
            for stream in (1, 2):
                os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
            torch.set_num_threads(1)
            prepare(rank)
            os._exit(call_main(self.arguments))
        except BaseException:
            import traceback

            traceback.print_exc()
        os._exit(1)

    def look(self) -> bool:
        """Whether both have ended."""
        for rank, pid in enumerate(self.pids):
            if self.statuses[rank] is None:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    self.statuses[rank], self.ended[rank] = os.waitstatus_to_exitcode(status), time.monotonic()
        return None not in self.statuses

    def wait(self, seconds: float, alone_s: float = ALONE_S) -> bool:
        """Whether both end in time. As a launcher, ends the other a while after one has failed.

        alone_s: the while.
        """
        end, failed = time.monotonic() + seconds, 0.0
        while not self.look():
            if any(self.statuses) and not failed:
                failed = time.monotonic()
            if failed and time.monotonic() - failed > alone_s:
                self.send(signal.SIGKILL)
            if time.monotonic() > end:
                self.send(signal.SIGKILL)
                self.wait(seconds)
                return False
            time.sleep(0.01)
        return True

    def send(self, number: int, rank: int | None = None) -> None:
        """To one rank or both, where they live."""
        for index, pid in enumerate(self.pids):
            if rank in (None, index) and self.statuses[index] is None:
                os.kill(pid, number)


def limit_files(size: int, rank: int) -> Callable[[int], None]:
    """Makes one rank's writes fail beyond so many bytes of a file, as a full disk does."""

    def prepare(mine: int) -> None:
        if mine == rank:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    return prepare


@dataclass(frozen=True)
class Death:
    """One rank is killed (-9) at the given call of one of Disk's methods: before it, after it, or halfway."""

    rank: int
    call: str
    when: str
    number: int

    def __str__(self) -> str:
        return f"(rank {self.rank}) {self.when} call {self.number} of {self.call}"


def die_at(death: Death) -> Callable[[int], None]:
    """For a life's ranks."""
    call, number, when = death.call, death.number, death.when
    real, calls = getattr(Disk, call), itertools.count(1)

    def dying(self: Disk, *arguments: Any) -> None:
        mine = next(calls) == number
        if mine and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        if mine and when == "half" and call.startswith("write"):
            arguments[0].write_bytes(b"half of what was to be written")
            os.kill(os.getpid(), signal.SIGKILL)
        real(self, *arguments)
        if mine:
            os.kill(os.getpid(), signal.SIGKILL)

    def prepare(mine: int) -> None:
        if mine == death.rank:
            setattr(Disk, call, dying)

    return prepare


def shift_clock(seconds: float) -> None:
    """Makes this process's clock wrong by so much."""
    now, gmtime, localtime = time.time, time.gmtime, time.localtime
    time.time = lambda: now() + seconds
    time.gmtime = lambda moment=None: gmtime(time.time() if moment is None else moment)
    time.localtime = lambda moment=None: localtime(time.time() if moment is None else moment)


def strays(place: Path) -> list[str]:
    """Files next to or within checkpoints that do not belong there; what was set aside does."""
    folder = place / "run" / "checkpoints" / "finetune"
    allowed = re.compile(r"step-\d{8}(/manifest\.json|/rank-0000[01]\.safetensors)?|\.aside(/.*)?")
    names = (path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")))
    return [name for name in names if not allowed.fullmatch(name)]


def checkpoints(place: Path) -> list[Path]:
    """Of stage finetune, newest first."""
    return sorted((place / "run" / "checkpoints" / "finetune").glob("step-*"), reverse=True)


def newest_whole(place: Path) -> int:
    """The step that a start must go on from; 0 to begin."""
    for folder in checkpoints(place):
        with contextlib.suppress(UserError):
            read_manifest(folder).check_files()
            return int(folder.name.removeprefix("step-"))
    return 0


def damage(place: Path, draw: random.Random) -> str:
    """Hurts the newest of two or more checkpoints; what was done, or nothing."""
    found = checkpoints(place)
    if len(found) < 2:
        return ""
    path = draw.choice(sorted(found[0].iterdir()))
    content, kind = bytearray(path.read_bytes()), draw.choice(["flip", "cut", "remove"])
    if kind == "remove":
        path.unlink()
        return f"{kind} {path.name}"
    if kind == "flip":
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content if kind == "flip" else content[: draw.randrange(len(content))])
    return f"{kind} {path.name}"


def metrics(place: Path) -> list[dict[str, Any]]:
    """Of stage finetune, a line for each step that led to where the run is."""
    lines = [json.loads(line) for line in (place / "run" / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["stage"] == "finetune"]


def result(place: Path) -> dict[str, Any]:
    """All that must not depend on what happened on the way."""
    kept = ("step", "loss", "cls", "pred", "path", "lr", "world")
    lines = [{name: line[name] for name in kept} for line in metrics(place)]
    weights = safetensors.torch.load_file(place / "run" / "finetune" / "pool.safetensors")
    sums = {name: int(value.view(torch.int32).sum(dtype=torch.int64)) for name, value in weights.items()}
    return {"metrics": lines, "weights": sums, "ledger": json.loads((place / "run/finetune/ledger.json").read_text())}


def step_seconds(place: Path) -> float:
    """In the steps that led to the end."""
    return sum(line["step_time_s"] for line in metrics(place))


class Campaign:
    """Runs with faults, compared with runs without."""

    def __init__(self, root: Path, report: Report, options: "Options"):
        self.root, self.report, self.options, self.seed = root, report, options, options.seed
        self.base, self.expected, self.seconds = root / "base", dict[str, Any](), dict[str, float]()
        self.patience_s = PATIENCE_S + STEP_S * options.steps
        self.command = ("finetune", *RECIPE, f"--faults.timeout-s={options.timeout_s}")
        self.command += (f"--finetune.train.max-steps={options.steps}", f"--finetune.train.epochs={options.steps}")
        self.command += (f"--checkpoint.every={options.every}",)
        self.hurt: set[Path] = set()
        if not (self.base / "run" / "pool").exists():
            self._prepare()

    def _prepare(self) -> None:
        """The sample's first images, and all stages before finetune."""
        shutil.rmtree(self.base, ignore_errors=True)
        (self.base / "shards").mkdir(parents=True)
        for name, samples in (("fashion-mnist-train-0000.tar", 64), ("fashion-mnist-test-00.tar", 32)):
            write_shard(SAMPLE / name, self.base / "shards" / name, samples)
        index_shards(self.base / "shards", progress=lambda line: None)
        number = os.fork()
        if number == 0:
            os.chdir(self.base)
            os.dup2(os.open(self.root / "base.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
            write_ancestry(self.base / "ancestry.safetensors")
            os._exit(max(call_main((stage, *RECIPE)) for stage in ("ancestry", "distil", "pool")))
        if os.waitpid(number, 0)[1]:
            raise RuntimeError((self.root / "base.log").read_text())

    def _place(self, name: str) -> Path:
        place = self.root / name
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(self.base, place)
        return place

    def undisturbed(self, engine: str) -> Any:
        """What a run without faults gives; made once for an engine."""
        if engine not in self.expected:
            place = self._place(f"plain-{engine}")
            life = Life(place, engine, place / "out.log", self.command)
            if not life.wait(self.patience_s) or any(life.statuses):
                raise RuntimeError((place / "out.log").read_text()[-3000:])
            self.seconds[engine] = time.monotonic() - life.began
            self.expected[engine] = result(place)
            shutil.rmtree(place)
        return self.expected[engine]

    def run(self, index: int) -> None:
        """One run, through several faults to its end."""
        draw = random.Random(self.seed * 1_000_003 + index)
        engines, rounds = self.options.engines, self.options.rounds
        engine, place = engines[index % len(engines)] if rounds else draw.choice(engines), self._place(f"run-{index}")
        expected, before = self.undisturbed(engine), len(self.report.violations)
        said = f"seed {self.seed}, run {index}, {engine}"
        story, began = list[str](), time.monotonic()
        self.clocks = random.Random(f"clocks of seed {self.seed}, run {index}")
        deaths: list[Death | None] = [None] * draw.randint(2, 12)
        if rounds:
            deaths = [Death(*where, index // len(engines) + 1) for where in draw.sample(PLACES, len(PLACES))]
        for death in deaths:
            kind = "kill saving" if death else draw.choice(self.options.kinds or KINDS)
            if self._fault(kind, place, engine, draw, story, said, death):
                break
        life = self._life(place, engine)
        in_time = life.wait(self.patience_s)
        self._check_start(life, place, story, said)
        if not in_time or any(life.statuses):
            self._violation(said, story, f"did not go on: statuses {life.statuses}")
        elif (ended := result(place)) != expected:
            parts = [name for name in expected if ended[name] != expected[name]]
            self._violation(said, story, f"ended with other {', '.join(parts)}")
        else:
            self.report.seen["exact ends"] += 1
            if found := strays(place):
                self._violation(said, story, f"left {', '.join(found)}")
            self.report.useful_s += step_seconds(place)
            self.report.spent_s += time.monotonic() - began
            self.report.seen["exact resumes"] += (place / "out.log").read_text().count(GOES_ON)
        if len(self.report.violations) == before:
            shutil.rmtree(place)

    def _life(self, place: Path, engine: str, limit: Callable[[int], None] | None = None) -> Life:
        """Two ranks whose clocks are wrong by up to an hour, each by its own."""
        shifts = [self.clocks.uniform(-3600, 3600) for _ in range(2)]

        def prepare(rank: int) -> None:
            shift_clock(shifts[rank])
            if limit:
                limit(rank)

        self.report.seen["lives with wrong clocks"] += 1
        log = place / "out.log"
        self.start = newest_whole(place), log.stat().st_size if log.exists() else 0
        return Life(place, engine, log, self.command, prepare)

    def _check_start(self, life: Life, place: Path, story: list[str], said: str) -> None:
        """Whether the latest life went on from the newest whole checkpoint, if it came so far as to say."""
        step, before = self.start
        lines = (place / "out.log").read_bytes()[before:].decode(errors="replace").splitlines()
        starts = [line for line in lines if GOES_ON in line or BEGINS in line]
        wanted = f"{GOES_ON}{step} of" if step else f"{BEGINS}0 of"
        if any(wanted not in line for line in starts):
            self._violation(said, story, f"had step {step}, but: {'; '.join(starts)}")
        if (
            not starts
            and set(life.statuses) & {0, PREEMPTED}
            and not any("finetune: complete in" in line for line in lines)
        ):
            self._violation(said, story, f"had step {step}, ended with {life.statuses} and did not say where it began")

    def _fault(
        self, kind: str, place: Path, engine: str, draw: random.Random, story: list[str], said: str, death: Death | None
    ) -> bool:
        """One life with one fault; whether the run came to its end anyway. death: of kind `kill saving`, or None
        for any."""
        report, rank = self.report, draw.randrange(2)
        if kind == "damage":
            newest = checkpoints(place)[:1]
            if done := damage(place, draw):
                self.hurt |= set(newest)
                report.tried[kind] += 1
                story.append(done)
            return False
        room = METRICS_LINE * self.options.steps + draw.randrange(1_000, 400_000)
        limit = limit_files(room, rank) if kind == "full disk" else None
        if kind == "kill saving":
            call, number, when = draw.choice(CALLS), draw.randint(1, 6), draw.choice(("before", "half", "after"))
            death = death or Death(rank, call, when, number)
            limit = die_at(death)
        moment = draw.random() * self.seconds[engine]
        life = self._life(place, engine, limit)
        if kind not in ("full disk", "kill saving"):
            while time.monotonic() - life.began < moment and not life.look():
                time.sleep(0.005)
            if life.look():
                report.seen["ended before the fault"] += 1
                return not any(life.statuses)
        report.tried[kind] += 1
        story.append(f"{kind} {death}" if death else f"{kind} (rank {rank}) after {moment:.2f} s")
        numbers = {"kill one": signal.SIGKILL, "kill all": signal.SIGKILL}
        numbers |= {"stop one": signal.SIGSTOP, "pause one": signal.SIGSTOP}
        numbers |= {name: signal.Signals[name.split()[0]] for name in SIGNALS}
        sent = time.monotonic()
        if kind in numbers:
            life.send(numbers[kind], rank if kind in ("kill one", "stop one", "pause one") else None)
        if kind.endswith("twice"):
            time.sleep(0.2 * draw.random())
            life.send(numbers[kind])
        if kind == "pause one":
            time.sleep(draw.random() * self.options.timeout_s / 2)
            life.send(signal.SIGCONT, rank)
        alone = draw.random() < self.options.alone
        if not life.wait(self.patience_s, ALONE_S + longest(self.options.timeout_s) if alone else 0.5):
            self._violation(said, story, f"a rank did not end within {self.patience_s:.0f} s")
        took = round(time.monotonic() - sent, 2)
        if kind in SIGNALS:
            report.longest_leave_s = max(report.longest_leave_s, took)
        if alone and kind == "kill one" and life.statuses != [0, 0]:
            report.alone_s.append(round(life.ended[1 - rank] - sent, 2))
            if life.statuses[1 - rank] == -signal.SIGKILL:
                self._violation(said, story, f"the other rank did not leave by itself within {took:.0f} s")
        self._check_start(life, place, story, said)
        self._judge(kind, life, sent, place, story, said)
        self._check_checkpoints(place, story, said)
        if life.statuses == [0, 0]:
            report.seen["ended in spite of the fault"] += 1
        return life.statuses == [0, 0]

    def _judge(self, kind: str, life: Life, sent: float, place: Path, story: list[str], said: str) -> None:
        """Whether the statuses are those that are documented. sent: when the fault was."""
        statuses, seen = life.statuses, self.report.seen
        if kind in SIGNALS:
            if statuses == [PREEMPTED, PREEMPTED]:
                outcome = json.loads((place / "run" / "outcome.json").read_text())
                saved = [folder.name for folder in checkpoints(place)[:1]]
                seen["preempted with a checkpoint"] += 1
                if outcome["outcome"] != "preempted" or saved != [f"step-{outcome['step']:08d}"]:
                    self._violation(said, story, f"left with {outcome}, newest checkpoint {saved}")
            at_once = -signal.Signals[kind.split()[0]]
            allowed = {0, PREEMPTED, at_once}
            if at_once in statuses:  # the other may notice the exit before its own second signal
                allowed |= {BUG, USER}
            if set(statuses) - allowed and -signal.SIGKILL not in statuses:
                self._violation(said, story, f"statuses {statuses}")
        elif kind == "stop one" and HUNG in statuses:
            hang = json.loads((place / "run" / "heartbeats" / "hang.json").read_text())
            named = hang["ranks"]
            seen["hung rank named"] += len(named) == 1 and statuses[named[0]] == -signal.SIGKILL
            if len(named) != 1 or statuses[named[0]] != -signal.SIGKILL:
                self._violation(said, story, f"ranks {named} were named, statuses {statuses}")
            self._note_hang(hang, life.ended[statuses.index(HUNG)] - sent)
        elif kind == "pause one" and statuses != [0, 0]:
            self._violation(said, story, f"statuses {statuses} after a pause shorter than the watchdog's time")
        elif kind in (*KILLS, "kill saving") and 0 in statuses and statuses != [0, 0]:
            self._violation(said, story, f"a rank ended well although the other died: {statuses}")

    def _note_hang(self, hang: dict[str, Any], took: float) -> None:
        """How much longer than allowed it took until the watchdog had ended the run."""
        beat = next((beat for beat in hang["beats"] if beat["rank"] in hang["ranks"]), hang["beats"][0])
        within = beat["phase"] in IN_STEPS and beat["step"] not in (None, self.start[0])
        allowed = self.options.timeout_s if within else longest(self.options.timeout_s)
        self.report.hung.append((beat["phase"], round(took - allowed, 2)))

    def _check_checkpoints(self, place: Path, story: list[str], said: str) -> None:
        """All that have their name are whole, unless this campaign hurt them and no life has come to load any."""
        for folder in checkpoints(place):
            try:
                read_manifest(folder).check_files()
            except UserError as error:
                if folder not in self.hurt:
                    self._violation(said, story, str(error))
            else:
                self.report.seen["whole checkpoints"] += 1
                self.hurt.discard(folder)

    def _violation(self, said: str, story: list[str], what: str) -> None:
        self.report.violations.append(f"{said}: {'; '.join(story)}: {what}")


@dataclass(frozen=True)
class Options:
    """Kills and faults at random moments against stage finetune on the sample; status 1 at a violation."""

    seconds: float = 60.0
    """Begin no run after so many seconds, unless `resumes` are missing."""
    seed: int = 0
    """Of everything that is drawn."""
    kinds: tuple[Literal["kill one", "kill all", "SIGTERM", "SIGUSR1", "SIGTERM twice", "SIGUSR1 twice", "stop one",
                         "kill saving", "pause one", "full disk", "damage"], ...] = ()  # fmt: skip
    """Faults to draw from, equally likely; empty for all but second signals and pauses, kills most often."""
    engines: tuple[Literal["zero0", "zero1", "zero2", "zero3", "ddp"], ...] = ENGINES
    """Engines to draw from."""
    steps: int = STEPS
    """Of a run. A fault meets it as late as the run takes without faults, or earlier."""
    every: int = EVERY
    """Steps between two checkpoints."""
    timeout_s: float = HANG_S
    """The watchdog's."""
    alone: float = 0.1
    """Share of kills after which no launcher ends the other rank, which has to leave by itself."""
    resumes: int = 0
    """Go on until so many runs' resumes were exact, however long that takes."""
    rounds: int = 0
    """In place of random faults, one rank after the other is killed in every call of its save: of the first save of its
    life in round 1, of the second in round 2, as many rounds as this says, each under every engine; `--steps 180`."""
    out: Path | None = None
    """JSON of the campaign; it goes on where the file stands."""


def goes_on(options: Options, report: Report, spent_s: float) -> bool:
    """Whether there is time for another run, or too few have resumed. A violation ends the second."""
    too_few = report.seen["exact resumes"] < options.resumes and not report.violations
    return spent_s < options.seconds or too_few


def main() -> int:
    options = tyro.cli(Options)
    forked = (lgp_dist.pipeline, lgp_dist.report.plots, deepspeed.runtime.zero.muon.muon_optimizer, transformers)
    assert all(module.__name__ in sys.modules for module in forked), "imported before the first fork"
    report, first, began, about = Report(), 0, time.monotonic(), environment()
    if options.out and options.out.exists():
        known = json.loads(options.out.read_text())
        if known["seed"] != options.seed:
            sys.stderr.write(f"{options.out} is of seed {known['seed']}: choose it, or another --out.\n")
            return 2
        report = Report.read(known)
        first = known["runs"]
    with tempfile.TemporaryDirectory(prefix="torture-") as folder:
        campaign, index = Campaign(Path(folder), report, options), first
        last = options.rounds * len(options.engines) or sys.maxsize
        while index < last and (index == first or goes_on(options, report, time.monotonic() - began)):
            campaign.run(index)
            index += 1
            if options.out:
                kills = sum(report.tried[kind] for kind in (*KILLS, "kill saving"))
                content = {"seed": options.seed, "runs": index, "kills": kills}
                content |= report.as_dict() | about
                options.out.write_text(json.dumps(content, indent=2) + "\n")
        for log in Path(folder).glob("run-*/out.log"):  # of runs with a violation
            sys.stdout.write(f"--- {log.parent.name}\n{log.read_text()[-3000:]}\n")
    sys.stdout.write(f"seed {options.seed}, runs {first} to {index - 1}\n{report.show()}\n")
    return 1 if report.violations else 0


if __name__ == "__main__":
    sys.exit(main())
