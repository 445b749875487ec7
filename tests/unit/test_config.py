"""Configurations: what belongs to the meaning of a run, the recipes' settings, and what a launch file may ask for."""

import dataclasses
import json
from dataclasses import replace
from typing import Any

import pytest

from lgp_dist.config import STAGES, EngineConfig, RunConfig, TrainConfig, flatten, meaning
from lgp_dist.engine.launch import Launch, check_launch, deepspeed_config
from lgp_dist.errors import UserError
from lgp_dist.recipes import RECIPES, pool12, pool18, tiny

FREE = {
    "workers",
    "log_every",
    "device",
    "threads",
    "run_dir",
    "trackers",
    "force",
    "debug",
    "root",
    "weights",
    "costs",
    "recipe",
}
"""Names of fields that may differ between runs of one meaning."""
DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}
FIRST_STAGE = {
    "data.augment.hflip": "ancestry",
    "seed": "ancestry",
    "engine.precision": "ancestry",
    "ancestry.train.lr": "ancestry",
    "model.patch_size": "ancestry",
    "model.depth": "distil",
    "model.rows.1.width": "distil",
    "distil.alpha": "distil",
    "pool.stitch_init": "pool",
    "finetune.train.epochs": "finetune",
    "evaluate.before": "evaluate",
    "budget.max_flops": "descend",
    "export.path": "export",
}
"""Some settings and the first stage whose artifact depends on them."""


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


def test_flatten_without_free_fields() -> None:
    """Exactly the fields that change nothing that is computed are left out, at every depth."""
    config = tiny()
    left_out = flatten(config).keys() - flatten(config, with_free=False).keys()
    assert {key.split(".")[-1] for key in left_out} == FREE
    assert left_out == {key for key in flatten(config) if key.split(".")[-1] in FREE}


@pytest.mark.parametrize("name", RECIPES)
def test_meaning_grows_along_the_stages(name: str) -> None:
    """Each stage's meaning holds that of the stage before it, unchanged, and something more."""
    config = RECIPES[name]()
    found = [meaning(config, stage) for stage in STAGES]
    for before, after in zip(found, found[1:], strict=False):
        assert before.items() < after.items()
    assert found[-1].keys() == flatten(config, with_free=False).keys()
    assert all(one == json.loads(json.dumps(one)) for one in found)


@pytest.mark.parametrize(("key", "first"), FIRST_STAGE.items())
def test_setting_counts_from_its_stage_on(key: str, first: str) -> None:
    """A changed setting changes the meaning of its own stage and of all later ones, and of no earlier one."""
    config = tiny()
    changed = [stage for stage in STAGES if meaning(config, stage) != meaning(change(config, key), stage)]
    assert changed == list(STAGES[STAGES.index(first) :])


def test_free_settings_never_count() -> None:
    """Workers, logging, device, run directory, trackers and the recipe's name leave every artifact valid."""
    config = tiny()
    free = {key for key in flatten(config) if key.split(".")[-1] in FREE}
    assert {"data.workers", "ancestry.train.log_every", "run_dir"} < free
    for key in free:
        other = change(config, key)
        assert other != config
        assert [meaning(other, stage) for stage in STAGES] == [meaning(config, stage) for stage in STAGES]


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


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_say_how_to_run_them(name: str) -> None:
    """A recipe is listed under its name, is a RunConfig, and its text has lines for command, time and accuracy."""
    config, lines = RECIPES[name](), [line.strip() for line in (RECIPES[name].__doc__ or "").splitlines()]
    assert isinstance(config, RunConfig) and config.recipe == name == RECIPES[name].__name__
    for start in ("Command: ", "Time: ", "Accuracy: "):
        assert len([line for line in lines if line.startswith(start) and len(line) > len(start)]) == 1
    assert all(row.width % row.heads == 0 for row in config.model.rows)


def launch(world: int = 1, **environment: str) -> Launch:
    """What a launcher's environment says; field names without accelerate's prefix for short."""
    names = {name if name.isupper() else f"ACCELERATE_{name.upper()}": value for name, value in environment.items()}
    return Launch.from_environment({"WORLD_SIZE": str(world), **names})


def test_launch_without_a_launcher() -> None:
    """An empty environment is one process on the CPU or the one GPU, without DeepSpeed."""
    found = Launch.from_environment({})
    assert (found.world, found.local_world, found.deepspeed, found.precision) == (1, 1, False, "no")
    assert (found.gpu_ids, found.unsupported) == (None, ())
    assert check_launch(found, EngineConfig(), 0) == "cpu"
    assert check_launch(found, EngineConfig(), 1) == "cuda"


def test_launch_reads_the_environment() -> None:
    """World, local world, DeepSpeed and its stage, precision and visible GPUs."""
    found = launch(
        8, **DEEPSPEED, LOCAL_WORLD_SIZE="4", ACCELERATE_MIXED_PRECISION="bf16", CUDA_VISIBLE_DEVICES="0,1,2,3"
    )
    assert found == Launch(8, 4, True, 1, "bf16", "0,1,2,3", ())
    assert launch(8).local_world == 8
    assert launch(8, deepspeed_zero_stage="3").zero_stage == 3


NEUTRAL = {
    "gradient_accumulation_steps": "1",
    "gradient_clipping": "none",
    "deepspeed_offload_optimizer_device": "none",
    "deepspeed_offload_param_device": "none",
    "deepspeed_config_file": "none",
    "use_fsdp": "false",
}


@pytest.mark.parametrize(
    ("world", "gpus", "environment", "engine"),
    [
        (2, 0, {**DEEPSPEED, "CUDA_VISIBLE_DEVICES": ""}, EngineConfig(device="cpu")),
        (2, 0, {**DEEPSPEED, "deepspeed_zero_stage": "0"}, EngineConfig()),
        (2, 2, {**DEEPSPEED, "CUDA_VISIBLE_DEVICES": "0,1"}, EngineConfig(device="cuda")),
        (16, 8, {**DEEPSPEED, "LOCAL_WORLD_SIZE": "8"}, EngineConfig()),
        (1, 0, {"ACCELERATE_MIXED_PRECISION": "bf16"}, EngineConfig(precision="bf16")),
        (1, 0, {"ACCELERATE_MIXED_PRECISION": "no"}, EngineConfig(precision="bf16")),
        (1, 0, {"CUDA_VISIBLE_DEVICES": "-1"}, EngineConfig()),
        (1, 0, NEUTRAL, EngineConfig()),
        (1, 0, {"gradient_accumulation_steps": "auto", "gradient_clipping": "auto"}, EngineConfig()),
    ],
)
def test_launch_that_fits(world: int, gpus: int, environment: dict[str, str], engine: EngineConfig) -> None:
    """Requests that recipe and machine meet: the device is the GPU where there is one."""
    assert check_launch(launch(world, **environment), engine, gpus) == ("cuda" if gpus else "cpu")


REFUSALS: dict[str, tuple[int, int, dict[str, str], EngineConfig, tuple[str, ...]]] = {
    "stage 2": (2, 0, {**DEEPSPEED, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, EngineConfig(), ("zero_stage 2", "to 1")),
    "stage 3": (2, 0, {**DEEPSPEED, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, EngineConfig(), ("zero_stage 3", "to 1")),
    "no deepspeed": (4, 4, {}, EngineConfig(), ("4 processes", "without DeepSpeed", "launch_configs/")),
    "fp16": (
        1,
        1,
        {"mixed_precision": "fp16"},
        EngineConfig(precision="bf16"),
        ("mixed_precision fp16", "engine.precision bf16"),
    ),
    "fp8": (1, 1, {"mixed_precision": "fp8"}, EngineConfig(precision="fp32"), ("mixed_precision fp8", "fp32")),
    "precision": (
        1,
        0,
        {"mixed_precision": "bf16"},
        EngineConfig(precision="fp32"),
        ("mixed_precision bf16", "engine.precision fp32", "--engine.precision"),
    ),
    "gpu ids": (1, 0, {"CUDA_VISIBLE_DEVICES": "0,1"}, EngineConfig(), ("GPUs 0,1", "none that torch can use")),
    "gpu device": (1, 0, {}, EngineConfig(device="cuda"), ("engine.device cuda", "--engine.device cpu")),
    "cpu device": (1, 1, {}, EngineConfig(device="cpu"), ("engine.device cpu", "a GPU is visible")),
    "too many": (4, 2, DEEPSPEED, EngineConfig(), ("4 processes", "2 GPU(s)", "one process per GPU")),
    "too many here": (
        16,
        4,
        {**DEEPSPEED, "LOCAL_WORLD_SIZE": "8"},
        EngineConfig(),
        ("8 processes", "4 GPU(s)", "launch_configs/cpu_2.yaml"),
    ),
    "config file": (1, 0, {"deepspeed_config_file": "z.json"}, EngineConfig(), ("deepspeed_config_file=z.json",)),
    "offload": (
        1,
        0,
        {"deepspeed_offload_optimizer_device": "cpu", "deepspeed_offload_param_device": "nvme"},
        EngineConfig(),
        ("offload_optimizer_device=cpu", "offload_param_device=nvme"),
    ),
    "accumulation": (
        1,
        0,
        {"gradient_accumulation_steps": "4"},
        EngineConfig(),
        ("gradient_accumulation_steps=4", "the recipe's fields"),
    ),
    "clipping": (1, 0, {"gradient_clipping": "1.0"}, EngineConfig(), ("gradient_clipping=1.0", "recipe owns")),
    "fsdp": (1, 0, {"use_fsdp": "true"}, EngineConfig(), ("use_fsdp=true",)),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_launch_that_does_not_fit_is_a_sentence(name: str) -> None:
    """Each refusal names the setting and its value, and says what to do, in one sentence."""
    world, gpus, environment, engine, words = REFUSALS[name]
    with pytest.raises(UserError) as caught:
        check_launch(launch(world, **environment), engine, gpus)
    text = str(caught.value)
    assert all(word in text for word in words), text
    assert text.endswith(".") and "\n" not in text and ": " in text


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("per_rank", "accumulate", "world"), [(32, 2, 2), (1, 1, 1), (8, 4, 64)])
def test_deepspeed_config(stage: int, precision: Any, per_rank: int, accumulate: int, world: int) -> None:
    """DeepSpeed's batch identity holds, clipping is named, communication stays fp32 and in one order."""
    asked = launch(world, **{**DEEPSPEED, "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage)})
    train = TrainConfig(accumulate=accumulate, clip_grad=0.0)
    found = deepspeed_config(asked, EngineConfig(precision=precision), train, per_rank)
    assert found["train_micro_batch_size_per_gpu"] == per_rank
    assert found["gradient_accumulation_steps"] == accumulate
    assert found["train_batch_size"] == per_rank * accumulate * world
    assert found["gradient_clipping"] == 0.0
    assert found["zero_optimization"]["stage"] == stage
    assert found["zero_optimization"]["overlap_comm"] is False
    assert "fp16" not in found and "bf16" not in found
    expected = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    assert found.get("torch_autocast") == (expected if precision == "bf16" else None)
    assert found == json.loads(json.dumps(found))


@pytest.mark.parametrize("clip", [0.0, 1.0, 5.0])
def test_deepspeed_clips_as_the_recipe_says(clip: float) -> None:
    """The recipe's largest norm is always written down, also when it is 0 for none."""
    found = deepspeed_config(launch(2, **DEEPSPEED), EngineConfig(), TrainConfig(clip_grad=clip), 8)
    assert found["gradient_clipping"] == clip
