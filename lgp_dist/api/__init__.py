"""The Python API: what scripts and notebooks may rely on. docs/api.md has an example of each name.

A finished run is opened with `open_run`; `train` trains a network of one's own with this project's engine.
"""

from lgp_dist.api.own_task import OwnTask, train
from lgp_dist.api.runs import Run, open_run
from lgp_dist.config.run_config import EngineConfig, TrainConfig
from lgp_dist.errors import UserError
from lgp_dist.protocols import Batch, StepContext

__all__ = ["Batch", "EngineConfig", "OwnTask", "Run", "StepContext", "TrainConfig", "UserError", "open_run", "train"]
