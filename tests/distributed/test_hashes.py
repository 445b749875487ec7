"""Artifacts and files that a person names are hashed once: by one process, and by one rank of a node."""

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from exact_launch import HERE, ROOT, command
from hashes_worker import FAILS, NODE, WORLD, note_hashes
from run_helpers import LIMIT_S, SMALL, Lgp, has

STAGES = ("ancestry", "distil", "pool", "finetune", "evaluate", "descend", "export")


def artifact_files(run: Path) -> list[str]:
    """Every file of every artifact, as `STAGE/NAME`."""
    records = {stage: json.loads((run / stage / "artifact.json").read_text()) for stage in STAGES}
    return sorted(f"{stage}/{name}" for stage, record in records.items() for name in record["files"])


def names_in(run: Path, paths: list[str]) -> list[str]:
    """Paths in a run directory as `STAGE/NAME`, also in folders that were not complete; others by name."""
    found = []
    for path in paths:
        inside = os.path.relpath(path, run)
        stage, _, name = inside.partition("/")
        found.append(Path(path).name if stage == ".." else f"{stage.removeprefix('.').removesuffix('.partial')}/{name}")
    return sorted(found)


@pytest.mark.slow
def test_a_run_hashes_each_file_once(lgp: Lgp, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run that makes artifacts, the run that finds them complete, and stages that use what they did not make."""
    hashed: list[str] = []
    monkeypatch.setattr(hashlib, "file_digest", hashlib.file_digest)  # back in place after the test
    note_hashes(hashed.append)
    run = place / "run"
    commands = [("run",), ("run",), ("evaluate", "--force")]
    for index, (stage, *options) in enumerate(commands):
        hashed.clear()
        assert lgp(stage, *SMALL, *options).status == 0
        found = Counter(names_in(run, hashed))
        assert found.pop("ancestry.safetensors") == 1, "the weights that the recipe names"
        wanted = artifact_files(run)
        if index == 2:
            wanted = [name for name in wanted if not name.startswith(("descend", "export"))]
        assert found == Counter(wanted), commands[index]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of four ranks of two nodes got, by case."""
    folder = tmp_path_factory.mktemp("ranks")
    for name in "abc":
        (folder / name).write_bytes(name.encode())
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    worker = [sys.executable, HERE / "hashes_worker.py", "ranks", folder]
    subprocess.run(worker, env=environment, check=True, timeout=LIMIT_S)
    return [json.loads((folder / f"result-{rank}.json").read_text()) for rank in range(WORLD)]


@pytest.mark.slow
def test_values_of_all_ranks(results: list[dict[str, Any]]) -> None:
    wanted = [{"rank": rank, "text": "ü" * rank} for rank in range(WORLD)]
    assert all(result["values"] == {"value": wanted} for result in results)


@pytest.mark.slow
def test_one_rank_of_a_node_hashes(results: list[dict[str, Any]]) -> None:
    """A file that only some ranks name is read by the first of these on each node."""
    digests = {name: hashlib.sha256(name.encode()).hexdigest() for name in "abc"}
    for rank, result in enumerate(results):
        assert result["same"] == {"value": {"x": digests["a"], "y": digests["a"]}}
        assert result["own"] == {"value": {"x": digests["b" if rank == WORLD - 1 else "a"], "y": digests["c"]}}
        assert result["none"] == {"value": {}}
    first, last = ["a", "a", "c", "a"], ["a", "a", "c"]
    assert [result["hashed"] for result in results] == [first, [], last, ["b"]]


@pytest.mark.slow
def test_unreadable_file_is_a_sentence_where_it_is_named(results: list[dict[str, Any]]) -> None:
    assert [result["missing"].get("error") for result in results] == [None] * NODE + ["UserError"] * NODE
    assert len({result["missing"]["sentence"] for result in results[NODE:]}) == 1


@pytest.mark.slow
def test_work_of_one_rank_of_a_node(results: list[dict[str, Any]]) -> None:
    """Each node has its own result; where one rank fails, all ranks end with its words."""
    assert [result["once"]["value"] for result in results] == [0, 0, 2, 2]
    assert [result["refused"] for result in results] == [{"error": "UserError", "sentence": "No such weights."}] * WORLD
    assert {result["bug"]["sentence"] for result in results} == {"'lost'"}
    errors = [result["bug"]["error"] for result in results]
    assert errors == ["KeyError" if rank == FAILS else "UserError" for rank in range(WORLD)]


@pytest.mark.slow
def test_two_ranks_hash_once_and_end_together(place: Path) -> None:
    """Of two ranks on a node rank 0 hashes; where an artifact is damaged, both end with one sentence."""
    run, notes = place / "run", place / "hashes"
    launch = [*command(2, deepspeed=False), str(HERE / "hashes_worker.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "LGP_TEST_HASHES": str(notes)}

    def lgp(stage: str) -> tuple[int, list[str], dict[str, list[str]]]:
        """Status, lines of `lgp` and hashed files by rank."""
        notes.unlink(missing_ok=True)
        arguments = [*launch, stage, *SMALL, "--engine.device=cpu"]
        done = subprocess.run(arguments, cwd=place, env=environment, capture_output=True, text=True, timeout=LIMIT_S)
        by_rank: dict[str, list[str]] = {}
        for line in notes.read_text().splitlines():
            by_rank.setdefault(line.split(" ")[0], []).append(line.split(" ", 1)[1])
        said = [line for line in done.stderr.splitlines() if line.startswith("lgp")]
        return done.returncode, said, {rank: names_in(run, paths) for rank, paths in by_rank.items()}

    assert lgp("run") == (0, [], {"0": sorted(["ancestry.safetensors", *artifact_files(run)])})
    path = run / "finetune" / "pool.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    status, said, hashed = lgp("evaluate")
    assert status == 1 and len(said) == 1 and hashed.keys() == {"0"}
    has(said[0], "lgp: run/finetune/pool.safetensors is missing or damaged")
