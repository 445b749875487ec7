"""Batches of pixels, decoded by threads of this process into a ring of reused buffers, two batches ahead.

The decoders and torch's resize leave Python's lock to others while they work, so threads share the cores of a rank
without copies between processes.
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

from lgp_dist.config.run_config import DataConfig
from lgp_dist.data.augment.crops import DRAWS, Crop
from lgp_dist.data.augment.keyed_random import Keys, uniforms
from lgp_dist.data.augment.nvimgcodec import RegionDecoder
from lgp_dist.data.shards.decode import BadImage, LostBytes, decode_pixels
from lgp_dist.data.shards.index import ShardIndex
from lgp_dist.errors import UserError

AHEAD = 2
"""Batches that are decoded while one is used."""
CHUNK = 32
"""Most images of one piece of a thread's work."""
NEIGHBOURS = 64
"""Samples that are tried in place of a bad one."""


@dataclass(frozen=True, eq=False)
class Plan:
    """One batch before it is read."""

    samples: NDArray[np.int64]
    """[B] numbers in the index; -1 for a filler of zeros."""
    keys: Keys | None = None
    """[B] for the random crop; None for the centre crop of evaluation."""
    epoch: int = 0
    """To which its bad samples count."""
    replaces: bool = True
    """Whether a neighbour stands in for a bad sample; else zeros do."""


@dataclass(frozen=True, eq=False)
class Loaded:
    """One batch of pixels. Its images are overwritten when the next batch is asked for."""

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
    buffer: Tensor
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
        """The plans in order, read by data.threads threads (0: in this one, when asked).

        A bad sample, one whose bytes are not those that were indexed (compared when it is first read, where the index
        has their sum), or one whose shard was cut or vanished, is replaced: by the next good one of its shard, in a
        circle, else by one of the next shards, or by zeros where the plan says so. With data.max_bad 0 it raises
        BadImage or LostBytes. Raises UserError for a remote shard that cannot be fetched, and where none of 2 *
        NEIGHBOURS samples is good. Errors come when their batch is asked for.
        """
        if self.data.threads < 0:
            raise UserError(f"data.threads is {self.data.threads}: set it to 0 or to a number of threads.")
        _ = self.crop, self.regions, self._due  # made once, before threads ask for them
        if self.data.threads:
            yield from self._ahead(plans)
            return
        ring = _Ring(self.data, self.device)
        for plan in plans:
            job = self._job(plan, ring)
            self._read(job, range(len(plan.samples)))
            yield self._loaded(job, ring)

    def _ahead(self, plans: Iterable[Plan]) -> Iterator[Loaded]:
        """The same, by threads."""
        ring, pending = _Ring(self.data, self.device), deque[_Job]()
        pool = ThreadPoolExecutor(self.data.threads, thread_name_prefix="decode")
        try:
            for plan in plans:
                pending.append(self._submit(plan, ring, pool))
                if len(pending) > AHEAD:
                    yield self._finish(pending.popleft(), ring)
            while pending:
                yield self._finish(pending.popleft(), ring)
        finally:
            pool.shutdown(cancel_futures=True)

    def _submit(self, plan: Plan, ring: "_Ring", pool: ThreadPoolExecutor) -> _Job:
        job, count = self._job(plan, ring), len(plan.samples)
        step = min(CHUNK, max(1, -(-count // self.data.threads)))
        for start in range(0, count, step):
            job.parts.append(pool.submit(self._read, job, range(start, min(start + step, count))))
        return job

    def _finish(self, job: _Job, ring: "_Ring") -> Loaded:
        wait(job.parts, return_when=FIRST_EXCEPTION)  # wakes this thread once, not for every part
        for part in job.parts:
            part.result()
        return self._loaded(job, ring)

    def _job(self, plan: Plan, ring: "_Ring") -> _Job:
        return _Job(plan, ring.take(len(plan.samples)), plan.samples.copy())

    def _loaded(self, job: _Job, ring: "_Ring") -> Loaded:
        bad = [(int(job.plan.samples[place]), job.bad[place]) for place in sorted(job.bad)]
        return Loaded(job.plan, ring.give(job.buffer), job.samples, bad)

    def _read(self, job: _Job, places: range) -> None:
        """Reads some places of a job."""
        plan = job.plan
        images = job.buffer.permute(0, 3, 1, 2)
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
                self._give_up(job, place, out)

    def _decode(self, sample: int, draws: list[float] | None, out: Tensor) -> None:
        """One image into out [1, C, S, S]; draws: of its random crop, None for the centre."""
        content = self.index.content(sample)
        if self._due[sample]:
            if zlib.crc32(content) != self.index.crc[sample]:
                raise BadImage(self.index.describe(sample), "its bytes are not those that were indexed")
            self._due[sample] = False
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

    def _give_up(self, job: _Job, place: int, out: Tensor) -> None:
        """No candidate was good."""
        if job.plan.replaces:
            raise UserError(f"{str(job.bad[place]).removesuffix('.')}; neither can any of the samples after it.")
        out.zero_()
        job.samples[place] = -1

    def _candidates(self, sample: int, replaces: bool) -> Iterator[int]:
        """The sample and what may stand in for it: the next of its shard, in a circle, then one of each next shard."""
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
    def _due(self) -> NDArray[np.bool_]:
        """[n] samples whose bytes have a sum in the index, and have not been compared with it yet."""
        return self.index.crc >= 0

    @cached_property
    def crop(self) -> Crop:
        """From image to input."""
        return Crop.of(self.data)

    @cached_property
    def regions(self) -> RegionDecoder | None:
        """The decoder of crops, where the configuration asks for it."""
        return RegionDecoder() if self.data.decoder == "nvimgcodec" and self.data.channels == 3 else None


class _Ring:
    """Buffers [B, S, S, C] uint8, pinned for CUDA, that are used again and again."""

    def __init__(self, data: DataConfig, device: torch.device) -> None:
        self.shape = (data.image_size, data.image_size, data.channels)
        self.device, self.cuda = device, device.type == "cuda"
        self.side = torch.cuda.Stream(device) if self.cuda else None
        self.free: dict[int, deque[tuple[Tensor, torch.cuda.Event | None]]] = {}
        self.lent: Tensor | None = None

    def take(self, count: int) -> Tensor:
        """A buffer for so many images; what was given last becomes free."""
        self._return()
        free = self.free.setdefault(count, deque())
        if not free:
            if self.cuda:
                return torch.empty((count, *self.shape), dtype=torch.uint8, pin_memory=True)
            return torch.from_numpy(np.empty((count, *self.shape), dtype=np.uint8))  # NumPy asks for huge pages
        buffer, copied = free.popleft()
        if copied is not None:
            copied.synchronize()
        return buffer

    def give(self, buffer: Tensor) -> Tensor:
        """The images [B, C, S, S] of a buffer on the device; on the CPU they share its memory."""
        self._return()
        if not self.cuda:
            self.lent = buffer
            return buffer.permute(0, 3, 1, 2)
        with torch.cuda.stream(self.side):
            moved = buffer.to(self.device, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self.side)
        moved.record_stream(current)
        self.free.setdefault(len(buffer), deque()).append((buffer, copied))
        return moved.permute(0, 3, 1, 2)

    def _return(self) -> None:
        if self.lent is not None:
            self.free.setdefault(len(self.lent), deque()).append((self.lent, None))
            self.lent = None
