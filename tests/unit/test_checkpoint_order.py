"""The order of a save as the kernel sees it: a checkpoint is named after all that it holds has reached the disk."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from run_helpers import LIMIT_S

SAVE = "import sys; from pathlib import Path; from checkpoint_helpers import Toy; toy = Toy(Path(sys.argv[1])); "
SAVE += "toy.train(1); toy.save(1)"
CALL = re.compile(r"^\d+ +(write|pwrite64|fsync|rename|renameat|renameat2)\((.*)$")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
def test_everything_is_on_disk_before_the_name(tmp_path: Path) -> None:
    trace, folder = tmp_path / "trace", tmp_path / "s"
    calls = "trace=write,pwrite64,fsync,rename,renameat,renameat2"
    done = subprocess.run(
        [
            "strace",
            "-f",
            "-y",
            "-qq",
            "-s",
            "256",
            "-e",
            calls,
            "-o",
            str(trace),
            sys.executable,
            "-c",
            SAVE,
            str(folder),
        ],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
        },
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    if "ptrace" in done.stderr and done.returncode:
        pytest.skip("strace may not trace here")
    assert done.returncode == 0, done.stderr[-3000:]
    events = []
    for line in trace.read_text().splitlines():
        found = CALL.match(line)
        if found and str(folder) in found[2]:
            path = re.findall(re.escape(str(folder)) + r"[^>\"]*", found[2])
            events.append(
                (found[1].removesuffix("64").rstrip("at2"), [part.removeprefix(str(folder)) for part in path])
            )
    partial, final = "/.step-00000001.partial", "/step-00000001"
    part, manifest = f"{partial}/rank-00000.safetensors", f"{partial}/manifest.json"
    wanted = [("write", ".tmp"), ("rename", part), ("fsync", part), ("write", manifest), ("fsync", manifest)]
    wanted += [("fsync", partial), ("rename", final), ("fsync", "")]
    places = []
    for call, path in wanted:  # the last of each: safetensors writes under a name of its own and renames
        fits = [place for place, (name, paths) in enumerate(events) if name == call and _is(paths[-1], path)]
        assert fits, (call, path, events)
        places.append(fits[-1])
    assert places == sorted(places), list(zip(wanted, places, strict=True))


def _is(path: str, wanted: str) -> bool:
    return wanted in path if wanted == ".tmp" else path == wanted
