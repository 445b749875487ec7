"""Ranks with another recipe, code, packages or shards than rank 0 are refused: every setting, on real ranks."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest
from exact_launch import HERE, ROOT, command
from rank_consistency_worker import PLAIN, WORLD, changed
from run_helpers import LIMIT_S, SMALL, gone

from lgp_dist.config.flat import flatten
from lgp_dist.data.shards.manifest import ShardManifest
from lgp_dist.engine.launch.environment import Launch
from lgp_dist.engine.rank_consistency import facts_of
from lgp_dist.recipes import tiny
from lgp_dist.run.provenance import code_hashes
from lgp_dist.stages.start import sources

pytestmark = pytest.mark.slow  # launches of several ranks

MAY_DIFFER = {
    *("data.root", "data.threads", "data.cache", "data.cache_bytes", "data.timeout_s", "data.retries"),
    *("ancestry.weights", "model.rows.0.weights", "model.rows.1.weights", "finetune.weights", "finetune.costs"),
    *("finetune.start_weights", "engine.threads", "engine.device", "debug"),
}
"""Settings that say nothing about what ranks compute or when they meet."""


def other(value: Any) -> Any:
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, list):
        return [*value, "more"]
    return value + (1 if isinstance(value, int) else 0.5 if isinstance(value, float) else "x")


def case(key: str, value: Any, *ranks: int) -> dict[str, Any]:
    return {"key": key, "value": value, "ranks": ranks or (1,)}


SETTINGS = {key: case(f"config.{key}", other(value)) for key, value in flatten(tiny()).items()}
SPECIAL = {
    "launch.zero_stage": case("launch.zero_stage", 3),
    "launch.deepspeed": case("launch.deepspeed", False),
    "launch.precision": case("launch.precision", "bf16"),
    "launch.file": case("launch.file", {"zero_optimization": {"stage": 1}}),
    "code.recipes.py": case("code.recipes.py", "5b"),
    "code.new.py": case("code.new.py", "00"),
    "versions.torch": case("versions.torch", "2.11.0"),
    "sources.data.train": case("sources.data.train", "78"),
    "name": case("name", "gr\u00fcn\u0308"),
    "limits": case("limits", [1.0, 2.0]),
    "name (long)": case("name", "x" * 1_000_000),
    "count (float)": case("count", 1.0),
    "count (bool)": case("count", True),
    "count (missing)": case("count", None),
    "count (two ranks)": case("count", 2, 1, 2),
    "count (the last)": case("count", 2, 2),
    "count (rank 0)": case("count", 2, 0),
}
REFUSED = [*(key for key in SETTINGS if key not in MAY_DIFFER), *SPECIAL]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str | None]]:
    """What each rank was told, by case."""
    folder = tmp_path_factory.mktemp("agreement")
    refusal = {"refusal": case("refusal", "No shards there.", 2)}
    (folder / "cases.json").write_text(json.dumps(SETTINGS | SPECIAL | refusal))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    worker = [sys.executable, HERE / "rank_consistency_worker.py", folder]
    subprocess.run(worker, env=environment, check=True, timeout=LIMIT_S)
    return [json.loads((folder / f"result-{rank}.json").read_text()) for rank in range(WORLD)]


@pytest.mark.parametrize("name", REFUSED)
def test_difference_is_named_on_every_rank(results: list[dict[str, str | None]], name: str) -> None:
    told = {result[name] for result in results}
    assert len(told) == 1
    key, ranks = name.split(" (")[0], (SETTINGS | SPECIAL)[name]["ranks"]
    first = 1 if ranks == (0,) else ranks[0]
    (sentence,) = told
    assert sentence is not None and sentence.startswith(f"Rank {first} differs from rank 0 in {key}: ")
    assert sentence.endswith(": start every rank with the same recipe, launch file, code, packages and shards.")
    assert ("; rank 2 too: start" in sentence) == (ranks in ((0,), (1, 2)))
    assert len(sentence) < 1000


@pytest.mark.parametrize("name", sorted(MAY_DIFFER))
def test_what_may_differ(results: list[dict[str, str | None]], name: str) -> None:
    assert [result[name] for result in results] == [None] * WORLD


FILES = ("ancestry.weights", "finetune.weights", "finetune.start_weights", "finetune.costs")
"""Settings that name a file, which may have another name or place on each rank."""


@pytest.mark.parametrize("key", FILES)
def test_content_of_named_files_is_compared(inputs: Path, tmp_path: Path, key: str) -> None:
    """Wherever a file lies, its hash is among the facts that must be equal."""
    manifest = ShardManifest.load(inputs / "shards")
    found = []
    for name, content in (("a", b"1"), ("b", b"1"), ("c", b"2")):
        (tmp_path / name).write_bytes(content)
        config = changed(tiny(), "ancestry.weights", str(tmp_path / "a"))
        config = changed(config, key, str(tmp_path / name))
        facts = facts_of(flatten(config), Launch(WORLD, WORLD, True, 1, "no", None))
        found.append(facts | {f"sources.{name}": value for name, value in sources(config, manifest).items()})
    assert found[0] == found[1]
    assert [name for name in found[0] if found[0][name] != found[2][name]] == [f"sources.{key}"]
    assert found[2][f"sources.{key}"] == hashlib.sha256(b"2").hexdigest()


def test_refusal_is_passed_on(results: list[dict[str, str | None]]) -> None:
    assert {result["refusal"] for result in results} == {"Rank 2 cannot start as the others do: No shards there."}


def test_values_are_shown(results: list[dict[str, str | None]]) -> None:
    assert f"versions.torch: '2.11.0' there, {PLAIN['versions.torch']!r} here: start" in str(
        results[0]["versions.torch"]
    )
    assert "count: nothing there, 1 here" in str(results[2]["count (missing)"])


def test_code_hashes_cover_the_package() -> None:
    files = {path.relative_to(ROOT / "lgp_dist").as_posix(): path for path in (ROOT / "lgp_dist").rglob("*.py")}
    contents = {path.read_bytes() for path in files.values()}
    assert code_hashes().keys() == files.keys() and len(set(code_hashes().values())) == len(contents)


CASES = {"other": "--seed=1", "refused": "--engine.threads=-1"}
"""What follows rank 1's other arguments."""


@pytest.fixture(scope="module")
def launches(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, int, str]]:
    """`lgp distil` on two ranks, of which rank 1 has other code, another timm and other arguments.

    Case -> its folder, status and lines of `lgp`. No process is left of either.
    """
    folder, mark = tmp_path_factory.mktemp("other"), uuid.uuid4().hex
    shutil.copytree(ROOT / "lgp_dist", folder / "lgp_dist")
    with (folder / "lgp_dist" / "recipes.py").open("a") as file:
        file.write("# a local change\n")
    (folder / "timm-9.9.9.dist-info").mkdir()
    (folder / "timm-9.9.9.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: timm\nVersion: 9.9.9\n")
    launch, running, found = command(2, deepspeed=True), {}, {}
    for name, arguments in CASES.items():
        place = folder / name
        shutil.copytree(inputs, place)
        environment = {"LGP_TEST_ARGUMENTS": arguments, "LGP_TEST_FOLDER": str(folder), "LGP_TEST_MARK": mark + name}
        running[name] = subprocess.Popen(
            [*launch, HERE / "other_rank.py", "distil", *SMALL, "--engine.device=cpu"],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment},
            cwd=place,
            stderr=subprocess.PIPE,
            text=True,
        )
    for name, process in running.items():
        _, errors = process.communicate(timeout=LIMIT_S)
        lines = [line for line in errors.splitlines() if line.startswith("lgp")]
        gone(mark + name)
        found[name] = folder / name, process.returncode, "\n".join(lines)
    return found


def test_launch_with_another_recipe_code_and_package(launches: dict[str, tuple[Path, int, str]]) -> None:
    """One sentence names all three; nothing is written, nobody is left."""
    place, status, sentence = launches["other"]
    hashes = code_hashes()
    assert status == 1
    assert sentence.startswith("lgp: Rank 1 differs from rank 0 in code.recipes.py: '")
    assert f"there, '{hashes['recipes.py']}' here; seed: 1 there, 0 here; versions.timm: '9.9.9' there, " in sentence
    assert not (place / "run").exists()


def test_launch_where_one_rank_refuses_its_recipe(launches: dict[str, tuple[Path, int, str]]) -> None:
    """All say why: on another node, whose launcher does not see a rank end, ranks would wait for it for minutes."""
    place, status, sentence = launches["refused"]
    assert status == 1
    assert sentence == (
        "lgp: Rank 1 cannot start as the others do: engine.threads is -1, but must be from 0 to 4096: choose another "
        "value."
    )
    assert not (place / "run").exists()
