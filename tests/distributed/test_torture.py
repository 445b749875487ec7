"""A minute of the campaign that scripts/torture runs for as long as asked."""

import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def test_a_minute_of_faults(tmp_path: Path) -> None:
    """Every run ends with the weights, metrics and ledger of one that nothing happened to."""
    out = tmp_path / "out.json"
    done = subprocess.run(
        [sys.executable, str(HERE / "torture.py"), "--seconds", "60", "--seed", "7", "--out", str(out)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]
    report = json.loads(out.read_text())
    assert report["violations"] == [] and report["seen"]["exact ends"] == report["runs"] >= 1
    assert sum(report["tried"].values()) >= 1 and report["seen"]["whole checkpoints"] >= 1
    assert report["seen"]["exact resumes"] >= 1
