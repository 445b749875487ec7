"""`lgp doctor`: each finding on a real lack of this machine, made for the test."""

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from run_helpers import SAMPLE, Lgp

from lgp_dist.commands import doctor
from lgp_dist.commands.doctor import Finding, check_backends, check_compiler, check_data, check_open_files, check_shm
from lgp_dist.engine.launch.machine import open_file_limit, stale_shm

NONE = {"cuda": None, "devices": [], "nccl": None, "gloo": True}
CARD = {"cuda": "13.0", "devices": ["NVIDIA H100"] * 2, "nccl": "2.28.3", "gloo": True}


@pytest.mark.slow
def test_doctor_prints_a_line_for_each(lgp: Lgp) -> None:
    """Text and --json say the same, and the status follows; nothing is a traceback, with or without a GPU."""
    result = lgp("doctor", "--json", "--data", SAMPLE)
    rows = json.loads(result.out)
    assert result.status == (0 if all(row["ok"] for row in rows) else 1)
    names = [row["name"] for row in rows]
    assert set(names) - {"nccl"} == {"versions", "gpu", "gloo", "compiler", "shared memory", "open files", "data"}
    result = lgp("doctor", "--data", "/nowhere")
    assert result.status == 1 and "Traceback" not in result.out + result.err
    last = result.out.splitlines()[-1]
    assert last.startswith("to do  data:") and "no folder /nowhere" in last


def test_doctor_itself_needs_no_torch() -> None:
    """torch is asked in a process of its own."""
    code = "import sys, lgp_dist.commands.doctor, lgp_dist.cli.doctor; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def make_package(folder: Path, name: str, release: str, *requires: str) -> None:
    """Metadata of an installed package, as pip leaves it."""
    info = folder / f"{name}-{release}.dist-info"
    info.mkdir()
    lines = [
        "Metadata-Version: 2.1",
        f"Name: {name}",
        f"Version: {release}",
        *(f"Requires-Dist: {r}" for r in requires),
    ]
    (info / "METADATA").write_text("\n".join(lines) + "\n")


def test_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing package and one out of range; extras and other systems do not count."""
    monkeypatch.syspath_prepend(tmp_path)
    others = ("lgpx; extra == 'y'", "lgpw; sys_platform == 'win32'")
    make_package(tmp_path, "lgptop", "1", "lgpa>=2,<3", "lgpb", "lgpgone>=4", *others)
    make_package(tmp_path, "lgpa", "1.5")
    make_package(tmp_path, "lgpb", "2.0")
    found = list(doctor.check_versions("lgptop"))
    assert [finding.ok for finding in found] == [False] * 2
    for finding, words in zip(
        found,
        [
            ("lgptop needs lgpa<3,>=2", "1.5"),
            ("lgptop needs lgpgone>=4", "not installed"),
        ],
        strict=True,
    ):
        assert all(word in finding.text for word in words) and "pip install" in finding.text
    (ours,) = doctor.check_versions("lgp_dist")
    assert ours.ok and f"torch {version('torch')}" in ours.text
    (absent,) = doctor.check_versions("lgp-no-such-package")
    assert not absent.ok and "not installed" in absent.text


@pytest.mark.parametrize(
    ("found", "driver", "expected"),
    [
        (NONE, False, {"gpu": True, "gloo": True}),
        (NONE, True, {"gpu": False, "gloo": True}),
        ({**NONE, "cuda": "13.0"}, True, {"gpu": False, "gloo": True}),
        ({**NONE, "gloo": False}, False, {"gpu": True, "gloo": False}),
        (CARD, True, {"gpu": True, "nccl": True, "gloo": True}),
        ({**CARD, "nccl": None}, True, {"gpu": True, "nccl": False, "gloo": True}),
        ("torch cannot be used (x)", False, {"gpu": False}),
    ],
)
def test_backends(found: Any, driver: bool, expected: dict[str, bool]) -> None:
    """What torch says and what the machine has, on machines that this is not."""
    findings = list(check_backends(found, driver))
    assert {finding.name: finding.ok for finding in findings} == expected
    assert all(finding.text.endswith(".") for finding in findings if not finding.ok)


def test_torch_that_does_not_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A broken installation is a line that ends with torch's own words."""
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.99: cannot open shared object file')\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    said = doctor.ask_torch()
    assert isinstance(said, str) and "libcudart.so.99" in said


def test_compiler(tmp_path: Path) -> None:
    """None, one without Python's headers, one with them."""
    assert "There is no no-such-compiler" in check_compiler("no-such-compiler", tmp_path).text
    assert not (found := check_compiler("sh", tmp_path)).ok and "Python.h" in found.text
    (tmp_path / "Python.h").touch()
    assert check_compiler("sh", tmp_path) == Finding("compiler", True, shutil.which("sh") or "")


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[Path]:
    """A folder in which files lie as they do in /dev/shm."""
    for name in ("deepspeed_allreduce_buffer_0_127.0.0.1_29500_1", "nccl-Abc123", "somebody-elses"):
        (tmp_path / name).write_bytes(bytes(1000))
    yield tmp_path


def test_stale_files(shared: Path) -> None:
    """What a process maps or has open is in use; what has another name is left alone; the rest is named."""
    names = ["deepspeed_allreduce_buffer_0_127.0.0.1_29500_1", "nccl-Abc123"]
    assert stale_shm(shared) == [shared / name for name in names]
    code = (
        "import mmap, os, sys\nkept = mmap.mmap(os.open(sys.argv[1], os.O_RDWR), 0)\n"
        "os.closerange(3, 64)\nprint(1, flush=True)\nsys.stdin.read()"  # mapped, and no longer open
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, shared / names[0]], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == b"1\n"
        assert stale_shm(shared) == [shared / names[1]]
        with (shared / names[1]).open("rb"):
            assert stale_shm(shared) == []
        process.communicate(b"\n")
    found = check_shm(stale_shm(shared))
    assert not found.ok and f"rm {shared / names[0]}" in found.text and "2 file(s)" in found.text
    assert check_shm([]).ok and stale_shm(shared / "none") == []


def test_open_files() -> None:
    """The limit of this process, really lowered."""
    soft, hard = open_file_limit()
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
    try:
        found = check_open_files(*open_file_limit())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert not found.ok and "512" in found.text and "ulimit -n" in found.text
    assert check_open_files(-1, -1) == Finding("open files", True, "no limit")
    assert "hard limit" in check_open_files(256, 512).text


def test_data(tmp_path: Path) -> None:
    """A folder that is whole, and one that lacks a shard."""
    assert check_data(str(SAMPLE)) == Finding("data", True, f"{SAMPLE}: 2000 in test, 10000 in train")
    (tmp_path / "manifest.json").write_bytes((SAMPLE / "manifest.json").read_bytes())
    found = check_data(str(tmp_path))
    assert not found.ok and "is missing" in found.text
