"""How far evaluation and saves are: lines in the log, or a bar on a terminal."""

import os
import pty
import subprocess
import sys
import termios
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest
from checkpoint_helpers import Toy
from run_helpers import LIMIT_S, SMALL, Lgp
from torch import Tensor

from lgp_dist.engine import progress
from lgp_dist.engine.checkpoints.disk import Disk
from lgp_dist.engine.progress import shown


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line for each unit of work."""
    monkeypatch.setattr(progress, "LINE_S", 0.0)


@pytest.mark.parametrize("main", [True, False])
def test_rank_0_writes_lines_of_long_work(main: bool, always: None, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="lgp"):
        assert list(shown("abc", main, "accuracy", 3, "batch")) == list("abc")
    lines = [message.partition("  left ")[0] for message in caplog.messages]
    assert lines == (["accuracy  batch 1/3", "accuracy  batch 2/3"] if main else [])


def test_short_work_has_no_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="lgp"):
        assert len(list(shown(range(9), True, "accuracy", 9, "batch"))) == 9
    assert not caplog.messages


def test_a_terminal_has_a_bar() -> None:
    """A real terminal, at the other end of which this test reads."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    code = "from lgp_dist.engine.progress import shown; list(shown(range(4), True, 'accuracy', 4, 'batch'))"
    subprocess.run([sys.executable, "-c", code], stderr=theirs, check=True)
    text = os.read(ours, 1 << 16).decode()
    os.close(theirs)
    os.close(ours)
    assert "accuracy:   0%" in text and "/4 [" in text and "batch/s" in text


@pytest.mark.slow
@pytest.mark.parametrize("before", [False, True])
def test_evaluation_has_lines(before: bool, finished_place: Path, lgp: Lgp, always: None) -> None:
    """Of as many batches as the images of the split make: 32 in batches of 8."""
    wanted = ["--evaluate.before"] if before else []
    done = lgp("evaluate", *SMALL, *wanted, "--evaluate.batch-size", "8", "--force")
    assert done.status == 0, done
    lines = [line[9:].partition("  left ")[0] for line in done.err.splitlines() if "batch " in line]
    kinds = ("accuracy", "accuracy before fine-tuning")[: 1 + before]
    assert lines == [f"evaluate: {kind} of 18 models  batch {batch}/4" for kind in kinds for batch in (1, 2, 3)]


def test_a_save_that_is_waited_for_has_lines(tmp_path: Path, always: None, caplog: pytest.LogCaptureFixture) -> None:
    """The writer stops after half of its bytes until the line is there."""
    told = threading.Event()

    class SlowDisk(Disk):
        def write_tensors(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
            path.write_bytes(bytes(sum(tensor.nbytes for tensor in tensors.values()) // 2))
            assert told.wait(LIMIT_S)
            super().write_tensors(path, tensors)

    toy = Toy(tmp_path / "s", SlowDisk())
    toy.train(1)
    with caplog.at_level("INFO", logger="lgp"):
        caplog.handler.addFilter(lambda record: told.set() or True if "written" in record.getMessage() else True)
        toy.save(1)
    first = next(message for message in caplog.messages if "written" in message)
    size = 3 * 4 * (3 * 4 + 4 + 4 * 2 + 2)  # weights and AdamW's two moments in fp32
    assert first.startswith(f"checkpoint: step 1  {size // 2}B of {size}B written  left ")
    assert toy.restore() == 1
