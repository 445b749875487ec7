"""Resuming under changed settings: those that no stage depends on pass, others are refused or allowed, each by name."""

import shutil
from collections.abc import Iterator
from contextlib import chdir
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from run_helpers import SMALL, Lgp, call_main, has

from lgp_dist.config.flat import depends_on, flatten, stage_settings
from lgp_dist.config.run_config import RunConfig
from lgp_dist.engine.checkpoints.manifest import TrainState, check_settings, read_manifest
from lgp_dist.errors import UserError
from lgp_dist.recipes import tiny
from lgp_dist.run.checks import check_config

STAGE = "finetune"
PASS: dict[str, Any] = {
    "data.root": "elsewhere",
    "data.threads": 3,
    "data.max_bad": 7,
    "data.cache": "/cache",
    "data.cache_bytes": 10**9,
    "data.timeout_s": 9.0,
    "data.retries": 1,
    "engine.threads": 2,
    "faults.skip_steps": 5,
    "faults.timeout_s": 60.0,
    "checkpoint.every": 3,
    "checkpoint.keep": 9,
    "checkpoint.on_error": "stop",
    "finetune.watch_every": 4,
    "finetune.train.log_every": 1,
    "run_dir": "there",
    "trackers": (),
    "tracker_args": ("tensorboard.flush_secs=60",),
    "recipe": "another",
    "resume": "latest",
    "debug": True,
    "evaluate.batch_size": 8,
    "budget.max_params": 1e6,
    "export.images": 3,
}
"""Settings that stage finetune does not depend on, and another value of each."""
REFUSE: dict[str, Any] = {
    "seed": 1,
    "data.train_split": "test",
    "data.image_size": 56,
    "data.num_classes": 11,
    "data.mean": (0.5,),
    "data.interpolation": "bilinear",
    "data.crop_pct": 0.9,
    "data.window": 8,
    "data.augment.hflip": 0.1,
    "data.augment.auto_augment": "rand-m9-mstd0.5",
    "engine.precision": "bf16",
    "model.depth": 9,
    "model.patch_size": 14,
    "model.rows.1.drop_path": 0.1,
    "ancestry.source": "train",
    "distil.alpha": 0.25,
    "distil.train.lr": 0.5,
    "pool.ridge": 0.5,
    "finetune.policy": "shared",
    "finetune.row_weight": 2.0,
    "finetune.row_lr": (1.0, 0.25),
    "finetune.sandwich": False,
    "finetune.tau": 2.0,
    "finetune.loss_scale": "paper",
    "finetune.gradients.unused": "zero",
    "finetune.train.epochs": 17.0,
    "finetune.train.batch_size": 64,
    "finetune.train.accumulate": 2,
    "finetune.train.optimizer": "sgd",
    "finetune.train.clip_grad": 2.0,
    "finetune.train.mixup": 0.5,
}
"""Settings that it depends on."""


def changed(config: Any, key: str, value: Any) -> Any:
    """A configuration with a value under a dotted key."""
    head, _, rest = key.partition(".")
    if isinstance(config, tuple):
        return tuple(changed(part, rest, value) if str(at) == head else part for at, part in enumerate(config))
    return replace(config, **{head: changed(getattr(config, head), rest, value) if rest else value})


def state(config: RunConfig) -> TrainState:
    fields: dict[str, Any] = {"stage": STAGE, "step": 5, "steps": 9, "seed": 0, "data": {}, "world": 1, "engine": "ddp"}
    return TrainState(**fields, config=depends_on(stage_settings(config), STAGE))


@pytest.mark.parametrize("key", [*PASS, *REFUSE])
def test_verdict(key: str) -> None:
    """54 configurations with one setting changed; a refusal names key, old and new value and what lets it through."""
    value = {**PASS, **REFUSE}[key]
    was, now = flatten(tiny())[key], list(value) if isinstance(value, tuple) else value
    assert was != now, "the setting does change"
    before, after = state(tiny()), state(changed(tiny(), key, value))
    if key in PASS:
        check_settings(before, after, ())
        return
    with pytest.raises(UserError) as caught:
        check_settings(before, after, ())
    has(str(caught.value), f"({key} was {was!r}, now {now!r})", f"--allow-change {key}", "finetune", "step 5")
    with pytest.raises(UserError):
        check_settings(before, after, ("seed2", key.rpartition(".")[0]))
    check_settings(before, after, (key,))


def test_all_at_once() -> None:
    """Every refused key is either named or counted."""
    config = tiny()
    for key, value in (PASS | REFUSE).items():
        config = changed(config, key, value)
    with pytest.raises(UserError) as caught:
        check_settings(state(tiny()), state(config), ())
    named = [key for key in REFUSE if f"{key} was" in str(caught.value)]
    assert len(named) == 8 and f"and {len(REFUSE) - 8} more" in str(caught.value)
    check_settings(state(tiny()), state(config), tuple(REFUSE))


@pytest.mark.parametrize(
    "keys",
    [("seed",), tuple(REFUSE), ("data.train", "data.test", "ancestry.weights", "finetune.costs"), ("distil.id",),
     ("model.rows.7.width",), ("data.train_split", "data.train2")],
)  # fmt: skip
def test_keys_that_may_be_allowed(keys: tuple[str, ...]) -> None:
    """Settings, sources, ids of artifacts; rows and splits that only the checkpoint has."""
    check_config(replace(tiny(), allow_change=keys))


@pytest.mark.parametrize(
    ("key", "near"),
    [("sead", "the nearest is seed"), ("finetune.train.batchsize", "nearest is finetune.train.batch_size"),
     ("finetune", ""), ("data.train2", "nearest is data.train"), ("model.rows.7.colour", ""),
     ("", ""), ("*", ""), ("../../x", "")],
)  # fmt: skip
def test_keys_that_are_none(key: str, near: str) -> None:
    with pytest.raises(UserError) as caught:
        check_config(replace(tiny(), allow_change=("seed", key)))
    has(str(caught.value), f"allow_change names {key!r}, which is no setting", near)


@pytest.fixture(scope="module")
def stopped(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose stage finetune was lost after its checkpoint of step 1."""
    folder = tmp_path_factory.mktemp("stopped") / "place"
    shutil.copytree(finished, folder)
    with chdir(folder):
        for stage in ("finetune", "evaluate", "descend", "export"):
            shutil.rmtree(folder / "run" / stage)
        assert call_main((STAGE, *SMALL, "--checkpoint.every=1")) == 0
        shutil.rmtree(folder / "run" / STAGE)
    assert read_manifest(folder / "run" / "checkpoints" / STAGE / "step-00000001").state.step == 1
    return folder


@pytest.fixture
def place(stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    shutil.copytree(stopped, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    yield tmp_path / "place"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("option", "key", "was", "now"),
    [
        ("--finetune.train.lr=0.25", "finetune.train.lr", "0.002", "0.25"),
        ("--finetune.train.max-steps=3", "finetune.train.max_steps", "2", "3"),
        ("--finetune.policy=shared", "finetune.policy", "'independent'", "'shared'"),
    ],
)
def test_command(lgp: Lgp, place: Path, option: str, key: str, was: str, now: str) -> None:
    """Refused with nothing changed, a misspelt key refused before anything starts, then allowed by name."""
    checkpoints = sorted((place / "run" / "checkpoints" / STAGE).rglob("*"))
    sentence = lgp(STAGE, *SMALL, option).sentence
    has(sentence, f"{key} was {was}, now {now}", f"--allow-change {key}")
    has(lgp(STAGE, *SMALL, option, "--allow-change", key + "x").sentence, f"'{key}x'", f"the nearest is {key}")
    assert sorted((place / "run" / "checkpoints" / STAGE).rglob("*")) == checkpoints
    result = lgp(STAGE, *SMALL, option, "--allow-change", key)
    assert result.status == 0 and "resumes from step 1" in result.err, result.err


@pytest.mark.slow
def test_command_with_other_threads_and_logging(lgp: Lgp, place: Path) -> None:
    result = lgp(STAGE, *SMALL, "--data.threads=1", "--finetune.train.log-every=1", "--checkpoint.keep=7")
    assert result.status == 0 and "resumes from step 1" in result.err, result.err
