"""What stages measure: the facts in each artifact.json. Those of descend and export are rows: `run.path_rows`."""

from typing import NotRequired, TypedDict


class Training(TypedDict):
    """How a stage was trained."""

    steps: int
    """Optimizer steps of the whole run."""
    seconds: float
    """Of the last process, since it started or resumed the training."""
    images: int
    """Images trained in these seconds."""
    flops: NotRequired[float | None]
    """Multiply-adds of the whole training; None if the ancestry's size is unknown."""


class AncestryFacts(TypedDict):
    """Of stage ancestry."""

    source: str
    weights: NotRequired[str]
    """A file, or timm's name on the hub."""
    weights_sha256: NotRequired[str]
    training: NotRequired[Training]
    top1: NotRequired[float]
    """Without a head it has none."""
    top5: NotRequired[float]
    params: int


class RowFacts(TypedDict):
    """A row of the pool after stage distil."""

    width: int
    source: str
    weights: NotRequired[str]
    """A file, or timm's name on the hub."""
    weights_sha256: NotRequired[str]
    top1: NotRequired[float]
    top5: NotRequired[float]


class DistilFacts(TypedDict):
    """Of stage distil."""

    rows: list[RowFacts]
    training: NotRequired[Training]


class PoolFacts(TypedDict):
    """Of stage pool."""

    stored_params: int
    paths: int
    stitches: int
    """Stitch layers that were initialised."""
    stitch_init: str
    r2: dict[str, float]
    """Of each stitched path by its key: `models.stitch_fit`."""


class FinetuneFacts(TypedDict, total=False):
    """Of stage finetune: how the pool was trained, or the file of its weights."""

    training: Training
    policy: str
    behind: list[str]
    """Keys of the paths that were drawn less often than expected."""
    weights: str
    weights_sha256: str


class EvaluateFacts(TypedDict):
    """Of stage evaluate."""

    best: str
    """The key of the most accurate path."""
    best_top1: float
