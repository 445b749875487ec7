"""The package from a wheel, in an environment of its own outside of the checkout: what the pages promise there."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from data_helpers import photograph
from docs_helpers import ROOT
from run_helpers import LIMIT_S, SMALL

pytestmark = pytest.mark.slow  # builds a wheel; each command is a process that imports torch

SMALLER = [option for option in SMALL[1:] if not option.startswith(("--data", "--ancestry", "--run-dir"))]
API = """
from lgp_dist import api
import torch
run = api.open_run("runs/tiny")
key = run.best(max_params="400k")["key"]
images = torch.randn(2, 1, 28, 28)
with torch.no_grad():
    assert torch.equal(run.descendant(key)(images), run.pool()(images, key))
print(api.__file__)
"""

POOL = """
import json, sys, torch
sys.path.insert(0, "all")
from modeling_descendant import load_pool
pool, images = load_pool("all"), torch.randn(2, 1, 28, 28)
largest, smallest = pool.select(), pool.select(max_params=200e3)
assert smallest["params"] <= 200e3 and largest["top1"] >= smallest["top1"]
with torch.no_grad():
    assert pool(images).shape == (2, 10)
assert "lgp_dist" not in sys.modules
"""


def execute(words: list[object], folder: Path) -> str:
    """What a command prints; it must not see the checkout."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    call = list(map(str, words))
    done = subprocess.run(
        call, cwd=folder, env=environment, capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    assert done.returncode == 0, f"{call}: {done.stdout[-2000:]}{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel and, by a path file, the packages that it needs."""
    folder = tmp_path_factory.mktemp("wheel")
    tree, venv = folder / "tree", folder / "venv"
    tree.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("lgp_dist", "shards/sample"):
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=ignored)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    execute([*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, tree], folder)
    shutil.rmtree(tree)
    execute([sys.executable, "-m", "venv", "--without-pip", venv], folder)
    (wheel,) = folder.glob("lgp_dist-*.whl")
    execute([*pip, "--python", venv / "bin" / "python", "install", "--no-deps", wheel], folder)
    (site,) = venv.glob("lib/python*/site-packages")
    (site / "packages.pth").write_text(sysconfig.get_path("purelib") + "\n")  # the path files there are not read
    return venv


def test_the_pages_commands(environment: Path, tmp_path: Path) -> None:
    lgp, python = environment / "bin" / "lgp", environment / "bin" / "python"
    execute([lgp, "shards", "sample"], tmp_path)
    names = {path.name for path in (ROOT / "shards" / "sample").iterdir()}
    assert {path.name for path in (tmp_path / "shards" / "sample").iterdir()} == names
    few = ("--train", 128, "--test", 64, "--workers", 1)
    execute([lgp, "shards", "reshard", "shards/sample", "--out", "shards/few", *few], tmp_path)
    execute([lgp, "run", "tiny", *SMALLER, "--data.root=shards/few"], tmp_path)
    assert (tmp_path / "runs/tiny/report.html").exists()
    assert json.loads((tmp_path / "runs/tiny/environment.json").read_text())["commit"] == ""
    where = execute([python, "-c", API], tmp_path).splitlines()[-1]
    assert Path(where).is_relative_to(environment)

    execute([lgp, "export", "runs/tiny", "--all", "--out", "all", "--images", 4], tmp_path)
    execute([python, "-c", POOL], tmp_path)
    execute([lgp, "bench", "latency", "all", "--out", "times.csv"], tmp_path)
    chosen = execute([lgp, "descend", "runs/tiny", "--latency-table", "times.csv", "--max-latency-ms", 1e6], tmp_path)
    assert "another device (times.csv)" in chosen

    execute([lgp, "new", "own.py", "--from", "tiny", "--data", "shards/few"], tmp_path)
    shown = execute([lgp, "show", "own.py:own", "--diff", "tiny"], tmp_path)
    assert "shards/few" in shown
    execute([lgp, "run", "own.py:own", *SMALLER], tmp_path)
    image = tmp_path / "image.png"
    photograph(0, 60, 40).save(image)
    classes = json.loads((tmp_path / "shards/sample/manifest.json").read_text())["classes"]
    found = json.loads(execute([lgp, "predict", "runs/own/export", image, "--json"], tmp_path))[str(image)]
    assert len(found) == 5 and {name for name, _ in found} <= set(classes)

    shutil.copy(ROOT / "examples" / "two_branches.py", tmp_path)
    execute([python, "two_branches.py", "out"], tmp_path)
    assert (tmp_path / "out" / "network.safetensors").exists()
