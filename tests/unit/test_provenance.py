"""The commit that a result names, by git itself in a copy of the package's folder, and the command."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import lgp_dist

PACKAGE = Path(lgp_dist.__file__).parent
NAME = "from lgp_dist.run.provenance import git_commit; print(git_commit())"


def test_commit_and_changes(tmp_path: Path) -> None:
    """Changed sources are said; results, which a script writes one after another, do not change what made them."""
    tree = tmp_path / "tree"

    def run(*command: str) -> str:
        environment = {**os.environ, "PYTHONPATH": str(tree), "GIT_CONFIG_GLOBAL": os.devnull}
        environment |= {"GIT_CEILING_DIRECTORIES": str(tmp_path)}
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    shutil.copytree(PACKAGE, tree / "lgp_dist", ignore=shutil.ignore_patterns("__pycache__"))
    (tree / "benchmarks").mkdir()
    (tree / "benchmarks" / "step.json").write_text("[]")
    python = (sys.executable, "-c", NAME)
    assert run(*python) == ""
    run("git", "init", "--quiet")
    run("git", "add", ".")
    run("git", "-c", "user.name=one", "-c", "user.email=one@localhost", "commit", "--quiet", "--message", "All")
    commit = run("git", "rev-parse", "HEAD")
    assert run(*python) == commit
    (tree / "benchmarks" / "step.json").write_text("[1]")
    (tree / "notes").write_text("of no commit")
    assert run(*python) == commit
    with (tree / "lgp_dist" / "recipes.py").open("a") as file:
        file.write("\n")
    assert run(*python) == f"{commit}+changes"


def test_command_is_as_a_shell_takes_it() -> None:
    """Words with spaces and quotes are those that were given."""
    words = ["run", "tiny", "--run-dir", "a folder's", "--data.mean", "0.5"]
    show = "from lgp_dist.run.provenance import command; print(command())"
    done = subprocess.run([sys.executable, "-c", show, *words], capture_output=True, text=True, check=True)
    assert shlex.split(done.stdout) == ["lgp", *words]
