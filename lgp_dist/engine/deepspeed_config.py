"""DeepSpeed's configuration: sets what exactness needs, takes what a file may add, and refuses the rest."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lgp_dist.config.run_config import EngineConfig, TrainConfig
from lgp_dist.errors import UserError, nearest

OWNED = {
    "train_micro_batch_size_per_gpu": "train.batch_size",
    "train_batch_size": "train.batch_size",
    "gradient_accumulation_steps": "train.accumulate",
    "gradient_clipping": "train.clip_grad",
    "optimizer": "train.optimizer and its fields",
    "scheduler": "train.lr, min_lr and warmup_epochs",
    "fp16": "engine.precision",
    "bf16": "engine.precision",
    "amp": "engine.precision",
    "torch_autocast": "engine.precision",
    "data_types": "engine.precision",
    "zero_optimization.offload_optimizer": "engine.offload_optimizer",
}
"""Settings of a DeepSpeed file that the recipe owns -> the recipe's field."""

INEXACT = {
    "activation_checkpointing": "DeepSpeed checkpoints reentrantly, which reduces a gradient twice; choose "
    "--engine.activation-checkpointing on",
    "communication_data_type": "sums of gradients are exact in fp32 alone; leave it out",
    "zero_optimization.round_robin_gradients": "weights are then read back from the wrong places; leave it out",
    "zero_optimization.zero_quantized_weights": "ranks would compute with rounded weights; leave it out",
    "zero_optimization.zero_quantized_nontrainable_weights": "ranks would compute with rounded weights; leave it out",
    "zero_optimization.zero_quantized_gradients": "gradients would be rounded before they are summed; leave it out",
}
"""Settings that cannot be exact with a different path on each rank -> why, and what to choose instead."""

ALLOWED = {
    "zero_optimization.stage",
    "zero_optimization.overlap_comm",
    "zero_optimization.reduce_bucket_size",
    "zero_optimization.allgather_bucket_size",
    "zero_optimization.allgather_partitions",
    "zero_optimization.reduce_scatter",
    "zero_optimization.contiguous_gradients",
    "zero_optimization.sub_group_size",
    "zero_optimization.offload_param",
    "zero_optimization.stage3_prefetch_bucket_size",
    "zero_optimization.stage3_max_live_parameters",
    "zero_optimization.stage3_max_reuse_distance",
    "zero_optimization.stage3_param_persistence_threshold",
    "zero_optimization.enable_sanity_checks",
    "wall_clock_breakdown",
    "steps_per_print",
    "comms_logger",
    "flops_profiler",
    "dump_state",
}
"""Settings that a DeepSpeed file may have: they change speed and memory, but not the result."""

STAGE3 = ("prefetch_bucket_size", "max_live_parameters", "max_reuse_distance", "param_persistence_threshold")
STAGES_OF = {
    **dict.fromkeys(("offload_param", "sub_group_size", "enable_sanity_checks"), (3,)),
    **dict.fromkeys((f"stage3_{name}" for name in STAGE3), (3,)),
    "allgather_bucket_size": (1, 2),
}
"""Settings of zero_optimization that DeepSpeed reads at some stages alone -> these. At stage 0 it reads none."""

PRINTED = {"wall_clock_breakdown", "steps_per_print", "comms_logger", "flops_profiler", "dump_state"}
"""Settings that make DeepSpeed print."""

NEUTRAL: tuple[Any, ...] = (None, "auto", False, {}, "fp32")
"""Values that mean the same as leaving a setting out."""


def _says_nothing(value: Any) -> bool:
    """Whether a setting, or a section that is switched off, means the same as leaving it out."""
    if isinstance(value, dict) and (value.get("enabled") in (False, "auto") or value.get("device") == "none"):
        return True
    return any(value == neutral and type(value) is type(neutral) for neutral in NEUTRAL)  # 0 == False


def read_deepspeed_file(path: str) -> dict[str, Any]:
    """Returns the settings of a DeepSpeed file. Raises UserError if it cannot be read or a setting is not exact."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"{path} sets {name} twice, and only the last counts: remove one of them.")
        return dict(pairs)

    def no_number(text: str) -> None:
        raise UserError(f"{path} holds {text}, which JSON does not have: write a number.")

    try:
        settings = json.loads(Path(path).read_text(), object_pairs_hook=unique, parse_constant=no_number)
    except UserError:  # a ValueError too
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"The DeepSpeed file {path} cannot be read ({error}): correct it, or name another.") from error
    if not isinstance(settings, dict):
        raise UserError(f"The DeepSpeed file {path} holds no object: write settings as {{name: value}}.")
    zero = settings.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise UserError(f"{path} has zero_optimization {zero!r}: write its settings as {{name: value}}.")
    stage = zero.get("stage", "auto")
    if stage != "auto" and (type(stage) is not int or stage not in range(4)):
        raise UserError(f"{path} sets zero_optimization.stage to {json.dumps(stage)}: write 0, 1, 2 or 3.")
    flat = {name: value for name, value in settings.items() if name != "zero_optimization"}
    flat |= {f"zero_optimization.{name}": value for name, value in zero.items()}
    kept: dict[str, Any] = {}
    for name, value in flat.items():
        if _says_nothing(value):
            continue
        if name in OWNED:
            raise UserError(f"{path} sets {name}, but the recipe owns it: leave it out, and set {OWNED[name]} there.")
        if name in INEXACT:
            raise UserError(f"{path} sets {name} to {json.dumps(value)}: {INEXACT[name]}.")
        if name not in ALLOWED:
            known = {*ALLOWED, *OWNED, *INEXACT, "zero_optimization"}
            near = nearest(name, known, "")
            raise UserError(
                f"{path} sets {name}, which is not known to be exact with a different path on each rank: leave it out"
                f"{f', or correct its name ({near})' if near else ''}."
            )
        section, _, key = name.rpartition(".")
        (kept.setdefault(section, {}) if section else kept)[key] = value
    return kept


def check_zero_stage(stage: int, engine: EngineConfig, file: Mapping[str, Any]) -> None:
    """Raises UserError if settings do not fit the ZeRO stage."""
    if stage not in (0, 1, 2, 3):
        raise UserError(f"The launch file sets zero_stage {stage}, but there are 0, 1, 2 and 3: choose one of them.")
    zero = file.get("zero_optimization", {})
    for name in zero.keys() - {"stage"}:
        known = STAGES_OF.get(name, (1, 2, 3))
        if stage not in known:
            raise UserError(
                f"The DeepSpeed file sets zero_optimization.{name}, which has no effect at zero_stage {stage}: leave "
                f"it out, or take stage {' or '.join(map(str, known))}."
            )
    overlap = zero.get("overlap_comm", False)
    if stage == 1 and overlap:
        raise UserError(
            "The DeepSpeed file sets zero_optimization.overlap_comm with zero_stage 1, which then reduces gradients in "
            "the order in which they arrive: leave it out, or take stage 2."
        )
    if engine.offload_optimizer and stage == 0:
        raise UserError(
            "engine.offload_optimizer is on, but ZeRO stage 0 keeps the optimizer with the weights: take stage 1, 2 or "
            "3, or leave it off."
        )
    if engine.reduction == "union" and (stage not in (1, 2) or engine.offload_optimizer or overlap):
        raise UserError(
            "engine.reduction is union, which is exact at ZeRO stages 1 and 2 without offload_optimizer and "
            "overlap_comm: choose --engine.reduction all, or leave those out."
        )


def deepspeed_config(
    stage: int, world: int, engine: EngineConfig, train: TrainConfig, per_rank: int, file: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns DeepSpeed's complete configuration.

    per_rank: images per rank and micro-step. file: what a DeepSpeed file adds. Parameters, gradients and their sums are
    fp32 in every precision, since autocast is applied inside the module. Stage 3 gathers only the unit that runs, and
    uses torch's own linear layer.
    """
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": False, "round_robin_gradients": False}
    if stage == 3:
        zero |= {
            "stage3_param_persistence_threshold": 0,
            "stage3_max_reuse_distance": 0,
            "stage3_prefetch_bucket_size": 0,
            "memory_efficient_linear": False,
        }
    if engine.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": per_rank,
        "gradient_accumulation_steps": train.accumulate,
        "train_batch_size": per_rank * train.accumulate * world,
        "gradient_clipping": train.clip_grad,  # 0 is off; accelerate would turn a missing value into 1.0
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **{name: value for name, value in file.items() if name != "zero_optimization"},
        "zero_optimization": zero | dict(file.get("zero_optimization", {})),
    }
