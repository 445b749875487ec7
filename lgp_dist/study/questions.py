"""The questions of `lgp study`: each compares variants, and a variant is a change of a run's configuration."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import reduce

from lgp_dist.config.run_config import RunConfig, StitchInit
from lgp_dist.errors import UserError, nearest
from lgp_dist.recipes import RECIPES
from lgp_dist.study.settings import changed_values, with_values

Change = Callable[[RunConfig], RunConfig]


@dataclass(frozen=True)
class Variant:
    """One of the settings that a question compares."""

    name: str
    """Its folder's name."""
    what: str
    """In a few words, for study.json."""
    change: Change
    """The study's configuration to the variant's."""


@dataclass(frozen=True)
class Question:
    """Variants to compare."""

    name: str
    asks: str
    """One sentence."""
    variants: tuple[Variant, ...]
    reference: str
    """The variant that the others are compared with on the same seeds: the published choice if there is one."""
    ranks: int = 1
    """Ranks of a run."""
    keeps_rows: bool = False
    """Whether variants are judged by how fine-tuning changes the rows alone: `results.row_checks`."""

    def __post_init__(self) -> None:
        names = [variant.name for variant in self.variants]
        if self.reference not in names or len(set(names)) != len(names):
            raise ValueError(f"question {self.name} needs variants of different names, one of them {self.reference!r}")


def finetuned(**values: object) -> Change:
    """Sets fields of stage finetune."""
    return lambda config: replace(config, finetune=replace(config.finetune, **values))


def loop(make: Callable[[RunConfig], dict[str, float]]) -> Change:
    """Sets fields of stage finetune's training loop, which `make` computes from the configuration."""
    return lambda config: finetuned(train=replace(config.finetune.train, **make(config)))(config)


def wide(factor: float) -> Change:
    """Multiplies the learning rate of the widest row."""
    return lambda config: finetuned(row_lr=(*(1.0 for _ in config.model.rows[1:]), factor))(config)


def chain(*changes: Change) -> Change:
    """Applies changes in order."""
    return lambda config: reduce(lambda made, change: change(made), changes, config)


def same(config: RunConfig) -> RunConfig:
    """The configuration as it is."""
    return config


def recipe_variant(name: str) -> Variant:
    """A recipe as a variant; what the study's configuration changes in its own recipe is changed here too.

    A recipe with random rows trains nothing in stage distil, so it fine-tunes for the epochs of both stages.
    """
    summary = (RECIPES[name].__doc__ or "").splitlines()[0].rstrip(".")

    def change(config: RunConfig) -> RunConfig:
        made = with_values(RECIPES[name](), changed_values(config))
        if any(row.source != "random" for row in made.model.rows):
            return made
        both = config.distil.train.epochs + config.finetune.train.epochs
        return loop(lambda made: {"epochs": both})(made)

    return Variant(name, summary, change)


def systems(recipes: Iterable[str], reference: str) -> Question:
    """A question whose variants are whole recipes."""
    asks = "What accuracy does each system reach, at what size and training cost?"
    return Question("systems", asks, tuple(recipe_variant(name) for name in recipes), reference)


def stitches(start: StitchInit) -> Change:
    """Starts stitch layers this way."""
    return lambda config: replace(config, pool=replace(config.pool, stitch_init=start))


def rate(factor: float) -> Change:
    """Sets stage finetune's learning rate to a multiple of stage distil's."""
    return loop(lambda config: {"lr": factor * config.distil.train.lr})


PAPER_SCALE = finetuned(loss_scale="paper")
ONE_PATH = chain(
    finetuned(sandwich=False, row_lr=(), row_weight=1.0, paths_per_batch=1), loop(lambda config: {"accumulate": 1})
)
"""One path per step on every rank, all with equal shares, and one learning rate."""
FOUR_PATHS = chain(ONE_PATH, loop(lambda config: {"accumulate": 4}))
"""Four paths per step, which divide its images: room for both rows and for stitched paths."""
SANDWICH = chain(FOUR_PATHS, finetuned(sandwich=True))

STITCH_INIT = Question(
    "stitch_init",
    "Where should stitch layers start from?",
    tuple(
        Variant(name, what, chain(ONE_PATH, rate(0.5), stitches(name)))
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
        Variant(
            "published",
            "soft cross-entropy averaged over classes, distillation's learning rate",
            chain(ONE_PATH, PAPER_SCALE, rate(1)),
        ),
        Variant(
            "published_x10", "published at ten times one_path's learning rate", chain(ONE_PATH, PAPER_SCALE, rate(5))
        ),
        Variant(
            "own_scale", "soft cross-entropy summed over classes, published learning rate", chain(ONE_PATH, rate(1))
        ),
        Variant(
            "one_path", "soft cross-entropy summed over classes, half the learning rate", chain(ONE_PATH, rate(0.5))
        ),
        Variant("lower_lr", "one_path at a tenth of its learning rate", chain(ONE_PATH, rate(0.05))),
        Variant(
            "row_lr", "one_path, the wide row at a tenth of the learning rate", chain(ONE_PATH, rate(0.5), wide(0.1))
        ),
        Variant("no_distil", "one_path, labels only", chain(ONE_PATH, rate(0.5), finetuned(distil_weight=0.0))),
        Variant(
            "row_weight",
            "one_path, rows drawn three times as often",
            chain(ONE_PATH, rate(0.5), finetuned(row_weight=3.0)),
        ),
        Variant("four_paths", "four paths per step, which divide its images", chain(FOUR_PATHS, rate(0.5))),
        Variant("sandwich", "four paths per step, both rows among them", chain(SANDWICH, rate(0.5))),
        Variant(
            "combined",
            "sandwich, row_lr and row_weight",
            chain(SANDWICH, rate(0.5), wide(0.1), finetuned(row_weight=3.0)),
        ),
        Variant(
            "recipe",
            "the recipe; tiny: sandwich at four times the learning rate, the wide row at a tenth of that",
            same,
        ),
    ),
    "published",
    keeps_rows=True,
)

POLICY = Question(
    "policy",
    "How should ranks draw their paths?",
    tuple(
        Variant(name, what, chain(ONE_PATH, rate(0.5), finetuned(policy=name)))
        for name, what in (
            ("independent", "each rank draws on its own (published)"),
            ("shared", "all ranks the same path"),
            ("spread", "as many different paths as a step has slots"),
            ("balanced", "spread, with equal work on all ranks"),
        )
    ),
    "independent",
    ranks=4,
)

INSTANCES = Question(
    "instances",
    "What do more blocks per row give?",
    tuple(
        Variant(
            f"depth_{depth}",
            f"rows of {depth} blocks",
            lambda config, depth=depth: replace(config, model=replace(config.model, depth=depth)),
        )
        for depth in (6, 9)
    ),
    "depth_6",
)


def trained_ancestry(**values: object) -> Change:
    """An ancestry of the recipe's width, trained in the run from its seed, for as many epochs as the rows."""

    def change(config: RunConfig) -> RunConfig:
        train = replace(config.ancestry.train, epochs=config.distil.train.epochs)
        own = replace(config.ancestry, model="vit", source="train", train=train, **values)
        return replace(config, ancestry=own)

    return change


ANCESTRY = Question(
    "ancestry",
    "How much does the ancestry matter?",
    (
        Variant("recipe", "the recipe's", same),
        Variant("short", "the same shape, trained in the run for as many epochs as the rows", trained_ancestry()),
        Variant("shallow", "6 blocks, trained in the run for as many epochs as the rows", trained_ancestry(depth=6)),
    ),
    "recipe",
)

SYSTEMS = systems(("snnet_tiny", "tiny", "sws_tiny", "vanilla_tiny", "scratch_tiny"), "snnet_tiny")

QUESTIONS = {question.name: question for question in (STITCH_INIT, ROWS, POLICY, INSTANCES, ANCESTRY, SYSTEMS)}


def with_variants(question: Question, names: Sequence[str]) -> Question:
    """The question with its reference and these variants only, all if none is named; UserError for an unknown name."""
    known = [variant.name for variant in question.variants]
    for name in names:
        if name not in known:
            advice = nearest(name, known, f"choose from {', '.join(known)}")
            raise UserError(f"--variants names {name!r}, which study {question.name} does not have: {advice}.")
    kept = [each for each in question.variants if not names or each.name in (question.reference, *names)]
    return replace(question, variants=tuple(kept))
