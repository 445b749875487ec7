"""Training loops that one would use instead of this project's, written from their published description.

bare: forward, losses, backward and AdamW's step in a plain loop, one process, batches in memory: what the loop costs.

snnet: the way of SN-Net. The model draws a path in its forward, on every rank its own; DistributedDataParallel looks
for unused parameters; Pillow, torchvision's transforms and a DataLoader's worker processes make batches; the teacher
computes in the model's precision from its fp32 weights in every forward; every step reads the loss.

timm: timm's create_loader, optimizer and loop for one model without a teacher, the pool's widest row. This project's
loop trains the same row alone.
"""

import io
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from PIL import Image
from timm.data import create_loader, create_transform
from timm.optim import create_optimizer_v2
from timm.utils import AverageMeter
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torch.utils.data.distributed import DistributedSampler

from lgp_dist.bench.common import random_ancestry, random_pool
from lgp_dist.bench.loop.interleave import Finetuning
from lgp_dist.data.shards.index import ShardIndex
from lgp_dist.engine.optim import build_optimizer
from lgp_dist.engine.trainer import prepare_module
from lgp_dist.models.pool import row_vit
from lgp_dist.paths.sampler import PathSampler
from lgp_dist.paths.space import heads_of
from lgp_dist.protocols import Batch, StepContext
from lgp_dist.tasks.losses import cross_entropy, soft_cross_entropy

Step = Callable[[int], None]


class PillowImages(Dataset[tuple[Any, int]]):
    """Images of a split by number, decoded by Pillow, as timm's and torchvision's folders give them from files."""

    def __init__(self, index: ShardIndex, channels: int, transform: Any = None):
        self.index, self.mode, self.transform = index, "L" if channels == 1 else "RGB", transform

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> tuple[Any, int]:
        image = Image.open(io.BytesIO(self.index.content(i))).convert(self.mode)
        return self.transform(image) if self.transform else image, int(self.index.label[i])


def augmentation(bench: Finetuning) -> dict[str, Any]:
    """The recipe's augmentation and normalisation under timm's names."""
    data, augment = bench.config.data, bench.config.data.augment
    return {
        "is_training": True,
        "scale": augment.crop_scale,
        "hflip": augment.hflip,
        "color_jitter": augment.color_jitter or None,
        "auto_augment": augment.auto_augment or None,
        "re_prob": augment.random_erase,
        "interpolation": data.interpolation,
        "mean": data.mean,
        "std": data.std,
    }


class DrawingPool(nn.Module):
    """A pool that draws its path in its forward; every rank has its own draws."""

    def __init__(self, pool: nn.Module, sampler: PathSampler, rank: int, world: int):
        super().__init__()
        self.pool, self.sampler, self.rank, self.world = pool, sampler, rank, world
        self.step = 0

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] to [B, classes]."""
        return self.pool(images, self.sampler.draw(self.step, 0, self.rank, self.world))


def independent_sampler(bench: Finetuning) -> PathSampler:
    """The sampler of the same paths with which every rank draws alone, once in a step."""
    sampler = bench.sampler
    return PathSampler(sampler.paths, "independent", sampler.seed, weights=sampler.weights)


class TrainLoop:
    """One training loop, of which `run` takes some steps."""

    def __init__(self, bench: Finetuning, module: nn.Module, step: Step, loader: Any = None):
        """step: takes the step of a number. loader: the source of `batches`; it is iterated again and again."""
        self.bench, self.module, self._step, self.loader = bench, module, step, loader
        self.batches: Iterator[Any] = iter(())

    def run(self, steps: range, warm_up: int) -> float:
        """Seconds of these steps, after a few that are not timed; worker processes exist for this call alone."""
        self.batches = self._endless()
        for number in range(warm_up):
            self._step(steps.start + number)
        self.bench.wait()
        began = time.perf_counter()
        for number in steps:
            self._step(number)
        self.bench.wait()
        seconds = time.perf_counter() - began
        self.batches = iter(())
        return seconds

    def _endless(self) -> Iterator[Any]:
        while self.loader is not None:
            yield from self.loader


def bare(bench: Finetuning, workers: int, batches: list[Batch]) -> TrainLoop:
    """A plain loop over the same forwards, losses, backwards and steps as the project's. batches: in memory."""
    task, train = bench.task(), bench.train
    pool = task.module
    optimizer = build_optimizer(pool, train, skippable=pool.skippable_modules)
    prepare_module(pool, bench.workers)

    def step(number: int) -> None:
        for micro in range(train.accumulate):
            batch = batches[(number * train.accumulate + micro) % len(batches)]
            with bench.workers.autocast():
                loss = task.losses(pool, batch, StepContext(number, micro, 0, 1))["loss"]
            (loss / train.accumulate).backward()
        if train.clip_grad:
            nn.utils.clip_grad_norm_(pool.parameters(), train.clip_grad)
        optimizer.step()
        optimizer.zero_grad()

    return TrainLoop(bench, pool, step)


def snnet(bench: Finetuning, workers: int, batches: list[Batch]) -> TrainLoop:
    """The way of SN-Net."""
    config, rank, world = bench.config, bench.workers.rank, bench.workers.world
    device = bench.workers.device
    drawing = DrawingPool(
        random_pool(config, bench.workers, training=False), independent_sampler(bench), rank, world
    ).train()
    model = _parallel(drawing, bench, find_unused_parameters=True)
    finetune = config.finetune
    teacher = random_ancestry(config, bench.workers) if finetune.distil_weight else None
    optimizer = create_optimizer_v2(model, opt="adamw", lr=bench.train.lr, weight_decay=bench.train.weight_decay)
    size = config.data.image_size
    data = PillowImages(bench.index, config.data.channels, create_transform(size, **augmentation(bench)))
    loader = DataLoader(
        data,
        batch_size=bench.stream.per_rank * bench.train.accumulate,
        sampler=DistributedSampler(data, world, rank) if world > 1 else RandomSampler(data),
        num_workers=workers,
        pin_memory=device.type == "cuda",
        drop_last=True,
    )
    meter = AverageMeter()

    def step(number: int) -> None:
        images, targets = (part.to(device, non_blocking=True) for part in next(loop.batches))
        drawing.step = number
        with bench.workers.autocast():
            logits = model(images)
            loss = cross_entropy(logits, targets)
            if teacher is not None:
                with torch.no_grad():
                    soft = teacher.vit(images)
                loss = loss + finetune.distil_weight * soft_cross_entropy(soft, logits, finetune.tau, "sample")
        value = loss.item()
        if not math.isfinite(value):
            raise ArithmeticError(f"the loss is {value}")
        optimizer.zero_grad()
        loss.backward()
        _end(model, optimizer, bench)
        meter.update(value)

    loop = TrainLoop(bench, model, step, loader)
    return loop


def timm_loop(bench: Finetuning, workers: int, batches: list[Batch]) -> TrainLoop:
    """timm's training loop on the widest row."""
    config, device = bench.config, bench.workers.device
    torch.manual_seed(config.seed)
    heads = heads_of(config)
    model = _parallel(row_vit(bench.space, len(heads) - 1, heads).to(device).train(), bench)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=bench.train.lr, weight_decay=bench.train.weight_decay)
    side, channels = config.data.image_size, config.data.channels
    loader = create_loader(
        PillowImages(bench.index, channels),
        (channels, side, side),
        bench.stream.per_rank * bench.train.accumulate,
        num_workers=workers,
        distributed=bench.workers.world > 1,
        persistent_workers=False,
        use_prefetcher=device.type == "cuda",
        device=device,
        **augmentation(bench),
    )
    meter = AverageMeter()

    def step(number: int) -> None:
        images, targets = (part.to(device) for part in next(loop.batches))
        with bench.workers.autocast():
            loss = cross_entropy(model(images), targets)
        loss.backward()
        _end(model, optimizer, bench)
        optimizer.zero_grad()
        if number % bench.train.log_every == 0:
            meter.update(loss.item())

    loop = TrainLoop(bench, model, step, loader)
    return loop


def _parallel(model: nn.Module, bench: Finetuning, **options: bool) -> nn.Module:
    if bench.workers.world == 1:
        return model
    on_gpu = bench.workers.device.type == "cuda"
    return DistributedDataParallel(model, device_ids=[bench.workers.device] if on_gpu else None, **options)


def _end(model: nn.Module, optimizer: torch.optim.Optimizer, bench: Finetuning) -> None:
    if bench.train.clip_grad:
        nn.utils.clip_grad_norm_(model.parameters(), bench.train.clip_grad)
    optimizer.step()


TRAIN_LOOPS: dict[str, Callable[[Finetuning, int, list[Batch]], TrainLoop]] = {
    "bare": bare,
    "snnet": snnet,
    "timm": timm_loop,
}
"""What the project's loop is compared with, by name: functions of the bench, a DataLoader's processes, and batches."""
