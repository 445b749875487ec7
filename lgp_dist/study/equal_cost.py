"""What training will cost, by arithmetic, so that variants can be given the same number of multiply-adds."""

from lgp_dist.config.run_config import RunConfig
from lgp_dist.paths.cost import ancestry_flops, ancestry_forward, trained_rows_flops, work
from lgp_dist.paths.sampler import PathSampler
from lgp_dist.paths.space import space_of
from lgp_dist.study.settings import with_values


def distil_flops(config: RunConfig) -> float:
    """Multiply-adds of stage distil for each image of the training split. ValueError if a size is unknown."""
    distils = any(row.source == "distil" for row in config.model.rows)
    return _known(
        work(config.distil.train.epochs, trained_rows_flops(config), ancestry_flops(config) if distils else 0)
    )


def finetune_flops(config: RunConfig) -> float:
    """Multiply-adds of an epoch of stage finetune on one rank for each image. ValueError if a size is unknown."""
    space = space_of(config)
    shares = PathSampler.from_config(config, space).shares(1)
    mean = sum(share * space.cost(path).flops for path, share in shares.items())
    return _known(work(1, config.finetune.paths_per_batch * mean, ancestry_forward(config)))


def _known(flops: float | None) -> float:
    if flops is None:
        raise ValueError("the multiply-adds of the ancestry are not known")
    return flops


def with_equal_cost(config: RunConfig, like: RunConfig) -> RunConfig:
    """The configuration with as long a stage finetune, and as long a warm-up in proportion, as makes training cost as
    much as `like`'s."""
    total = distil_flops(like) + like.finetune.train.epochs * finetune_flops(like)
    epochs = round((total - distil_flops(config)) / finetune_flops(config), 4)
    warmup = round(like.finetune.train.warmup_epochs * epochs / like.finetune.train.epochs, 4)
    return with_values(config, {"finetune.train.epochs": epochs, "finetune.train.warmup_epochs": warmup})
