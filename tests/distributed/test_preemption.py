"""Signals to real ranks: under a launcher, and through the batch script with a scheduler of a few lines."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from exact_launch import HERE, ROOT
from run_helpers import LIMIT_S, SMALL, Lgp, eventually, outcome_of

from lgp_dist import pipeline
from lgp_dist.config.flat import STAGES
from lgp_dist.engine.watch import signals
from lgp_dist.engine.watch.signals import Preemption
from lgp_dist.errors import BUG, PREEMPTED, USER, Preempted
from lgp_dist.files import LOCK, locked
from lgp_dist.run.run_status import RunStatus, clear_run_status, write_run_status
from lgp_dist.stages import start

SLURM = ROOT / "launch_configs" / "slurm" / "train.sbatch"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

SAVE_S = 33 if os.environ.get("LGP_LONG_TESTS") else 1
"""Seconds that ranks take to save; a launcher's own grace is 30."""

FAKES = {
    "srun": 'echo "$@" >> "$FAKE/srun.log"; echo $$ > "$FAKE/task"; SLURM_NODEID=0 exec "${@:3}"',  # after two options
    "scancel": 'echo "$@" >> "$FAKE/scancel.log"; kill -USR1 "$(cat "$FAKE/task")"',
    "scontrol": 'if [ "$1" = show ]; then echo localhost; else echo "$@" >> "$FAKE/scontrol.log"; fi',
    "lgp": 'echo "$@" >> "$FAKE/lgp.log"; eval "${LGP_TEST_CHECK:-true}"',
    "accelerate": 'echo "$@" > "$FAKE/accelerate.log"; eval exec "$LGP_TEST_LAUNCH"',
}
"""The scheduler: srun starts one task here, scancel signals that task alone, as a cgroup's tracking does."""


def test_handlers_take_a_note_and_go() -> None:
    """The first signal counts, a second changes nothing, and handlers from before are back."""
    seen: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(number))
    try:
        handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
        with Preemption() as preemption:
            assert not preemption.asked and preemption.name == ""
            for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1):
                os.kill(os.getpid(), number)
            assert preemption.asked and preemption.name == "SIGUSR1" and not seen
        assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == handlers
        os.kill(os.getpid(), signal.SIGUSR1)
        assert seen == [signal.SIGUSR1]
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_ctrl_c_is_noted_and_a_second_one_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second SIGINT at once is the launcher's; a later one interrupts."""
    with Preemption() as preemption:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        assert preemption.name == "SIGINT"
    monkeypatch.setattr(signals, "AGAIN_S", -1.0)
    with Preemption() as preemption, pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        assert preemption.asked
        os.kill(os.getpid(), signal.SIGINT)


FAILING = """
import os, signal
from lgp_dist.cli.exit_status import guarded
from lgp_dist.engine.watch.signals import Preemption
from lgp_dist.errors import UserError

def loop():
    with Preemption():
        os.kill(os.getpid(), signal.SIGTERM)
        raise {failure}

guarded(loop, debug=False)
"""


@pytest.mark.parametrize(
    ("rank", "failure", "status", "said"),
    [
        (0, "RuntimeError('gloo: Connection closed by peer [127.0.0.1]:7')", -signal.SIGTERM, ""),
        (1, "RuntimeError('gloo: Connection reset by peer')", -signal.SIGTERM, ""),
        (1, "RuntimeError('gloo: writev [127.0.0.1]:7: Broken pipe')", -signal.SIGTERM, ""),
        (1, "UserError('All images are bad.')", -signal.SIGTERM, ""),
        (0, "UserError('All images are bad.')", USER, "lgp: All images are bad.\n"),
        (1, "RuntimeError('shapes differ')", BUG, "shapes differ\nAsked to leave before this, by SIGTERM.\n"),
    ],
)
def test_a_launcher_that_asks_before_a_rank_knows_why(rank: int, failure: str, status: int, said: str) -> None:
    """Another rank failed, and the signal comes while this one still trains: it takes its usual effect, since one that
    waited for another would say in the end what the first has said. A bug keeps its traceback."""
    environment = {**os.environ, "RANK": str(rank), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", FAILING.format(failure=failure)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode == status and done.stderr.endswith(said) and bool(done.stderr) == bool(said), done.stderr


def ready(run: Path) -> bool:
    """Whether both ranks count steps."""
    files = [run / f"ready-{rank}" for rank in (0, 1)]
    return all(file.exists() and file.read_text() for file in files)


@pytest.mark.slow
@pytest.mark.parametrize("forwarded", [False, True], ids=["SIGTERM", "SIGUSR1 twice"])
def test_launcher_passes_signals_on(tmp_path: Path, mark: str, forwarded: bool) -> None:
    """Ranks have time to save; the launcher makes 1 of their 75. SIGUSR1 needs PET_SIGNALS_TO_HANDLE."""
    names = {"PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGUSR1"} if forwarded else {}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "LGP_TEST_MARK": mark, **names}
    command = [*TORCHRUN, HERE / "preemption_worker.py", tmp_path, "2"]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as launcher:
        eventually(lambda: ready(tmp_path), "both ranks begin")
        launcher.send_signal(signal.SIGUSR1 if forwarded else signal.SIGTERM)
        if forwarded:
            time.sleep(0.5)
            for rank in (0, 1):
                os.kill(int((tmp_path / f"ready-{rank}").read_text()), signal.SIGUSR1)
        launcher.communicate(timeout=LIMIT_S)
    assert launcher.returncode == 1
    left = outcome_of(tmp_path)
    assert left == RunStatus("preempted", "finetune", left.step, "Asked to leave.")
    assert (tmp_path / "left-0").read_text().split()[0] == (tmp_path / "left-1").read_text().split()[0]


def batch(folder: Path, mark: str, launch: str, *words: str, **environment: str) -> subprocess.Popen[str]:
    """train.sbatch with a scheduler on PATH and another launcher in accelerate's place; the run directory is RUN."""
    programs = folder / "bin"
    programs.mkdir(exist_ok=True)
    for name, text in FAKES.items():
        (programs / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (programs / name).chmod(0o755)
    (folder / "RUN").mkdir(exist_ok=True)
    slurm = {
        "SLURM_CPUS_PER_TASK": "64",
        "SLURM_JOB_ID": "42",
        "SLURM_JOB_NODELIST": "n1",
        "SLURM_NNODES": "1",
        "RUN": str(folder / "RUN"),
    }
    ours = {"FAKE": str(folder), "LGP_TEST_LAUNCH": launch, "LGP_TEST_MARK": mark, "PYTHONPATH": str(ROOT)}
    path = f"{programs}:{os.environ['PATH']}"
    return subprocess.Popen(
        ["bash", SLURM, "run", "tiny", "--seed=1", *words],
        env={**os.environ, "OMP_NUM_THREADS": "1", **slurm, **ours, **environment, "PATH": path},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def said(folder: Path, name: str) -> str:
    """What a fake was called with."""
    path = folder / f"{name}.log"
    return path.read_text() if path.exists() else ""


@pytest.mark.parametrize(
    ("outcome", "status", "restarts", "expected", "requeued"),
    [
        ("complete", 0, 0, 0, False),
        ("preempted", 1, 0, PREEMPTED, True),
        ("preempted", 1, 99, PREEMPTED, True),
        ("preempted", 1, 100, PREEMPTED, False),
        ("failed", 1, 0, 1, False),
        ("failed", 0, 0, 1, False),
        ("lost", 1, 0, PREEMPTED, True),
        ("lost", 1, 100, 1, False),
        (None, 138, 0, PREEMPTED, True),
        (None, 0, 99, PREEMPTED, True),
        (None, 138, 100, 138, False),
        (None, 0, 100, 1, False),
    ],
)
def test_batch_script_decides(
    tmp_path: Path, mark: str, outcome: str | None, status: int, restarts: int, expected: int, requeued: bool
) -> None:
    """By this start's outcome: the previous start's is removed before the launcher begins."""
    run = tmp_path / "RUN"
    run.mkdir()
    write_run_status(run, RunStatus("preempted"))
    if outcome:
        write_run_status(tmp_path, RunStatus(outcome, "pool", 3, 'a "quoted" word, "outcome": "preempted"'))
    launch = f'bash -c "! test -e $RUN/outcome.json && cp $FAKE/outcome.json $RUN/ 2> /dev/null; exit {status}"'
    process = batch(tmp_path, mark, launch, SLURM_RESTART_COUNT=str(restarts))
    out, _ = process.communicate(timeout=LIMIT_S)
    assert process.returncode == expected, out
    assert said(tmp_path, "scontrol") == ("requeue 42\n" if requeued else "")
    where = "--num_machines 1 --num_processes 8 --main_process_ip localhost --main_process_port 10042"
    assert where in said(tmp_path, "accelerate")
    multinode = "launch check launch_configs/multinode.yaml"
    assert said(tmp_path, "lgp") == f"{multinode} --nodes 1 --processes 8 --rank 0 --address localhost --port 10042\n"
    assert said(tmp_path, "srun").startswith("--cpus-per-task=64 ")
    assert said(tmp_path, "accelerate").endswith(f"-m lgp_dist run tiny --seed=1 --run-dir={run}\n")


def test_batch_script_in_an_array(tmp_path: Path, mark: str) -> None:
    """Each task has its own run directory, and is requeued alone: one of them has the number of the whole array."""
    task = {"SLURM_ARRAY_JOB_ID": "42", "SLURM_ARRAY_TASK_ID": "3"}
    for run, expected in ((tmp_path / "RUN", "RUN/3"), (tmp_path / "seed-%a", "seed-3")):
        process = batch(tmp_path, mark, "true", "--name=%a%a", **task, RUN=str(run))
        process.communicate(timeout=LIMIT_S)
        assert process.returncode == PREEMPTED and (tmp_path / expected / "starts-lost").exists()
        words = said(tmp_path, "accelerate")
        assert words.endswith(f"-m lgp_dist run tiny --seed=1 --name=33 --run-dir={tmp_path / expected}\n")
    assert said(tmp_path, "scontrol") == "requeue 42_3\n" * 2


def test_batch_script_gives_up_on_starts_that_say_nothing(tmp_path: Path, mark: str) -> None:
    """After four in a row; a start that says how it ended, unless it lost a rank, begins the count again."""
    requeued = []
    for restarts, outcome in enumerate(["", "", "lost", "preempted", "lost", "", "lost", ""]):
        write_run_status(tmp_path, RunStatus(outcome or "preempted"))
        launch = "cp $FAKE/outcome.json $RUN/" if outcome else "false"
        process = batch(tmp_path, mark, f"bash -c '{launch}'", SLURM_RESTART_COUNT=str(restarts))
        process.communicate(timeout=LIMIT_S)
        requeued.append(process.returncode)
    assert requeued == [PREEMPTED] * 7 + [1]
    assert said(tmp_path, "scontrol") == "requeue 42\n" * 7


@pytest.mark.parametrize(("left", "starts"), [(200, False), (350, False), (500, True)])
def test_batch_script_refuses_an_allocation_that_is_signalled_at_once(
    tmp_path: Path, mark: str, left: int, starts: bool
) -> None:
    process = batch(tmp_path, mark, "true", SLURM_JOB_END_TIME=str(int(time.time()) + left), MAX_RESTARTS="0")
    _, err = process.communicate(timeout=LIMIT_S)
    assert bool(said(tmp_path, "accelerate")) == starts == (process.returncode != USER), err
    assert starts or "--signal asks the run to leave 300 s before the end" in err and "longer --time" in err
    assert said(tmp_path, "scontrol") == "", "it would be the same again"


def test_batch_script_is_asked_before_the_launcher_begins(tmp_path: Path, mark: str) -> None:
    """During the check of the launch: nothing is started, and the job is requeued."""
    process = batch(tmp_path, mark, "true", LGP_TEST_CHECK="kill -USR1 $PPID")
    process.communicate(timeout=LIMIT_S)
    assert process.returncode == PREEMPTED and said(tmp_path, "accelerate") == ""
    assert said(tmp_path, "scontrol") == "requeue 42\n"


@pytest.mark.slow
def test_batch_script_checks_the_launch(tmp_path: Path, mark: str) -> None:
    """By the real command: GPUs that the nodes do not have, and two nodes with a file whose address is wrong."""
    check = {"LGP_TEST_CHECK": f'{sys.executable} -m lgp_dist "$@"', "CUDA_VISIBLE_DEVICES": "0,1"}
    for more, words in (
        ({"RANKS_PER_NODE": "2"}, "has none that torch can use"),
        ({"RANKS_PER_NODE": "2", "CONFIG": "launch_configs/cpu_2.yaml", "SLURM_NNODES": "2"}, "loopback"),
    ):
        process = batch(tmp_path, mark, "true", **check, **more)
        out, _ = process.communicate(timeout=LIMIT_S)
        assert process.returncode == USER and words in out, out
        assert said(tmp_path, "accelerate") == said(tmp_path, "scontrol") == ""


@pytest.mark.slow
@pytest.mark.parametrize(("grace", "save", "saved"), [("280", SAVE_S, True), ("2", 600, False)])
def test_batch_script_lets_ranks_leave(tmp_path: Path, mark: str, grace: str, save: int, saved: bool) -> None:
    """SIGUSR1 to the script reaches the ranks, which have the grace that it sets to save, and no more."""
    run = tmp_path / "RUN"
    process = batch(tmp_path, mark, f"{' '.join(TORCHRUN)} {HERE / 'preemption_worker.py'} {run} {save}", GRACE_S=grace)
    eventually(lambda: ready(run), "both ranks begin")
    process.send_signal(signal.SIGUSR1)
    out, _ = process.communicate(timeout=LIMIT_S)
    assert process.returncode == PREEMPTED, out
    assert ("without an outcome" in out) != saved
    assert said(tmp_path, "scancel") == "--signal=USR1 42\n"
    assert said(tmp_path, "scontrol") == "requeue 42\n"
    assert len(list(run.glob("left-*"))) == (2 if saved else 0)


def test_the_first_request_raises_outside_of_the_loop() -> None:
    """Whatever the signal, and no later one disturbs the end, nor after the loop has taken a request."""
    before = [signal.getsignal(number) for number in signals.SENT]
    for number in signals.SENT:
        with Preemption(at_once=True) as life:
            with pytest.raises(Preempted):
                os.kill(os.getpid(), number)
            os.kill(os.getpid(), signal.SIGTERM)
            assert life.name == signal.Signals(number).name
    with Preemption(at_once=True) as life:
        with Preemption() as loop:
            os.kill(os.getpid(), signal.SIGUSR2)
            assert loop.asked and not life.asked
        os.kill(os.getpid(), signal.SIGTERM)
        assert life.name == "SIGUSR2"
    assert [signal.getsignal(number) for number in signals.SENT] == before


def test_a_request_at_any_stage(lgp: Lgp, place: Path, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In start-up, at the begin of each stage and in the report: outcome.json says so, and the run goes on to the same
    end."""

    def asked(function: Callable[..., Any]) -> Callable[..., Any]:
        def ask(*arguments: Any) -> Any:
            os.kill(os.getpid(), signal.SIGTERM)
            return function(*arguments)

        return ask

    for stage in ("", *STAGES, "report"):
        with monkeypatch.context() as patch:
            if stage in pipeline.RUN:
                patch.setitem(pipeline.RUN, stage, asked(pipeline.RUN[stage]))
            else:
                name, module = ("publish", pipeline) if stage else ("load_manifest", start)
                patch.setattr(module, name, asked(getattr(module, name)))
            done = lgp("run", *SMALL)
        left = outcome_of(Path("run"))
        assert (done.status, left.outcome, left.stage) == (PREEMPTED, "preempted", stage), done.err
        assert done.err.endswith(f"lgp: {left.sentence}\n") and not Path("run/.lock").exists()
    assert lgp("run", *SMALL).status == 0 and outcome_of(Path("run")).outcome == "complete"
    for name in ("finetune/pool.safetensors", "evaluate/paths.json"):
        assert Path("run", name).read_bytes() == (finished / "run" / name).read_bytes()


def test_an_end_before_the_run_begins(lgp: Lgp, finished_place: Path) -> None:
    """A refused start has failed, unless another process has the run directory; it makes no folder."""
    clear_run_status(Path("run"))
    assert lgp("run", *SMALL, "--data.num-classes=8").status == USER
    left = outcome_of(Path("run"))
    assert left.outcome == "failed" and "num_classes" in left.sentence
    clear_run_status(Path("run"))
    with locked(Path("run") / LOCK):
        assert lgp("run", *SMALL, "--data.num-classes=8").status == USER
    assert not Path("run/outcome.json").exists()
    assert lgp("run", *SMALL, "--resume=latset", "--run-dir=new").status == USER and not Path("new").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "does", "expected"),
    [
        (0, "os.kill(os.getppid(), signal.SIGTERM)", RunStatus("preempted", "ancestry", 0, str(Preempted()))),
        (1, "raise ArithmeticError('Rank 1 is broken.')", RunStatus("failed", "ancestry", 0, "Rank 1 is broken.")),
    ],
    ids=["the launcher is asked", "a rank fails"],
)
def test_ranks_that_end_outside_of_steps(place: Path, mark: str, rank: int, does: str, expected: RunStatus) -> None:
    """Rank 0 computes when the launcher's signal comes, and rank 1 waits for it or has failed before."""
    (place / "rank.py").write_text(
        "import os, signal, time\nfrom lgp_dist import pipeline\nfrom lgp_dist.cli import main\n"
        "stage, rank = pipeline.RUN['ancestry'], int(os.environ['RANK'])\n"
        f"def instead(context):\n    if rank == {rank}:\n        {does}\n"
        "    while rank == 0:\n        time.sleep(0.1)\n    stage(context)\n"
        "pipeline.RUN['ancestry'] = instead\nmain()\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "LGP_TEST_MARK": mark}
    done = subprocess.run(
        [*TORCHRUN, "rank.py", "ancestry", *SMALL], env=environment, capture_output=True, text=True, timeout=LIMIT_S
    )
    assert done.returncode == 1 and outcome_of(place / "run") == expected, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("culprit", [1, 0])
def test_a_node_that_dies(place: Path, mark: str, culprit: int) -> None:
    """kill -9 of one of two ranks and of its launcher, while the other waits for it: that one names it, and ends.

    It takes 15 s in which the launcher of a rank that failed first would end the other.
    """
    (place / "rank.py").write_text(
        "import os, signal\nfrom lgp_dist import pipeline\nfrom lgp_dist.cli import main\n"
        f"def instead(context):\n    if context.workers.rank == {culprit}:\n"
        "        for process in (os.getppid(), os.getpid()):\n            os.kill(process, signal.SIGKILL)\n"
        "    context.workers.barrier()\n"
        "pipeline.RUN['ancestry'] = instead\nmain()\n"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    launch += ["--master-addr=127.0.0.1", f"--master-port={port}"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT), "LGP_TEST_MARK": mark}
    nodes = [
        subprocess.Popen(
            [*launch, f"--node-rank={node}", "rank.py", "ancestry", *SMALL],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for node in (0, 1)
    ]
    _, said = nodes[1 - culprit].communicate(timeout=LIMIT_S)
    nodes[culprit].communicate(timeout=LIMIT_S)
    assert (nodes[1 - culprit].returncode, nodes[culprit].returncode) == (1, -signal.SIGKILL), said
    left = outcome_of(place / "run")
    assert left == RunStatus("lost", "ancestry", 0, left.sentence)
    assert left.sentence.startswith(f"Rank {culprit} on {socket.gethostname()} has exited;")
    assert f"lgp{'' if culprit else ' (rank 1)'}: {left.sentence}\n" in said and "Connection" not in said, said


def test_outcome_on_disk(tmp_path: Path) -> None:
    """Written whole, and cleared."""
    outcome = RunStatus("failed", "distil", 7, "No space.")
    write_run_status(tmp_path, outcome)
    assert json.loads((tmp_path / "outcome.json").read_text()) == {
        **{"outcome": "failed", "stage": "distil", "step": 7, "sentence": "No space."}
    }
    assert outcome_of(tmp_path) == outcome and [path.name for path in tmp_path.iterdir()] == ["outcome.json"]
    clear_run_status(tmp_path)
    clear_run_status(tmp_path)
    assert list(tmp_path.iterdir()) == []
