"""What a stage leaves: complete or absent, and what it was made from."""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from run_helpers import ABOUT, SMALL, Lgp, has, overwrite, refused, snapshot, write_ancestry

from lgp_dist.config.flat import STAGES, depends_on, flatten, stage_settings
from lgp_dist.config.run_config import RunConfig
from lgp_dist.errors import UserError
from lgp_dist.files import write_json
from lgp_dist.recipes import RECIPES
from lgp_dist.run.artifacts import Artifact, RunDirectory

TINY = RECIPES["tiny"]()
Fill = Callable[[Path], dict[str, Any]]


def files(**contents: str) -> Fill:
    """Writes files of these contents."""

    def fill(folder: Path) -> dict[str, Any]:
        for name, text in contents.items():
            (folder / f"{name}.txt").write_text(text)
        return {"count": len(contents)}

    return fill


def run_of(root: Path, config: RunConfig = TINY) -> RunDirectory:
    """A run directory whose stages have these settings."""
    return RunDirectory(root, stage_settings(config), config.recipe)


def settings_of(config: RunConfig, stage: str) -> dict[str, Any]:
    """What a stage depends on."""
    return depends_on(stage_settings(config), stage)


def make(
    root: Path, stage: str = "ancestry", config: RunConfig = TINY, fill: Fill | None = None, **about: Any
) -> Artifact:
    """An artifact whose inputs are those artifacts of the folder that come before it, or `inputs`."""
    inputs = about.pop("inputs", [])
    return run_of(root, config).write(stage, inputs, fill or files(a="one", b="two"), {"seconds": 1.0, **about})


def with_setting(key: str, value: Any, config: Any = TINY) -> Any:
    """A configuration with another value at a dotted key."""
    name, _, rest = key.partition(".")
    if isinstance(config, tuple):
        place = int(name)
        return (*config[:place], with_setting(rest, value, config[place]), *config[place + 1 :])
    return dataclasses.replace(config, **{name: with_setting(rest, value, getattr(config, name)) if rest else value})


def test_record_names_files_inputs_settings_and_facts(tmp_path: Path) -> None:
    first = make(tmp_path)
    second = make(tmp_path, "distil", inputs=[first], world=2)
    found = RunDirectory(tmp_path).find("distil")
    assert found is not None and found.record == second.record
    assert found.record["inputs"] == {"ancestry": first.id}
    assert found.record["config"] == settings_of(TINY, "distil")
    assert sorted(found.record["files"]) == ["a.txt", "b.txt"]
    assert (found.facts, found.record["world"]) == ({"count": 2}, 2)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), RuntimeError("bug")])
def test_failed_write_leaves_the_old_artifact(tmp_path: Path, error: BaseException) -> None:
    make(tmp_path)
    before = snapshot(tmp_path / "ancestry")

    def fill(folder: Path) -> dict[str, Any]:
        (folder / "a.txt").write_text("half")
        raise error

    with pytest.raises(type(error)):
        make(tmp_path, fill=fill)
    assert snapshot(tmp_path / "ancestry") == before
    assert run_of(tmp_path).is_current("ancestry")
    assert not list(tmp_path.glob(".*/artifact.json"))


@pytest.mark.parametrize("call", [0, 1, 2])
def test_kill_at_each_rename_is_survived(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """Renames of a write: artifact.json, the old folder away, the new folder to its place."""
    make(tmp_path)
    before, calls, replace = snapshot(tmp_path / "ancestry"), [], os.replace

    def killed(source: Any, target: Any) -> None:
        calls.append(target)
        if len(calls) == call + 1:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path, fill=files(a="new"))
    run = run_of(tmp_path)
    if call < 2:
        assert run.is_current("ancestry") and snapshot(tmp_path / "ancestry") == before
    else:
        assert not run.is_current("ancestry"), "absent, never half"
    written = make(tmp_path, fill=files(a="new"))
    assert run.is_current("ancestry") and (written.folder / "a.txt").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ancestry"]


def test_leftovers_of_a_killed_write_do_not_get_into_the_next(tmp_path: Path) -> None:
    make(tmp_path)
    for name in (".ancestry.partial", ".ancestry.old"):
        shutil.copytree(tmp_path / "ancestry", tmp_path / name)
        (tmp_path / name / "left.txt").write_text("over")
    assert sorted(make(tmp_path).record["files"]) == ["a.txt", "b.txt"]
    assert sorted(snapshot(tmp_path)) == [
        "ancestry",
        *(f"ancestry/{name}" for name in ("a.txt", "artifact.json", "b.txt")),
    ]


def test_id_depends_on_settings_inputs_and_files_alone(tmp_path: Path) -> None:
    base = make(tmp_path / "1", "distil", inputs=[make(tmp_path / "1")])
    again = make(tmp_path / "2", "distil", inputs=[make(tmp_path / "2")], seconds=7.0, command="another")
    assert again.id == base.id
    other = make(tmp_path / "3", fill=files(a="three"))
    ids = [
        base.id,
        make(tmp_path / "4", "distil", inputs=[other]).id,
        make(tmp_path / "5", "distil", with_setting("distil.alpha", 0.5), inputs=[make(tmp_path / "5")]).id,
        make(tmp_path / "6", "distil", fill=files(a="one", b="3"), inputs=[make(tmp_path / "6")]).id,
        make(tmp_path / "7", "distil", fill=files(a="one", c="two"), inputs=[make(tmp_path / "7")]).id,
    ]
    assert len(set(ids)) == len(ids)


RUNTIME_ONLY = {
    "run_dir": "elsewhere",
    "force": True,
    "debug": True,
    "trackers": (),
    "tracker_args": ("tensorboard.flush_secs=60",),
    "data.threads": 5,
    "data.max_bad": 7,
    "engine.threads": 3,
    "engine.device": "cpu",
    "distil.train.log_every": 1,
}


@pytest.mark.parametrize("key", RUNTIME_ONLY)
def test_no_artifact_depends_on_runtime_only_settings(tmp_path: Path, key: str) -> None:
    changed = with_setting(key, RUNTIME_ONLY[key])
    assert flatten(changed) != flatten(TINY)
    assert all(settings_of(changed, stage) == settings_of(TINY, stage) for stage in STAGES)
    make(tmp_path)
    assert run_of(tmp_path, changed).is_current("ancestry")


@pytest.mark.parametrize("name", RECIPES)
def test_every_other_setting_belongs_to_the_meaning(name: str) -> None:
    config = RECIPES[name]()
    assert set(settings_of(config, "export")) == set(flatten(config, with_runtime_only=False)) - {"recipe"}
    for earlier, later in zip(STAGES, STAGES[1:], strict=False):
        assert settings_of(config, earlier).items() < settings_of(config, later).items()


@pytest.mark.parametrize(
    ("key", "value", "first"),
    [
        ("seed", 1, "ancestry"),
        ("data.image_size", 14, "ancestry"),
        ("model.patch_size", 14, "ancestry"),
        ("model.rows.0.heads", 2, "distil"),
        ("distil.train.lr", 1.0, "distil"),
        ("pool.ridge", 1.0, "pool"),
        ("finetune.policy", "shared", "finetune"),
        ("budget.max_flops", 1.0, "descend"),
        ("export.images", 1, "export"),
    ],
)
def test_setting_counts_from_its_stage_on(tmp_path: Path, key: str, value: Any, first: str) -> None:
    changed = with_setting(key, value)
    found = [stage for stage in STAGES if settings_of(changed, stage) != settings_of(TINY, stage)]
    assert found == list(STAGES[STAGES.index(first) :])
    make(tmp_path, first)
    with pytest.raises(UserError, match=rf"{key} was .*, now {value!r}"):
        run_of(tmp_path, changed).is_current(first)


@pytest.mark.parametrize("damage", ["missing", "changed"])
def test_damaged_file_is_named(tmp_path: Path, damage: str) -> None:
    path = make(tmp_path).folder / "b.txt"
    path.unlink() if damage == "missing" else path.write_text("twO")
    with pytest.raises(UserError, match=rf"{path} is missing or damaged"):
        run_of(tmp_path).is_current("ancestry")


@pytest.mark.parametrize("stage", ["distil", "pool"])
def test_artifact_from_another_input_is_refused(tmp_path: Path, stage: str) -> None:
    """Its own input, or the input of its input."""
    make(tmp_path, "pool", inputs=[make(tmp_path, "distil", inputs=[make(tmp_path)])])
    run = run_of(tmp_path)
    assert run.is_current(stage)
    make(tmp_path)
    assert run.is_current(stage), "the same again"
    make(tmp_path, fill=files(a="other"))
    with pytest.raises(UserError, match="made from another ancestry"):
        run.is_current(stage)
    shutil.rmtree(tmp_path / "ancestry")
    with pytest.raises(UserError, match="ancestry"):
        run.is_current(stage)


def test_absent_stage(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    assert run.find("pool") is None and not run.is_current("pool")
    with pytest.raises(UserError, match=r"run `lgp pool tiny` first\.$"):
        run.require("pool")


def test_json_is_written_whole_or_not(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert path.read_text() == '{\n  "a": 1\n}\n' and list(tmp_path.iterdir()) == [path]


@pytest.mark.slow
def test_second_run_skips_everything(lgp: Lgp, finished_place: Path) -> None:
    def state() -> tuple[dict[str, str], dict[str, int]]:
        made = [path for stage in STAGES for path in Path("run", stage).rglob("*")]
        return snapshot(Path("run"), ("log.txt", "tracking")), {str(path): path.stat().st_mtime_ns for path in made}

    before = state()
    result = lgp("run", *SMALL)
    assert result.status == 0
    lines = [line.split(" ", 1)[1] for line in result.err.splitlines() if "(recipe " not in line]
    said = [line for line in lines if not line.startswith(("launch: ", "node 0 "))]
    assert len(lines) == len(said) + 2 and said == [f"{stage}: complete in run/{stage}, skipped" for stage in STAGES]
    assert state() == before


# What the stages refuse


@pytest.mark.parametrize("stage", ["distil", "finetune", "export"])
def test_settings_that_differ_from_the_artifact(lgp: Lgp, finished_place: Path, stage: str) -> None:
    sentence = refused(lgp, stage, "--distil.alpha=0.5")
    has(sentence, "artifact.json", "distil.alpha", "0.1", "0.5", "--run-dir", "--force")


def test_refusal_leaves_the_records_of_the_run(lgp: Lgp, finished_place: Path) -> None:
    """config.json says how the artifacts were made, so a refused command must not put its own settings there."""
    before = snapshot(Path("run"), ("log.txt",))
    assert lgp("distil", *SMALL, "--distil.alpha=0.5").status == 2
    assert json.loads(Path("run/config.json").read_text())["distil.alpha"] == 0.1
    assert snapshot(Path("run"), ("log.txt",)) == before


@pytest.mark.parametrize(
    ("stage", "first"),
    [
        ("distil", "ancestry"),
        ("pool", "distil"),
        ("finetune", "ancestry"),
        ("evaluate", "pool"),
        ("descend", "evaluate"),
        ("export", "finetune"),
    ],
)
def test_stage_before_its_input(lgp: Lgp, place: Path, stage: str, first: str) -> None:
    before = snapshot(Path("."))
    has(lgp(stage, *SMALL).sentence, f"run/{first} ", f"`lgp {first} tiny` first")
    assert {path: digest for path, digest in snapshot(Path(".")).items() if not path.startswith("run")} == before
    assert not [path for path in Path("run").iterdir() if path.name not in ABOUT]


@pytest.mark.slow
def test_stale_downstream(lgp: Lgp, finished_place: Path) -> None:
    """After another ancestry no later artifact may pass for current, however far down it is."""
    write_ancestry(Path("ancestry.safetensors"), seed=1)
    assert lgp("ancestry", *SMALL, "--force").status == 0
    accepted = [stage for stage in STAGES[1:] if lgp(stage, *SMALL).status == 0]
    assert accepted == []
    has(refused(lgp, "pool"), "artifact.json", "ancestry.weights was", "--force")


@pytest.mark.slow
def test_same_ancestry_again_makes_nothing_stale(lgp: Lgp, finished_place: Path) -> None:
    assert lgp("ancestry", *SMALL, "--force").status == 0
    assert lgp("run", *SMALL).err.count("skipped") == len(STAGES)


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["distil"], ["pool", "--force"]], ids=" ".join)
def test_damaged_artifact(lgp: Lgp, finished_place: Path, arguments: list[str]) -> None:
    rows = Path("run/distil/rows.safetensors")
    middle = rows.stat().st_size // 2
    overwrite(rows, middle, bytes([rows.read_bytes()[middle] ^ 1]))
    has(refused(lgp, arguments[0], *arguments[1:]), str(rows), "damaged", "lgp distil", "--force")
    assert lgp("distil", *SMALL, "--force").status == 0
    assert lgp("pool", *SMALL, "--force").status == 0


@pytest.mark.slow
@pytest.mark.parametrize("text", ["", "{", "{}", "[]", '{"stage": "distil"}'])
def test_damaged_record(lgp: Lgp, finished_place: Path, text: str) -> None:
    Path("run/distil/artifact.json").write_text(text)
    has(refused(lgp, "distil"), "run/distil/artifact.json", "--force")
    assert lgp("distil", *SMALL, "--force").status == 0


@pytest.mark.slow
def test_metrics_cut_off_by_a_kill(lgp: Lgp, finished_place: Path) -> None:
    """A process that is killed while it writes leaves half a line; the run goes on anyway."""
    with Path("run/metrics.jsonl").open("a") as file:
        file.write('{"stage": "distil", "st')
    assert lgp("run", *SMALL).status == 0
    assert lgp("distil", *SMALL, "--force").status == 0
