"""Asks DeepSpeed whether it takes a configuration."""

import json
from collections.abc import Mapping
from typing import Any

from deepspeed.runtime.config import DeepSpeedConfig

from lgp_dist.config.run_config import EngineConfig, TrainConfig
from lgp_dist.engine.deepspeed_config import deepspeed_config
from lgp_dist.errors import UserError


def checked_config(
    stage: int, engine: EngineConfig, train: TrainConfig, per_rank: int, file: Mapping[str, Any]
) -> dict[str, Any]:
    """`deepspeed_config` of one rank. UserError where DeepSpeed refuses it; for before the ranks join."""
    config = deepspeed_config(stage, 1, engine, train, per_rank, file)
    try:
        DeepSpeedConfig(config)
    except (ValueError, AssertionError, KeyError, TypeError) as error:
        lines = [line.strip() for line in str(error).splitlines()]
        reason = "; ".join(line for line in lines if line and not line.startswith("For further information"))
        named = f" with {json.dumps(file)} from its DeepSpeed file" if file else ""
        raise UserError(
            f"DeepSpeed refuses the configuration of this launch{named} ({reason}): correct it there."
        ) from error
    return config
