"""Configurations: what stages depend on, and the recipes' settings."""

import dataclasses
import json
from dataclasses import replace
from typing import Any

import pytest

from lgp_dist.config.flat import STAGES, changed_keys, depends_on, flatten, stage_settings, unflatten
from lgp_dist.config.run_config import RunConfig
from lgp_dist.recipes import (
    RECIPES,
    pool12,
    pool18,
    snnet_deit,
    snnet_same_rows,
    snnet_tiny,
    sws_base,
    sws_small,
    tiny,
    tiny_paper,
)
from lgp_dist.stages.start import differences

RUNTIME_ONLY = {
    "cache",
    "check",
    "cache_bytes",
    "timeout_s",
    "retries",
    "max_bad",
    "log_every",
    "device",
    "threads",
    "fp16_scale",
    "activation_checkpointing",
    "compile",
    "ops",
    "offload_optimizer",
    "reduction",
    "audit",
    "audit_weights_every",
    "skip_steps",
    "spike",
    "rollback",
    "watch_every",
    "watch_images",
    "run_dir",
    "start_weights",
    "trackers",
    "tracker_args",
    "force",
    "every",
    "keep",
    "on_error",
    "resume",
    "allow_change",
    "debug",
    "root",
    "weights",
    "costs",
    "recipe",
}
"""Names of fields that no artifact depends on."""
FIRST_STAGE = {
    "data.augment.hflip": "ancestry",
    "seed": "ancestry",
    "engine.precision": "ancestry",
    "ancestry.train.lr": "ancestry",
    "model.patch_size": "ancestry",
    "model.depth": "distil",
    "model.rows.1.width": "distil",
    "model.stages": "distil",
    "model.depths": "pool",
    "model.final_norm": "pool",
    "distil.alpha": "distil",
    "pool.stitch_init": "pool",
    "finetune.train.epochs": "finetune",
    "evaluate.before": "evaluate",
    "budget.max_flops": "descend",
    "export.path": "export",
}
"""Some settings and the first stage whose artifact depends on them."""


def runtime_only_keys(config: Any) -> set[str]:
    """Keys of these fields; the device for which a budget limits latency is part of what is asked."""
    named = {key for key in flatten(config) if key.split(".")[-1] in RUNTIME_ONLY}
    return (named | {key for key in flatten(config) if key.startswith("specialise.")}) - {"budget.device"}


def change(config: Any, key: str) -> Any:
    """The configuration with another value under a dotted key."""
    head, _, rest = key.partition(".")
    if isinstance(config, tuple):
        return tuple(change(part, rest) if index == int(head) else part for index, part in enumerate(config))
    value = getattr(config, head)
    if rest:
        return replace(config, **{head: change(value, rest)})
    if isinstance(value, bool):
        return replace(config, **{head: not value})
    if isinstance(value, tuple):
        return replace(config, **{head: (*value, "more")})
    return replace(config, **{head: value + ("x" if isinstance(value, str) else 1)})


@pytest.mark.parametrize("name", RECIPES)
def test_flatten_names_every_field_once(name: str) -> None:
    """Dotted keys lead to the value that attributes lead to; as many keys as there are plain fields."""
    config = RECIPES[name]()
    flat = flatten(config)
    for key, value in flat.items():
        found: Any = config
        for part in key.split("."):
            found = found[int(part)] if isinstance(found, tuple) else getattr(found, part)
        assert (list(found) if isinstance(found, tuple) else found) == value
        assert not dataclasses.is_dataclass(value)

    def leaves(node: Any) -> int:
        if dataclasses.is_dataclass(node):
            return sum(leaves(getattr(node, item.name)) for item in dataclasses.fields(node))
        if isinstance(node, tuple) and node and dataclasses.is_dataclass(node[0]):
            return sum(map(leaves, node))
        return 1

    assert len(flat) == leaves(config)


@pytest.mark.parametrize("name", RECIPES)
def test_unflatten_gives_back_what_was_flattened(name: str) -> None:
    """Through JSON, with every field changed that can be; keys that are missing keep their defaults."""
    config = RECIPES[name]()
    for key in ("seed", "data.mean", "model.rows.1.width", "finetune.only", "budget.max_params", "engine.audit"):
        config = change(config, key)
    assert unflatten(json.loads(json.dumps(flatten(config)))) == config
    assert unflatten({"seed": 3}) == replace(RunConfig(), seed=3)


def test_flatten_without_runtime_only_fields() -> None:
    """Exactly the fields that change nothing that is computed are left out, at every depth."""
    config = tiny()
    left_out = flatten(config).keys() - flatten(config, with_runtime_only=False).keys()
    assert {key.split(".")[-1] for key in left_out if not key.startswith("specialise.")} == RUNTIME_ONLY
    assert left_out == runtime_only_keys(config)


def test_a_record_from_before_a_setting_existed_equals_its_default() -> None:
    """Keys that a record lacks count with their default, in rows too; other values and other rows differ."""
    now = depends_on(stage_settings(snnet_tiny()), "finetune")
    added = ("finetune.feature_weight", "model.stitch_sharing", "model.rows.1.start")
    record = {key: value for key, value in now.items() if key not in added}
    assert len(record) == len(now) - 3
    assert changed_keys(record, now) == changed_keys(now, record) == []
    assert changed_keys(record, now | {"finetune.feature_weight": 1.0}) == ["finetune.feature_weight"]
    assert changed_keys(record | {"model.rows.2.width": 7}, now) == ["model.rows.2.width"]
    assert changed_keys(record, now | {"finetune.weights": "0f"}) == ["finetune.weights"]


@pytest.mark.parametrize("name", RECIPES)
def test_dependence_grows_along_the_stages(name: str) -> None:
    """Each stage depends on the settings of the stage before it, unchanged, and on more."""
    config = RECIPES[name]()
    found = [depends_on(stage_settings(config), stage) for stage in STAGES]
    for before, after in zip(found, found[1:], strict=False):
        assert before.items() < after.items()
    assert found[-1].keys() == flatten(config, with_runtime_only=False).keys()
    assert all(one == json.loads(json.dumps(one)) for one in found)


@pytest.mark.parametrize(("key", "first"), FIRST_STAGE.items())
def test_setting_counts_from_its_stage_on(key: str, first: str) -> None:
    """Its own stage and all later ones depend on a setting, and no earlier one does."""
    config = tiny()
    changed = [
        stage
        for stage in STAGES
        if depends_on(stage_settings(config), stage) != depends_on(stage_settings(change(config, key)), stage)
    ]
    assert changed == list(STAGES[STAGES.index(first) :])


def test_runtime_only_settings_never_count() -> None:
    """Workers, logging, device, run directory, trackers and the recipe's name leave every artifact valid."""
    config = tiny()
    names = runtime_only_keys(config)
    assert {"data.threads", "ancestry.train.log_every", "run_dir"} < names
    for key in names:
        other = change(config, key)
        assert other != config
        assert [depends_on(stage_settings(other), stage) for stage in STAGES] == [
            depends_on(stage_settings(config), stage) for stage in STAGES
        ]


@pytest.mark.parametrize(("recipe", "depth"), [(pool12, 6), (pool18, 9)])
def test_recipes_hold_the_papers_settings(recipe: Any, depth: int) -> None:
    """Rows of 6 or 9 blocks and widths 192 and 768, head dim 64, 100 and 50 epochs, batch 128, rate 5e-4, alpha 0.1."""
    config = recipe()
    assert config.recipe == recipe.__name__
    assert config.model.depth == depth and config.model.patch_size == 16
    assert [(row.width, row.heads, row.levels) for row in config.model.rows] == [(192, 3, "dense"), (768, 12, "last")]
    assert [row.drop_path for row in config.model.rows] == [0.0, 0.1]
    assert (config.distil.train.epochs, config.finetune.train.epochs) == (100, 50)
    for train in (config.distil.train, config.finetune.train):
        assert (train.batch_size, train.lr, train.max_steps) == (128, 5e-4, 0)
    assert (config.distil.alpha, config.distil.tau, config.distil.loss_scale) == (0.1, 1.0, "sample")
    assert config.pool.stitch_init == "transformation" and config.pool.samples >= 2000
    assert config.finetune.policy == "independent"
    assert (config.ancestry.model, config.ancestry.source) == ("deit_base_patch16_224", "hub")
    assert (config.ancestry.width, config.ancestry.depth, config.ancestry.heads) == (768, 12, 12)
    assert (config.data.image_size, config.data.channels, config.data.num_classes) == (224, 3, 1000)


def test_pool18_differs_from_pool12_in_name_and_depth_only() -> None:
    """The paper's second pool has the first one's settings."""
    one, two = flatten(pool12()), flatten(pool18())
    assert {key for key in one.keys() | two.keys() if one.get(key) != two.get(key)} == {"recipe", "model.depth"}


def test_snnet_deit_has_the_published_settings() -> None:
    """Anchors of equal depth from the hub, batch 1,024 at 1e-4 for 50 epochs, half hard distillation from a RegNet."""
    config = snnet_deit()
    found = [(row.width, row.heads, row.source, row.model) for row in config.model.rows]
    names = [f"deit_{size}_patch16_224" for size in ("tiny", "small", "base")]
    assert found == list(zip((192, 384, 768), (3, 6, 12), ("hub",) * 3, names, strict=True))
    assert (config.model.depth, config.pool.stitch_init, config.model.final_norm) == (12, "least_squares", True)
    finetune, train = config.finetune, config.finetune.train
    assert (finetune.distil, finetune.distil_weight, finetune.label_weight) == ("hard", 0.5, 0.5)
    assert (train.epochs, train.batch_size, train.lr, train.min_lr, train.warmup_epochs) == (50, 1024, 1e-4, 1e-6, 5)
    assert (train.weight_decay, train.mixup, train.cutmix, train.label_smoothing) == (0.05, 0.8, 1.0, 0.1)
    assert config.ancestry.model == "regnety_160.deit_in1k" and not config.taps_ancestry


@pytest.mark.parametrize(("recipe", "base"), [(snnet_tiny, tiny_paper), (snnet_same_rows, pool12)])
def test_snnet_differs_in_its_rows_and_their_stitches_only(recipe: Any, base: Any) -> None:
    """What the paper compares: no distillation of rows, least squares, and on ImageNet 150 epochs for each row. On the
    sample SN-Net's own scale of the soft cross-entropy too, and a lower rate."""
    one, two = flatten(recipe()), flatten(base())
    changed = {key for key in one.keys() | two.keys() if one.get(key) != two.get(key)}
    rows = {f"model.rows.{row}.{name}" for row in (0, 1) for name in ("source", "levels")}
    longer = {"distil.train.epochs"} if base is pool12 else set()
    own = {"finetune.loss_scale", "finetune.train.lr"} if base is tiny_paper else set()
    assert changed == {"recipe", "pool.stitch_init"} | rows | longer | own


@pytest.mark.parametrize(
    ("recipe", "width", "epochs", "rate"), [(sws_small, 384, 150, 5e-5), (sws_base, 768, 100, 1e-5)]
)
def test_sws_recipes_hold_the_published_settings(recipe: Any, width: int, epochs: int, rate: float) -> None:
    """16 layers in stages 3-3-4-3-3, heads of 64 in both nets, soft distillation alone, then 10 epochs of labels."""
    config = recipe()
    row, distil, tuning = config.model.rows[0], config.distil, config.finetune.train
    assert (config.model.stages, config.model.depth, config.model.depths[-1]) == ((3, 3, 4, 3, 3), 16, 12)
    assert (row.width, row.width // row.heads, row.levels, row.drop_path) == (width, 64, "none", 0.1)
    assert (distil.alpha, distil.tau, distil.train.epochs, distil.train.warmup_epochs) == (0, 1, epochs, 5)
    assert (distil.train.batch_size, distil.train.lr, distil.train.weight_decay) == (512, 5e-4, 0.05)
    assert (tuning.epochs, tuning.warmup_epochs, tuning.lr, tuning.min_lr) == (10, 0, rate, 1e-6)
    assert config.finetune.distil_weight == 0 and tuning.clip_grad == 0


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_say_how_to_run_them(name: str) -> None:
    """A recipe is listed under its name, is a RunConfig, and its text has a line for its command."""
    config, lines = RECIPES[name](), [line.strip() for line in (RECIPES[name].__doc__ or "").splitlines()]
    assert isinstance(config, RunConfig) and config.recipe == name == RECIPES[name].__name__
    assert len([line for line in lines if line.startswith("Command: ") and name in line or "scripts/" in line]) == 1
    assert all(row.width % row.heads == 0 for row in config.model.rows)


def test_differences_from_the_recipe() -> None:
    """Every setting that an option changed, in the order of the recipe, with both values; but the run directory."""
    config, train = tiny(), tiny().finetune.train
    assert differences(config) == differences(replace(config, run_dir="elsewhere")) == []
    assert differences(replace(config, recipe="downstream", seed=3)) == []
    changed = replace(
        config, seed=3, trackers=(), finetune=replace(config.finetune, row_lr=(1.0,), train=replace(train, lr=0.001))
    )
    assert differences(changed) == [
        "seed 3 (recipe 0)",
        "finetune.row_lr 1.0 (recipe 1.0 0.1)",
        "finetune.train.lr 0.001 (recipe 0.002)",
        "trackers none (recipe tensorboard)",
    ]
