"""The questions of `lgp study`: each compares variants, and a variant sets values of a run's configuration."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lgp_dist.config.run_config import RunConfig
from lgp_dist.errors import UserError, nearest
from lgp_dist.paths.space import space_of
from lgp_dist.recipes import RECIPES
from lgp_dist.study.equal_cost import with_equal_cost
from lgp_dist.study.settings import changed_values, with_values

Values = Mapping[str, Any]
"""Dotted keys to values, or to functions that compute a value from the study's configuration."""


@dataclass(frozen=True)
class Variant:
    """One of the settings that a question compares."""

    name: str
    """Its folder's name."""
    what: str
    """In a few words, for study.json."""
    values: Values = field(default_factory=dict)
    """What it sets."""
    recipe: str = ""
    """A recipe that takes the place of the study's; what the study changes in its own recipe is changed here too."""
    equal_cost: bool = False
    """Whether stage finetune is as long as makes training cost as many multiply-adds as the study's recipe."""

    def change(self, config: RunConfig) -> RunConfig:
        """The variant's configuration from the study's."""
        values = {key: value(config) if callable(value) else value for key, value in self.values.items()}
        changed = config
        if self.recipe:
            changed = with_values(RECIPES[self.recipe](), changed_values(config), missing="ignore")
        changed = with_values(changed, values)
        return with_equal_cost(changed, config) if self.equal_cost else changed


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


def with_variants(question: Question, names: Sequence[str]) -> Question:
    """The question with its reference and these variants only, all if none is named; UserError for an unknown name."""
    known = [variant.name for variant in question.variants]
    for name in names:
        if name not in known:
            advice = nearest(name, known, f"choose from {', '.join(known)}")
            raise UserError(f"--variants names {name!r}, which study {question.name} does not have: {advice}.")
    kept = [each for each in question.variants if not names or each.name in (question.reference, *names)]
    return replace(question, variants=tuple(kept))


def rate(factor: float) -> Values:
    """Stage finetune's learning rate as a multiple of stage distil's."""
    return {"finetune.train.lr": lambda config: factor * config.distil.train.lr}


def wide(factor: float) -> Values:
    """The learning rate of the widest row as a multiple of the others'."""
    return {"finetune.row_lr": lambda config: [*(1.0 for _ in config.model.rows[1:]), factor]}


def recipe_variant(name: str) -> Variant:
    """A recipe as a variant. If its rows are random, stage distil trains nothing, and its epochs go to fine-tuning."""
    summary = (RECIPES[name].__doc__ or "").splitlines()[0].rstrip(".")
    is_random = all(row.source == "random" for row in RECIPES[name]().model.rows)
    both = {"finetune.train.epochs": lambda config: config.distil.train.epochs + config.finetune.train.epochs}
    return Variant(name, summary, both if is_random else {}, recipe=name)


def systems(recipes: Iterable[str], reference: str) -> Question:
    """A question whose variants are whole recipes."""
    asks = "What accuracy does each system reach, at what size and training cost?"
    return Question("systems", asks, tuple(recipe_variant(name) for name in recipes), reference)


ONE_PATH = {
    "finetune.sandwich": False,
    "finetune.row_lr": [],
    "finetune.row_weight": 1.0,
    "finetune.paths_per_batch": 1,
    "finetune.train.accumulate": 1,
}
"""One path per step on every rank, all with equal shares, and one learning rate."""
FOUR_PATHS = {**ONE_PATH, "finetune.train.accumulate": 4}
"""Four paths per step, which divide its images: room for both rows and for stitched paths."""
SANDWICH = {**FOUR_PATHS, "finetune.sandwich": True}
PAPER_SCALE = {"finetune.loss_scale": "paper"}
OFTEN = {"finetune.row_weight": 3.0}

STITCH_INIT = Question(
    "stitch_init",
    "Where should stitch layers start from?",
    tuple(
        Variant(name, what, {**ONE_PATH, **rate(0.5), "pool.stitch_init": name})
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
            {**ONE_PATH, **PAPER_SCALE, **rate(1)},
        ),
        Variant("published_x10", "at ten times one_path's learning rate", {**ONE_PATH, **PAPER_SCALE, **rate(5)}),
        Variant("own_scale", "soft cross-entropy summed over classes, published rate", {**ONE_PATH, **rate(1)}),
        Variant("one_path", "soft cross-entropy summed over classes, half the rate", {**ONE_PATH, **rate(0.5)}),
        Variant("lower_lr", "one_path at a tenth of its rate", {**ONE_PATH, **rate(0.05)}),
        Variant("row_lr", "one_path, the wide row at a tenth of the rate", {**ONE_PATH, **rate(0.5), **wide(0.1)}),
        Variant("no_distil", "one_path, labels only", {**ONE_PATH, **rate(0.5), "finetune.distil_weight": 0.0}),
        Variant("row_weight", "one_path, rows drawn three times as often", {**ONE_PATH, **rate(0.5), **OFTEN}),
        Variant("four_paths", "four paths per step, which divide its images", {**FOUR_PATHS, **rate(0.5)}),
        Variant("sandwich", "four paths per step, both rows among them", {**SANDWICH, **rate(0.5)}),
        Variant("combined", "sandwich, row_lr and row_weight", {**SANDWICH, **rate(0.5), **wide(0.1), **OFTEN}),
        Variant("recipe", "the recipe; tiny: sandwich at four times the rate, the wide row at a tenth of that"),
    ),
    "published",
    keeps_rows=True,
)

POLICY = Question(
    "policy",
    "How should ranks draw their paths?",
    tuple(
        Variant(name, what, {**ONE_PATH, **rate(0.5), "finetune.policy": name})
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
    tuple(Variant(f"depth_{depth}", f"rows of {depth} blocks", {"model.depth": depth}) for depth in (6, 9)),
    "depth_6",
)

TRAINED_ANCESTRY = {
    "ancestry.model": "vit",
    "ancestry.source": "train",
    "ancestry.train.epochs": lambda config: config.distil.train.epochs,
}
"""An ancestry of the recipe's width, trained in the run from its seed, for as many epochs as the rows."""

ANCESTRY = Question(
    "ancestry",
    "How much does the ancestry matter?",
    (
        Variant("recipe", "the recipe's"),
        Variant("short", "the same shape, trained in the run for as many epochs as the rows", TRAINED_ANCESTRY),
        Variant(
            "shallow",
            "6 blocks, trained in the run for as many epochs as the rows",
            {**TRAINED_ANCESTRY, "ancestry.depth": 6},
        ),
    ),
    "recipe",
)

SYSTEMS = systems(("snnet_tiny", "tiny", "sws_tiny", "vanilla_tiny", "scratch_tiny"), "snnet_tiny")

BEFORE = {
    "model.rows.0.start": "random",
    "model.rows.1.start": "random",
    "model.stitch_sharing": "window",
    "finetune.paths_per_batch": 1,
    "finetune.feature_weight": 0.0,
    "finetune.lead_weight": 0.0,
    "finetune.train.ema": 0.0,
}
"""Recipe `tiny` as it was before question pools."""
GROUP = {
    "finetune.paths_per_batch": 4,
    "finetune.train.accumulate": 4,
    "finetune.train.batch_size": lambda config: config.distil.train.batch_size // 2,
}
"""Four paths on the same images, half as many as four paths share in a step of `tiny`."""
LEAD = {**GROUP, "finetune.lead_weight": 1.0}
FEATURES = {"finetune.feature_weight": 1.0}
PER_PATH = {"model.stitch_sharing": "path"}
EMA = {"finetune.train.ema": 0.99}
START = {"model.rows.0.start": "ancestry", "model.rows.1.start": "ancestry"}
WIDE_START = {"model.rows.1.start": "ancestry"}
SHAPES = {"008": "r0.0-5", "028": "r0.0-3+r1.4-5", "038": "r0.0-2+r1.3-5", "068": "r1.0-5"}
"""Four shapes by their 10,000 parameters."""
ALONE = {"specialise.paths": [*SHAPES.values()], "specialise.epochs": lambda config: 2 * config.finetune.train.epochs}


def distilled_for(share: float) -> Values:
    """Stage distil's epochs as a multiple of the study's."""
    return {"distil.train.epochs": lambda config: share * config.distil.train.epochs}


QUARTER = {**START, **distilled_for(0.25)}
SAME_IMAGES = {"finetune.train.epochs": lambda config: config.finetune.train.epochs + 0.75 * config.distil.train.epochs}
"""What a quarter of stage distil saves in images, spent on fine-tuning."""


def before_with(name: str, what: str, *changes: Values) -> Variant:
    """Recipe `tiny` as it was before question pools with these changes, at equal cost."""
    return Variant(
        name, what, {key: value for each in (BEFORE, *changes) for key, value in each.items()}, equal_cost=True
    )


def shape_alone(name: str, key: str, *, distilled: bool) -> Variant:
    """One shape trained alone from random weights, for the epochs of both stages; distilled: from the ancestry too."""
    scratch = recipe_variant("scratch_tiny")
    taught = {"finetune.distil_weight": 1.0} if distilled else {}
    what = f"{key} from random weights" + (", with the ancestry's logits" if distilled else ", labels only")
    return replace(scratch, name=name, what=what, values={**scratch.values, **taught, "finetune.only": [key]})


POOLS = Question(
    "pools",
    "What lifts stitched paths, at equal multiply-adds in training?",
    (
        before_with("tiny", "the recipe before this study"),
        before_with("features", "last-block feature loss, weight 1", FEATURES),
        before_with("stitch_per_path", "a stitch layer for each path", PER_PATH),
        before_with("four_paths", "four paths on the same 64 images", GROUP),
        before_with("lead", "four_paths, the wide row first, the others learn its logits", LEAD),
        before_with("ema", "averaged weights, decay 0.99", EMA),
        before_with("start", "rows start from the ancestry", START),
        before_with(
            "start_wide", "the wide row starts from the ancestry, half of stage distil", WIDE_START, distilled_for(0.5)
        ),
        before_with("half_distil", "half of stage distil", distilled_for(0.5)),
        before_with("start_half", "start, half of stage distil", START, distilled_for(0.5)),
        before_with("start_quarter", "start, a quarter of stage distil", QUARTER),
        replace(
            before_with("quarter_images", "start_quarter, with as many images as tiny", QUARTER, SAME_IMAGES),
            equal_cost=False,
        ),
        before_with("start_eighth", "start, an eighth of stage distil", START, distilled_for(0.125)),
        before_with("quarter_features", "start_quarter, features", QUARTER, FEATURES),
        before_with("quarter_per_path", "start_quarter, stitch_per_path", QUARTER, PER_PATH),
        before_with("quarter_lead", "start_quarter, lead", QUARTER, LEAD),
        before_with("specialised", "start_quarter, then four paths alone, two epochs each", QUARTER, ALONE),
        replace(recipe_variant("nested_tiny"), values={}, equal_cost=True),
        recipe_variant("sws_tiny"),
        *(shape_alone(f"scratch_{name}", key, distilled=False) for name, key in SHAPES.items()),
        *(shape_alone(f"alone_{name}", key, distilled=True) for name, key in SHAPES.items()),
    ),
    "tiny",
)

ONE_WAY = {
    "model.two_way": False,
    "model.stitch_rank": 0,
    "pool.stitch_init": "least_squares",
    "finetune.bin_flops": 0,
}
TWO_WAY = {**ONE_WAY, "model.two_way": True}
BINS = {"finetune.bin_flops": lambda config: round(path_gap(config) / 5), "finetune.sandwich": False}
"""Bins raise the share of rows alone, in place of the sandwich."""


def path_gap(config: RunConfig) -> float:
    """FLOPs between two paths of neighbouring positions, on average."""
    space = space_of(config)
    narrow, *_, wide = (space.cost(path).flops for path in space.paths if path.is_row)
    return (wide - narrow) / space.depths[0]


DIRECTIONS = Question(
    "directions",
    "What do stitch layers in both directions give (SN-Net v2), at equal multiply-adds in training?",
    (
        Variant("narrow_to_wide", "from the narrow row to the wide one", ONE_WAY, equal_cost=True),
        Variant("both", "also back", TWO_WAY, equal_cost=True),
        Variant("both_bins", "both, drawn by bins of FLOPs", {**TWO_WAY, **BINS}, equal_cost=True),
        Variant("both_rank", "both, low-rank updates", {**TWO_WAY, "model.stitch_rank": 8}, equal_cost=True),
        Variant("snnet_v2", "all three", {**TWO_WAY, **BINS, "model.stitch_rank": 8}, equal_cost=True),
    ),
    "narrow_to_wide",
)

QUESTIONS = {
    question.name: question for question in (STITCH_INIT, ROWS, POLICY, INSTANCES, ANCESTRY, SYSTEMS, POOLS, DIRECTIONS)
}
