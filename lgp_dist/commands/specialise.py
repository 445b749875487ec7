"""`lgp specialise RUN`: trains one path of a finished run alone, from the pool's weights, as a run of its own.

The run lies in RUN/specialised/KEY. It links the earlier stages' artifacts, trains with the same ancestry, head and
data, and has an accuracy before and after; its path is exported like any other.
"""

from dataclasses import replace
from pathlib import Path

from lgp_dist.commands.finished import FinishedRun
from lgp_dist.config.budget import Budget
from lgp_dist.config.run_config import RunConfig
from lgp_dist.export.choice import choose
from lgp_dist.paths.space import space_of
from lgp_dist.run.linked_stages import link_stages
from lgp_dist.run.path_rows import read_rows

SHARE = 4
"""Stage finetune's epochs and learning rate over those of a path alone, if none are given."""


def chosen_key(run: FinishedRun, key: str, budget: Budget) -> str:
    """The path to train: the one named, or else the best within the budget; UserError if the pool has no such path."""
    if key:
        return space_of(run.config).by_key(key).key
    return str(choose(read_rows(run.evaluated.folder / "paths.json"), budget, "--")["key"])


def specialised(run: FinishedRun, key: str, epochs: float, lr: float) -> RunConfig:
    """The configuration that trains one path of a run alone.

    epochs, lr: of this training; 0 takes a quarter of stage finetune's. The warm-up shrinks with the epochs.
    """
    finetune = run.config.finetune
    whole = finetune.train
    epochs = epochs or whole.epochs / SHARE
    train = replace(
        whole,
        epochs=epochs,
        warmup_epochs=whole.warmup_epochs * epochs / whole.epochs,
        lr=lr or whole.lr / SHARE,
        accumulate=1,
    )
    alone = replace(
        finetune,
        only=(key,),
        start_weights=str(run.root / "finetune" / "pool.safetensors"),
        policy="shared",
        sandwich=False,
        row_lr=(),
        row_weight=1.0,
        lead_weight=0.0,
        feature_weight=finetune.feature_weight if finetune.distil_weight else 0.0,  # a lead path teaches no more
        paths_per_batch=1,
        train=train,
    )
    return replace(
        run.config,
        run_dir=str(run.root / "specialised" / key),
        finetune=alone,
        evaluate=replace(run.config.evaluate, before=True),
        budget=Budget(),
        export=replace(run.config.export, path=key),
    )


def link_earlier_stages(run: FinishedRun, config: RunConfig) -> None:
    """Links what the pool was made of into the new run. For one rank, before it joins the others."""
    link_stages(run.root, Path(config.directory), ("ancestry", "distil", "pool"))


def gain_text(directory: Path, key: str) -> str:
    """The path's accuracy before and after, and how to export it."""
    files = ("before.json", "paths.json")
    before, after = (read_rows(directory / "evaluate" / name)[0]["top1"] for name in files)
    return (
        f"{key}: top-1 {before:.2f} % in the pool, {after:.2f} % trained alone\n"
        f"To write it: lgp export {directory} --path {key} --out FOLDER"
    )
