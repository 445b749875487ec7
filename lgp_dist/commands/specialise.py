"""Trains one path of a finished run alone, from the pool's weights, as a run of its own: `lgp specialise RUN`, and
`lgp run RECIPE --specialise.top N`.

The run lies in RUN/specialised/KEY. It links the earlier stages' artifacts, trains with the same ancestry, head and
data, and has an accuracy before and after; its path is exported like any other.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lgp_dist.commands.finished import FinishedRun
from lgp_dist.config.budget import Amount, Budget
from lgp_dist.config.flat import STAGES
from lgp_dist.config.run_config import RunConfig, SpecialiseConfig
from lgp_dist.export.choice import choose
from lgp_dist.files import LOCK, locked
from lgp_dist.paths.space import space_of
from lgp_dist.pipeline import run_joined
from lgp_dist.run.artifacts import specialised_folder
from lgp_dist.run.linked_stages import link_stages
from lgp_dist.run.log import show
from lgp_dist.run.path_rows import PathRow, read_rows
from lgp_dist.stages.start import agreed, joined

SHARE = 4
"""Stage finetune's epochs and learning rate over those of a path alone, if none are given."""


def chosen_key(run: FinishedRun, key: str, budget: Budget) -> str:
    """The path to train: the one named, or else the best within the budget; UserError if the pool has no such path."""
    if key:
        return space_of(run.config).by_key(key).key
    return str(choose(read_rows(run.evaluated.folder / "paths.json"), budget, "--")["key"])


def best_keys(rows: Sequence[PathRow], count: int) -> list[str]:
    """The best paths within `count` budgets of parameters, at equal ratios up to the largest path, each path once."""
    sizes = [row["params"] for row in rows]
    limits = [max(sizes) * (min(sizes) / max(sizes)) ** (1 - number / count) for number in range(1, count + 1)]
    return [*dict.fromkeys(str(choose(rows, Budget(max_params=Amount(limit)))["key"]) for limit in limits)]


def specialised(config: RunConfig, key: str, epochs: float, lr: float) -> RunConfig:
    """The configuration that trains one path of a finished run alone. config: the run's.

    epochs, lr: of this training; 0 takes a quarter of stage finetune's. The warm-up shrinks with the epochs.
    """
    finetune, root = config.finetune, Path(config.directory)
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
        start_weights=str(root / "finetune" / "pool.safetensors"),
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
        config,
        run_dir=str(specialised_folder(root, key)),
        finetune=alone,
        evaluate=replace(config.evaluate, before=True),
        budget=Budget(),
        export=replace(config.export, path=key),
        specialise=SpecialiseConfig(),
    )


def run_and_specialise(config: RunConfig) -> None:
    """Runs all stages; then trains each path that `specialise` chooses alone."""
    with joined(config, STAGES) as context:
        run_joined(context, STAGES)
        chosen, root, workers = config.specialise, Path(config.directory), context.workers
        best = workers.once_per_node(lambda: best_keys(read_rows(root / "evaluate" / "paths.json"), chosen.top))
        for key in dict.fromkeys([*chosen.paths, *best]):
            alone = specialised(config, key, chosen.epochs, chosen.lr)
            with contextlib.ExitStack() as stack:
                if workers.is_main:
                    stack.enter_context(locked(Path(alone.directory) / LOCK))
                    link_earlier_stages(root, alone)
                workers.barrier()
                run_joined(agreed(alone, STAGES, workers, None), STAGES)
            if workers.is_main:
                show(gain_text(Path(alone.directory), key) + "\n")


def link_earlier_stages(root: Path, config: RunConfig) -> None:
    """Links what the pool was made of into the new run. For one rank, before the others open it."""
    link_stages(root, Path(config.directory), ("ancestry", "distil", "pool"))


def gain_text(directory: Path, key: str) -> str:
    """The path's accuracy before and after, and how to export it."""
    files = ("before.json", "paths.json")
    before, after = (read_rows(directory / "evaluate" / name)[0]["top1"] for name in files)
    return (
        f"{key}: top-1 {before:.2f} % in the pool, {after:.2f} % trained alone\n"
        f"To write it: lgp export {directory} --path {key} --out FOLDER"
    )
