"""One loader, one pass over shards of photographs, in a process of its own: images, CPU seconds, seconds.

Run as `python -m lgp_dist.bench.loaders.loaders LOADER FOLDER THREADS BATCH`; prints one JSON object. Every loader
gives random crops of 224 x 224, bilinear, and flips; those that give uint8 leave normalisation to the device.
"""

import gc
import importlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm.data
import torch
import torchvision.transforms as T
import webdataset as wds
from PIL import Image
from torch.utils.data import DataLoader

from lgp_dist.config.run_config import DataConfig
from lgp_dist.data.augment.keyed_random import sample_keys
from lgp_dist.data.loader import Loader, Plan
from lgp_dist.data.shards.index import ShardIndex
from lgp_dist.data.shards.manifest import ShardManifest
from lgp_dist.data.stream import order_of

SIZE = 224
CLASSES = 1000
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _shards(folder: Path) -> list[str]:
    return [str(path) for path in sorted(folder.glob("*.tar"))]


_PIL = T.Compose([T.RandomResizedCrop(SIZE), T.RandomHorizontalFlip(), T.ToTensor(), T.Normalize(MEAN, STD)])


def _pil(image: Image.Image) -> torch.Tensor:
    return _PIL(image.convert("RGB"))


def webdataset(folder: Path, threads: int, batch: int) -> Iterable[Any]:
    """The pipeline of webdataset's README: Pillow, torchvision's transforms, worker processes."""
    pipeline = wds.DataPipeline(
        wds.SimpleShardList(_shards(folder)),
        wds.shuffle(100),
        wds.split_by_node,
        wds.split_by_worker,
        wds.tarfile_to_samples(),
        wds.shuffle(5000, initial=1000),
        wds.decode("pil"),
        wds.to_tuple("jpg", "cls"),
        wds.map_tuple(_pil, int),
        wds.batched(batch, partial=True),
    )
    return DataLoader(pipeline, batch_size=None, num_workers=threads)


def timm_loader(folder: Path, threads: int, batch: int) -> Iterable[Any]:
    """timm's create_loader over its reader of WebDataset shards, uint8."""
    data = timm.data.create_dataset("wds/photos", root=str(folder), split="train", is_training=True, batch_size=batch)
    return timm.data.create_loader(
        data,
        (3, SIZE, SIZE),
        batch,
        is_training=True,
        num_workers=threads,
        color_jitter=0.0,
        interpolation="bilinear",
        use_prefetcher=True,
        device=torch.device("cpu"),
        persistent_workers=False,
    )


def dali(folder: Path, threads: int, batch: int) -> Iterable[Any]:
    """NVIDIA DALI on the CPU, uint8; needs the package nvidia-dali-cuda130."""
    lib, fn, types = (importlib.import_module(f"nvidia.dali{name}") for name in ("", ".fn", ".types"))
    torch_part = importlib.import_module("nvidia.dali.plugin.pytorch")

    @lib.pipeline_def(batch_size=batch, num_threads=threads, device_id=None, seed=1)
    def pipe() -> Any:
        jpegs, labels = fn.readers.webdataset(
            paths=_shards(folder), ext=["jpg", "cls"], random_shuffle=True, initial_fill=1000, name="reader"
        )
        crops = fn.decoders.image_random_crop(
            jpegs, device="cpu", random_area=[0.08, 1.0], random_aspect_ratio=[3 / 4, 4 / 3], output_type=types.RGB
        )
        images = fn.resize(crops, resize_x=SIZE, resize_y=SIZE, interp_type=types.INTERP_LINEAR, antialias=True)
        return fn.flip(images, horizontal=fn.random.coin_flip()), fn.pad(labels, fill_value=0)

    made = pipe()
    made.build()
    policy = torch_part.LastBatchPolicy.PARTIAL
    batches = torch_part.DALIGenericIterator([made], ["x", "y"], reader_name="reader", last_batch_policy=policy)
    return ((part[0]["x"], part[0]["y"]) for part in batches)


def lgp(folder: Path, threads: int, batch: int, decoder: str = "simplejpeg") -> Iterator[tuple[torch.Tensor, Any]]:
    """This project's loader, uint8: what a training stream reads before it augments on the device, one epoch with the
    crops of training. decoder: as data.decoder."""
    plain = DataConfig(root=str(folder), num_classes=CLASSES, interpolation="bilinear", threads=threads)
    data, index = replace(plain, decoder=decoder), ShardIndex.load(ShardManifest.load(folder), "train", CLASSES)
    order = order_of(index, data, 0).samples(np.arange(len(index)))
    parts = (order[start : start + batch] for start in range(0, len(index), batch))
    plans = (Plan(samples, sample_keys("augment", 0, samples * 0, samples)) for samples in parts)
    for loaded in Loader(index, data, torch.device("cpu")).load(plans):
        yield loaded.images, index.label[loaded.samples]


LOADERS: dict[str, Callable[[Path, int, int], Iterable[Any]]] = {
    "webdataset": webdataset,
    "timm": timm_loader,
    "dali": dali,
    "lgp": lgp,
    "lgp-nvimgcodec": partial(lgp, decoder="nvimgcodec"),
}
"""What is measured."""


def _cpu_seconds() -> float:
    """User and system seconds of this process and of its finished children."""
    parts = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(part.ru_utime + part.ru_stime for part in parts)


def measure(loader: str, folder: Path, threads: int, batch: int) -> dict[str, float]:
    """One pass: images, cpu_s and wall_s, with the start and end of worker processes and without imports."""
    torch.set_num_threads(1)
    made = LOADERS[loader](folder, threads, batch)
    gc.collect()
    gc.freeze()  # so that the collection below skips what imports made
    began, cpu, count = time.perf_counter(), _cpu_seconds(), 0
    for images, _ in made:
        count += len(images)
    del made
    gc.collect()  # ends worker processes, so that their seconds count
    return {"images": count, "cpu_s": _cpu_seconds() - cpu, "wall_s": time.perf_counter() - began}


def main() -> None:
    """Measures the loader that the arguments name."""
    loader, folder, threads, batch = sys.argv[1:]
    found = measure(loader, Path(folder), int(threads), int(batch))
    sys.stdout.write("\n" + json.dumps(found) + "\n")
    sys.stdout.flush()
    os._exit(0)  # does not wait for threads that libraries left running


if __name__ == "__main__":
    main()
