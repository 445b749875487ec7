"""Batches of pixels, decoded by threads of this process, two batches ahead.

The decoders and torch's resize release Python's lock while they work, so threads share the cores of a rank without
copies between processes.
"""

import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lgp_dist.config.data_config import DataConfig
from lgp_dist.data.augment.crops import DRAWS, Crop
from lgp_dist.data.augment.keyed_random import Keys, uniforms
from lgp_dist.data.augment.nvimgcodec import RegionDecoder
from lgp_dist.data.shards.decode import BadImage, LostBytes, decode_pixels
from lgp_dist.data.shards.index import ShardIndex
from lgp_dist.errors import UserError

AHEAD = 2
"""Batches that are decoded while one is used."""
CHUNK = 32
"""Most images that a thread decodes as one piece of work."""
NEIGHBOURS = 64
"""Samples that are tried in place of a bad one."""


@dataclass(frozen=True, eq=False)
class Plan:
    """One batch before it is read."""

    samples: NDArray[np.int64]
    """[B] numbers in the index; -1 for an image of zeros."""
    keys: Keys | None = None
    """[B] for the random crop; None for the centre crop of evaluation."""
    epoch: int = 0
    """The epoch that its bad samples count towards."""
    replaces: bool = True
    """Whether a neighbour replaces a bad sample; otherwise zeros do."""


@dataclass(frozen=True, eq=False)
class Loaded:
    """One batch of pixels."""

    plan: Plan
    images: Tensor
    """[B, C, S, S] uint8 on the device."""
    samples: NDArray[np.int64]
    """[B] samples that were read: the plan's, a neighbour in place of a bad one, or -1 for zeros."""
    bad: list[tuple[int, BadImage]]
    """Sample and reason of each bad image that the plan named, in the plan's order."""


@dataclass(eq=False)
class _Job:
    """A plan that is being read."""

    plan: Plan
    pixels: Tensor
    """[B, S, S, C] uint8 on the CPU."""
    samples: NDArray[np.int64]
    bad: dict[int, BadImage] = field(default_factory=dict)
    parts: list[Future[None]] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Loader:
    """Reads plans of one split."""

    index: ShardIndex
    data: DataConfig
    device: torch.device

    def load(self, plans: Iterable[Plan]) -> Iterator[Loaded]:
        """The plans in order, read by data.threads threads, or by this thread when asked, if that is 0.

        A sample is bad if it does not decode, if its bytes differ from the indexed ones (compared at its first read,
        where the index has their checksum), or if its shard was cut or vanished. It is replaced by the next good one of
        its shard, cyclically, else by one of the next shards, or by zeros where the plan says so. With data.max_bad 0
        it raises BadImage or LostBytes. Raises UserError for a remote shard that cannot be fetched, and where none of
        2 * NEIGHBOURS samples is good. Errors come with their batch.
        """
        _ = self.crop, self.regions, self._unchecked  # made once, before threads ask for them
        if not self.data.threads:
            for plan in plans:
                job = self._job(plan)
                self._read(job, range(len(plan.samples)))
                yield self._loaded(job)
            return
        pending = deque[_Job]()
        pool = ThreadPoolExecutor(self.data.threads, thread_name_prefix="decode")
        try:
            for plan in plans:
                pending.append(self._submit(plan, pool))
                if len(pending) > AHEAD:
                    yield self._finish(pending.popleft())
            while pending:
                yield self._finish(pending.popleft())
        finally:
            pool.shutdown(cancel_futures=True)

    def _submit(self, plan: Plan, pool: ThreadPoolExecutor) -> _Job:
        job, count = self._job(plan), len(plan.samples)
        step = min(CHUNK, max(1, -(-count // self.data.threads)))
        for start in range(0, count, step):
            job.parts.append(pool.submit(self._read, job, range(start, min(start + step, count))))
        return job

    def _finish(self, job: _Job) -> Loaded:
        wait(job.parts, return_when=FIRST_EXCEPTION)  # wakes this thread once, not for every part
        for part in job.parts:
            part.result()
        return self._loaded(job)

    def _job(self, plan: Plan) -> _Job:
        """A plan with memory for its pixels, pinned for CUDA; torch keeps and reuses pinned memory by itself."""
        shape = (len(plan.samples), self.data.image_size, self.data.image_size, self.data.channels)
        if self.device.type == "cuda":
            pixels = torch.empty(shape, dtype=torch.uint8, pin_memory=True)
        else:
            pixels = torch.from_numpy(np.empty(shape, dtype=np.uint8))  # NumPy asks for huge pages
        return _Job(plan, pixels, plan.samples.copy())

    def _loaded(self, job: _Job) -> Loaded:
        bad = [(int(job.plan.samples[place]), job.bad[place]) for place in sorted(job.bad)]
        pixels = job.pixels
        if self._side is not None:  # its own stream, so that the copy does not wait for the model
            with torch.cuda.stream(self._side):
                pixels = pixels.to(self.device, non_blocking=True)
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self._side)
            pixels.record_stream(current)
        return Loaded(job.plan, pixels.permute(0, 3, 1, 2), job.samples, bad)

    def _read(self, job: _Job, places: range) -> None:
        """Reads some places of a job."""
        plan = job.plan
        images = job.pixels.permute(0, 3, 1, 2)
        rows = None if plan.keys is None else uniforms(plan.keys[places.start : places.stop], DRAWS).tolist()
        for number, place in enumerate(places):
            out, sample = images[place : place + 1], int(plan.samples[place])
            if sample < 0:
                out.zero_()
                continue
            for candidate in self._candidates(sample, plan.replaces):
                try:
                    self._decode(candidate, rows and rows[number], out)
                except (BadImage, LostBytes) as error:
                    if isinstance(error, LostBytes) and not self.data.max_bad:
                        raise
                    named = BadImage(self.index.describe(candidate), error.reason)
                    job.bad.setdefault(place, named)
                    if not self.data.max_bad:
                        raise named from error
                    continue
                job.samples[place] = candidate
                break
            else:
                if plan.replaces:
                    sentence = str(job.bad[place]).removesuffix(".")
                    raise UserError(f"{sentence}; neither can any of the samples after it.")
                out.zero_()
                job.samples[place] = -1

    def _decode(self, sample: int, draws: list[float] | None, out: Tensor) -> None:
        """One image into out [1, C, S, S]; draws: of its random crop, None for the centre crop."""
        content = self.index.content(sample)
        if self._unchecked[sample]:
            if zlib.crc32(content) != self.index.crc[sample]:
                raise BadImage(self.index.describe(sample), "its bytes are not those that were indexed")
            self._unchecked[sample] = False
        if draws is not None and self.regions is not None:
            part = self.regions.crop(content, self.crop, draws)
            if part is not None:
                self.crop.fit(part, out)
                return
        pixels = decode_pixels(content, self.data.channels, "")
        if draws is None:
            self.crop.centre(pixels, out)
        else:
            self.crop.random(pixels, draws, out)

    def _candidates(self, sample: int, replaces: bool) -> Iterator[int]:
        """The sample and its replacements: the next of its shard, cyclically, then one of each next shard."""
        yield sample
        if not (replaces and self.data.max_bad):
            return
        shard, shards = int(self.index.shard[sample]), len(self.index.shards)
        edges = np.searchsorted(self.index.shard, np.arange(shards + 1)).tolist()
        place, count = sample - edges[shard], edges[shard + 1] - edges[shard]
        for step in range(1, min(count, NEIGHBOURS + 1)):
            yield edges[shard] + (place + step) % count
        for step in range(1, min(shards, NEIGHBOURS + 1)):
            other = (shard + step) % shards
            if edges[other] < edges[other + 1]:
                yield edges[other] + place % (edges[other + 1] - edges[other])

    @cached_property
    def _unchecked(self) -> NDArray[np.bool_]:
        """[n] samples whose bytes have yet to be compared with their checksum in the index."""
        return self.index.crc >= 0

    @cached_property
    def _side(self) -> "torch.cuda.Stream | None":
        """The stream that copies to the device."""
        return torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    @cached_property
    def crop(self) -> Crop:
        """From image to input."""
        return Crop(self.data)

    @cached_property
    def regions(self) -> RegionDecoder | None:
        """The decoder of crops, where the configuration asks for it."""
        return RegionDecoder() if self.data.decoder == "nvimgcodec" and self.data.channels == 3 else None
