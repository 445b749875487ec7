"""Run by `accelerate launch`: trains the network of examples/two_branches.py with checkpoints, then another such.

Arguments: a folder, and the step of the first training whose batch raises an error.
"""

import os
import sys
from pathlib import Path

from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import two_branches

from lgp_dist.api import Batch, EngineConfig, StepContext, train


def main() -> None:
    folder, broken = Path(sys.argv[1]), int(sys.argv[2])

    def batches(place: StepContext) -> Batch:
        if place.step == broken:
            raise ConnectionError("the disk of this node is gone")
        return two_branches.batches(place)

    for place, source in ((folder, batches), (folder / "second", two_branches.batches)):
        task, engine = two_branches.task(), EngineConfig(precision="fp32", device="cpu")
        train(task, source, 6, place, two_branches.CONFIG, engine, checkpoint_every=2)
        if os.environ["RANK"] == "0":
            save_file(task.module.state_dict(), place / "network.safetensors")


if __name__ == "__main__":
    main()
