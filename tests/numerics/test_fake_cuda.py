"""What would run on a GPU, with tensors that have a device and no values: a tensor left on the CPU fails, as on a GPU,
and so does a value that is read on the host. Forwards only: a backward needs the device."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode, unset_fake_temporarily

from lgp_dist.config.run_config import AugmentConfig, RunConfig, TrainConfig
from lgp_dist.data.augment.keyed_random import sample_keys
from lgp_dist.data.augment.mixing import Mixer
from lgp_dist.data.augment.pixels import Pixels
from lgp_dist.engine.divergence_check import bits
from lgp_dist.engine.evaluate import correct
from lgp_dist.models.build import auxiliary_rows, build_ancestry, build_pool
from lgp_dist.models.stitch_init import ancestry_means, least_squares_starts
from lgp_dist.paths.sampler import PathSampler
from lgp_dist.paths.space import rows_space, space_of
from lgp_dist.protocols import Batch, StepContext, Task
from lgp_dist.recipes import nested_tiny, snnet_v2_tiny, sws_tiny, tiny
from lgp_dist.study.settings import with_values
from lgp_dist.tasks.distil import distil_task
from lgp_dist.tasks.finetune import finetune_task

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
IMAGES = 4
LEAD = {
    "finetune.paths_per_batch": 4,
    "finetune.train.accumulate": 4,
    "finetune.lead_weight": 1.0,
    "finetune.feature_weight": 1.0,
}
OTHER = {"ancestry.model": "test_vit4", "ancestry.image_size": 64, "ancestry.mean": (0.5,), "ancestry.head": "none"}
RANDOM = {"model.rows.0.start": "random", "model.rows.1.start": "random"}
TAUGHT = {
    "tiny": tiny(),
    "lead path and features": with_values(tiny(), LEAD),
    "hard labels": with_values(tiny(), {"finetune.distil": "hard"}),
    "registers, other images": with_values(tiny(), {**OTHER, **RANDOM, "finetune.feature_weight": 1.0}),
    "two-way": snnet_v2_tiny(),
    "nested": nested_tiny(),
    "sws": sws_tiny(),
}


@pytest.fixture
def fake() -> Iterator[None]:
    """New tensors have no values."""
    with FakeTensorMode():
        yield


def on_cuda(build: Callable[[], Any]) -> Any:
    """A module with parameters and buffers that have no values, on the device; timm reads some while it builds."""
    with unset_fake_temporarily():
        module = build()
    for part in module.modules():
        for name, tensor in part._parameters.items():
            if tensor is not None:
                empty = torch.empty(tensor.shape, dtype=tensor.dtype, device=CUDA)
                part._parameters[name] = nn.Parameter(empty, tensor.requires_grad)
        for name, tensor in part._buffers.items():
            if tensor is not None:
                part._buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device=CUDA)
    return module


def batch_of(config: RunConfig) -> Batch:
    """Images and labels on the device."""
    size, channels = config.data.image_size, config.data.channels
    images = torch.randn(IMAGES, channels, size, size, device=CUDA)
    return Batch(images, torch.zeros(IMAGES, dtype=torch.long, device=CUDA), torch.ones(IMAGES, device=CUDA))


def check_losses(task: Task, batch: Batch, micro_steps: int) -> None:
    """Every loss of a few steps is one number on the device."""
    for step in range(3):
        for micro in range(micro_steps):
            with torch.no_grad():
                losses = task.losses(task.module, batch, StepContext(step, micro, 0, 1))
            assert losses and all(value.device.type == "cuda" and value.shape == () for value in losses.values())


def test_the_mode_finds_what_it_is_for(fake: None) -> None:
    """A tensor on another device, and a value that the host reads."""
    here = torch.ones(3, device=CUDA)
    with pytest.raises(Exception, match="device"):
        here + torch.ones(3)
    with pytest.raises(DataDependentOutputException):
        float(here.sum())


@pytest.mark.slow
@pytest.mark.parametrize("name", TAUGHT)
def test_losses_of_fine_tuning(fake: None, name: str) -> None:
    config = TAUGHT[name]
    pool = on_cuda(lambda: build_pool(config, CPU))
    ancestry = on_cuda(lambda: build_ancestry(config, CPU)) if config.teaches_paths else None
    task = finetune_task(config, pool, ancestry, PathSampler.from_config(config, space_of(config)))
    check_losses(task, batch_of(config), config.finetune.train.accumulate)


@pytest.mark.parametrize("name", ["tiny", "registers, other images", "sws"])
def test_losses_of_distillation(fake: None, name: str) -> None:
    config = TAUGHT[name]
    ancestry = on_cuda(lambda: build_ancestry(config, CPU))
    rows = on_cuda(lambda: auxiliary_rows(config, ancestry))
    task = distil_task(config, rows.rows, ancestry)
    check_losses(task, batch_of(config), 1)


def test_stitch_layers_start_on_the_device(fake: None) -> None:
    """Least squares in both directions, and the mean tokens of the ancestry."""
    for config in (tiny(), snnet_v2_tiny()):
        rows = on_cuda(lambda config=config: rows_of(config))
        starts = least_squares_starts(rows_space(config), list(rows.rows), [batch_of(config).images], 1e-3)
        assert len(starts) == len(rows_space(config).stitch_widths)
    config = tiny()
    ancestry = on_cuda(lambda: build_ancestry(config, CPU))
    levels = [level for row in rows_of(config).rows for level in row.levels]
    means = ancestry_means(ancestry, levels, [batch_of(config).images])
    assert all(mean.shape == (96,) for mean in means.values())


def rows_of(config: RunConfig) -> nn.Module:
    """The rows of a recipe."""
    with unset_fake_temporarily():
        return auxiliary_rows(config, build_ancestry(config, CPU) if config.has_levels else None)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("policy", ["", "rand-m9-mstd0.5-inc1"])
def test_augmentation_and_mixing(fake: None, policy: str, channels: int) -> None:
    augment = AugmentConfig(color_jitter=0.4, auto_augment=policy, random_erase=0.25)
    data = dataclasses.replace(
        tiny().data, channels=channels, mean=(0.5,) * channels, std=(0.5,) * channels, augment=augment
    )
    pixels = Pixels(data, CUDA)
    keys = sample_keys("augment", 0, np.zeros(IMAGES, np.int64), np.arange(IMAGES))
    images: Tensor = torch.zeros(IMAGES, channels, 28, 28, dtype=torch.uint8, device=CUDA)
    images = pixels.augment(images, keys)
    assert (images.device.type, images.dtype, images.shape[1]) == ("cuda", torch.float32, channels)
    mixer = Mixer(TrainConfig(mixup=0.8, cutmix=1.0, label_smoothing=0.1), 10)
    mixed, targets = mixer(images, torch.zeros(IMAGES, dtype=torch.long, device=CUDA), keys)
    assert mixed.device == targets.device == images.device and targets.shape == (IMAGES, 10)


def test_evaluation_and_audit(fake: None) -> None:
    """Every path's hits, and the sums by which ranks compare weights."""
    config = tiny()
    pool, batch = on_cuda(lambda: build_pool(config, CPU)), batch_of(config)
    for path in space_of(config).paths:
        with torch.no_grad():
            hits = correct(pool(batch.images, path), batch.targets, batch.weight)
        assert (hits.device.type, hits.shape) == ("cuda", (2,))
    assert all(bits(parameter).device.type == "cuda" for parameter in pool.parameters())
