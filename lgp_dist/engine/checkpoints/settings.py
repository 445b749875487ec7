"""Whether a run may go on under other settings than it began with."""

from lgp_dist.config.flat import changed_keys
from lgp_dist.engine.checkpoints.manifest import TrainState
from lgp_dist.errors import UserError

SHOWN = 8
"""Differences that a sentence names."""


def check_settings(was: TrainState, now: TrainState, allow: tuple[str, ...]) -> None:
    """UserError naming every setting that differs and is not allowed to. What stands in no config may differ."""
    refused = [key for key in changed_keys(was.config, now.config) if key not in allow]
    if not refused:
        return
    shown = "; ".join(f"{key} was {was.config.get(key)!r}, now {now.config.get(key)!r}" for key in refused[:SHOWN])
    more = f"; and {len(refused) - SHOWN} more" if len(refused) > SHOWN else ""
    raise UserError(
        f"The checkpoint of step {was.step} of stage {was.stage} was made with other settings ({shown}{more}): set "
        f"them as before, name them with --allow-change {' '.join(refused[:SHOWN])}, or take --resume never."
    )
