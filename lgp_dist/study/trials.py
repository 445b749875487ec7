"""Trials of a study: a variant on one seed is an ordinary run, which links the stages that an earlier one shares."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from lgp_dist.config.flat import STAGES, stage_settings
from lgp_dist.config.run_config import RunConfig
from lgp_dist.errors import UserError
from lgp_dist.run.artifacts import RunDirectory, is_complete
from lgp_dist.run.checks import check_config
from lgp_dist.study.questions import Question, Variant

WATCH_EVERY = 100
"""Optimizer steps between two measurements of all paths, if the recipe has none."""


@dataclass(frozen=True)
class Trial:
    """One run of a study."""

    variant: Variant
    seed: int
    config: RunConfig
    sources: dict[str, str] = field(default_factory=dict)
    """Fingerprints of its shards and files by setting: `stages.start.sources`."""

    @property
    def name(self) -> str:
        """Variant and seed."""
        return f"{self.variant.name}, seed {self.seed}"

    @cached_property
    def run(self) -> RunDirectory:
        """Its run directory."""
        settings = stage_settings(self.config) | self.sources
        return RunDirectory(Path(self.config.run_dir), settings, self.config.recipe)

    @property
    def folder(self) -> Path:
        """The run directory's path."""
        return self.run.root

    def has(self, stage: str) -> bool:
        """Whether the stage's artifact exists; the run itself checks it."""
        return is_complete(self.folder, stage)


def trials_of(question: Question, base: RunConfig, seeds: Sequence[int], out: Path) -> list[Trial]:
    """All trials, one variant after the other. UserError if a seed is repeated or missing, or a variant cannot be."""
    if not seeds or len(set(seeds)) != len(seeds):
        raise UserError(f"--seeds is {' '.join(map(str, seeds))}, but must name one seed or more, each once.")
    if question.keeps_rows and not base.evaluate.before:
        raise UserError(
            f"evaluate.before is off, but study {question.name} compares the rows with their state before "
            "fine-tuning: leave it on."
        )
    found = []
    for variant in question.variants:
        for seed in seeds:
            config = variant.change(replace(base, seed=seed))
            watch = config.finetune.watch_every or WATCH_EVERY
            config = replace(
                config,
                force=False,
                run_dir=str(out / variant.name / f"seed{seed}"),
                finetune=replace(config.finetune, watch_every=watch),
                engine=replace(config.engine, threads=config.engine.threads or 1),
            )
            check_config(config)
            found.append(Trial(variant, seed, config))
    return found


def shared_stages(one: Trial, other: Trial) -> tuple[str, ...]:
    """The first stages of two trials, as far as settings and files are identical; none if only one has an ancestry."""
    if one.config.needs_ancestry != other.config.needs_ancestry:
        return ()
    for number, stage in enumerate(STAGES):
        if one.run.depends_on(stage) != other.run.depends_on(stage):
            return STAGES[:number]
    return STAGES


def donor_of(trial: Trial, trials: Sequence[Trial]) -> tuple[Trial | None, tuple[str, ...]]:
    """The earlier trial that shares most stages with this one, and those stages; None if none shares any."""
    best: tuple[Trial | None, tuple[str, ...]] = (None, ())
    for other in trials[: trials.index(trial)]:
        stages = shared_stages(trial, other)
        if len(stages) > len(best[1]):
            best = (other, stages)
    return best
