"""The questions that `lgp study` answers: each a list of arms, and an arm a change of a run's configuration."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import reduce

from lgp_dist.config.run_config import RunConfig, StitchInit
from lgp_dist.recipes import RECIPES
from lgp_dist.study.settings import changed_values, with_values

Change = Callable[[RunConfig], RunConfig]


@dataclass(frozen=True)
class Arm:
    """One way of doing it."""

    name: str
    """Names a folder."""
    what: str
    """In a few words, for the table."""
    change: Change
    """Makes the arm's configuration of the study's."""


@dataclass(frozen=True)
class Question:
    """Arms that are compared."""

    name: str
    asks: str
    """One sentence."""
    arms: tuple[Arm, ...]
    reference: str
    """The arm that others are compared with, on the same seeds: the published choice where there is one."""
    ranks: int = 1
    """Processes of a run."""
    keeps_rows: bool = False
    """Whether arms are judged by what fine-tuning makes of the rows alone."""

    def __post_init__(self) -> None:
        names = [arm.name for arm in self.arms]
        if self.reference not in names or len(set(names)) != len(names):
            raise ValueError(f"question {self.name} needs arms of different names, one of them {self.reference!r}")


def finetuned(**values: object) -> Change:
    """Other values in stage finetune."""
    return lambda config: replace(config, finetune=replace(config.finetune, **values))


def loop(make: Callable[[RunConfig], dict[str, float]]) -> Change:
    """Other values in the loop of stage finetune, which `make` computes of the configuration."""
    return lambda config: finetuned(train=replace(config.finetune.train, **make(config)))(config)


def wide(factor: float) -> Change:
    """So many times the learning rate of the others for the widest row."""
    return lambda config: finetuned(row_lr=(*(1.0 for _ in config.model.rows[1:]), factor))(config)


def chain(*changes: Change) -> Change:
    """One change after the other."""
    return lambda config: reduce(lambda made, change: change(made), changes, config)


def same(config: RunConfig) -> RunConfig:
    """The configuration as it is."""
    return config


def recipe_arm(name: str) -> Arm:
    """A recipe as an arm, with whatever the study's configuration changes in its own recipe.

    One whose rows are random has nothing to train in stage distil: it fine-tunes for the epochs of both stages.
    """
    summary = (RECIPES[name].__doc__ or "").splitlines()[0].rstrip(".")

    def change(config: RunConfig) -> RunConfig:
        made = with_values(RECIPES[name](), changed_values(config))
        if any(row.source != "random" for row in made.model.rows):
            return made
        both = config.distil.train.epochs + config.finetune.train.epochs
        return loop(lambda made: {"epochs": both})(made)

    return Arm(name, summary, change)


def systems(recipes: Iterable[str], reference: str) -> Question:
    """Whole recipes against each other."""
    asks = "Which system reaches which accuracy at what size and training cost?"
    return Question("systems", asks, tuple(recipe_arm(name) for name in recipes), reference)


def stitches(start: StitchInit) -> Change:
    """Stitch layers that start so."""
    return lambda config: replace(config, pool=replace(config.pool, stitch_init=start))


def rate(factor: float) -> Change:
    """So many times distillation's learning rate in stage finetune."""
    return loop(lambda config: {"lr": factor * config.distil.train.lr})


PAPER_SCALE = finetuned(loss_scale="paper")
ONE_PATH = chain(
    finetuned(sandwich=False, row_lr=(), row_weight=1.0, paths_per_batch=1), loop(lambda config: {"accumulate": 1})
)
"""A path a step on every rank, drawn alike, with one learning rate."""
FOUR_PATHS = chain(ONE_PATH, loop(lambda config: {"accumulate": 4}))
"""Four paths in a step, which share its images: room for both rows and for stitched paths."""
SANDWICH = chain(FOUR_PATHS, finetuned(sandwich=True))

STITCH_INIT = Question(
    "stitch_init",
    "Where should stitch layers start from?",
    tuple(
        Arm(name, what, chain(ONE_PATH, rate(0.5), stitches(name)))
        for name, what in (
            ("transformation_paper", "mean of the W, transposed (published)"),
            ("transformation", "V of the nearest level"),
            ("transformation_pinv", "pseudo-inverse of the nearest W"),
            ("least_squares", "ridge least squares of the rows' features"),
            ("random", "timm's default"),
        )
    ),
    "transformation_paper",
)

ROWS = Question(
    "rows",
    "What lets fine-tuning keep the wide row, raise the narrow one and still train all paths?",
    (
        Arm(
            "published",
            "soft cross-entropy averaged over classes, the rate of distillation",
            chain(ONE_PATH, PAPER_SCALE, rate(1)),
        ),
        Arm("published_x10", "the same at ten times one_path's rate", chain(ONE_PATH, PAPER_SCALE, rate(5))),
        Arm("own_scale", "soft cross-entropy at its own scale, published rate", chain(ONE_PATH, rate(1))),
        Arm("one_path", "soft cross-entropy at its own scale, half the rate", chain(ONE_PATH, rate(0.5))),
        Arm("lower_lr", "one_path at a tenth of its rate", chain(ONE_PATH, rate(0.05))),
        Arm("row_lr", "one_path, the wide row at a tenth", chain(ONE_PATH, rate(0.5), wide(0.1))),
        Arm("no_distil", "one_path, labels alone", chain(ONE_PATH, rate(0.5), finetuned(distil_weight=0.0))),
        Arm(
            "row_weight", "one_path, rows drawn thrice as often", chain(ONE_PATH, rate(0.5), finetuned(row_weight=3.0))
        ),
        Arm("four_paths", "four paths a step, which share its images", chain(FOUR_PATHS, rate(0.5))),
        Arm("sandwich", "four paths a step, both rows among them", chain(SANDWICH, rate(0.5))),
        Arm(
            "combined",
            "sandwich, row_lr and row_weight",
            chain(SANDWICH, rate(0.5), wide(0.1), finetuned(row_weight=3.0)),
        ),
        Arm("recipe", "the recipe; tiny: sandwich at four times the rate, the wide row at a tenth of that", same),
    ),
    "published",
    keeps_rows=True,
)

POLICY = Question(
    "policy",
    "How should ranks draw their paths?",
    tuple(
        Arm(name, what, chain(ONE_PATH, rate(0.5), finetuned(policy=name)))
        for name, what in (
            ("independent", "each rank alone (published)"),
            ("shared", "all ranks the same path"),
            ("spread", "as many different paths as a step has room for"),
            ("balanced", "spread, at equal work"),
        )
    ),
    "independent",
    ranks=4,
)

INSTANCES = Question(
    "instances",
    "What do more instances in the pool give?",
    tuple(
        Arm(
            f"depth_{depth}",
            f"rows of {depth} blocks",
            lambda config, depth=depth: replace(config, model=replace(config.model, depth=depth)),
        )
        for depth in (6, 9)
    ),
    "depth_6",
)


def trained_ancestry(**values: object) -> Change:
    """An ancestry of the recipe's width that is trained in the run, from the run's seed, for as long as its rows."""

    def change(config: RunConfig) -> RunConfig:
        train = replace(config.ancestry.train, epochs=config.distil.train.epochs)
        own = replace(config.ancestry, model="vit", source="train", train=train, **values)
        return replace(config, ancestry=own)

    return change


ANCESTRY = Question(
    "ancestry",
    "What does the pool owe to its ancestry?",
    (
        Arm("recipe", "the recipe's", same),
        Arm("short", "the same shape, trained here for as long as the rows", trained_ancestry()),
        Arm("shallow", "6 blocks, trained here for as long as the rows", trained_ancestry(depth=6)),
    ),
    "recipe",
)

SYSTEMS = systems(("snnet_tiny", "tiny", "sws_tiny", "vanilla_tiny", "scratch_tiny"), "snnet_tiny")

QUESTIONS = {question.name: question for question in (STITCH_INIT, ROWS, POLICY, INSTANCES, ANCESTRY, SYSTEMS)}
