"""Counter-based random numbers: number i of a key is a hash of key and i, for whole batches at once.

A key stands for one sample in one epoch, so its draws depend on nothing else: not on rank, batch or thread, nor on
earlier draws. Nothing keeps a state that a resume would have to restore. The hash is SplitMix64's (Steele, Lea and
Flood, 2014), in integers only, so every machine gives the same bits.
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lgp_dist.data.order import stream_key

_GOLDEN = 0x9E3779B97F4A7C15
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_BITS = 2**64

Keys = NDArray[np.uint64]
Numbers = NDArray[np.float64]


def _mix(state: Keys) -> Keys:
    """SplitMix64's output for each state."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(_FIRST)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(_SECOND)
    return state ^ (state >> np.uint64(31))


def sample_keys(purpose: str, seed: int, epochs: NDArray[np.int64], samples: NDArray[np.int64]) -> Keys:
    """A key for each sample [k] in its epoch [k], for one use of randomness."""
    keys = np.empty(len(samples), dtype=np.uint64)
    for epoch in np.unique(epochs).tolist():
        mine = epochs == epoch
        base = np.uint64(stream_key(purpose, seed, epoch) % _BITS)
        keys[mine] = _mix(base + (samples[mine].astype(np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN))
    return keys


def uniforms(keys: Keys, count: int) -> Numbers:
    """Uniform numbers [k, count] in [0, 1), with 53 bits."""
    counter = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
    return (_mix(keys[:, None] + counter) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def normals(u: Numbers, v: Numbers) -> Numbers:
    """Standard normal numbers from two arrays of uniform ones, by Box and Muller's method."""
    return np.sqrt(-2.0 * np.log1p(-u)) * np.cos(2.0 * math.pi * v)


def betas(keys: Keys, alpha: float, tries: int = 12) -> Numbers:
    """One number of Beta(alpha, alpha) for each key [k]; alpha > 0.

    It is g / (g + h) for two Gamma(alpha) numbers by Marsaglia and Tsang's rejection method. All tries are drawn at
    once; each fails with less than 5 %, and the last is accepted in any case.
    """
    u = uniforms(keys, 2 * (3 * tries + 1)).reshape(len(keys), 2, 3 * tries + 1)
    boost = np.log(np.maximum(u[..., 0], 2.0**-60)) / alpha if alpha < 1 else np.zeros(u.shape[:2])
    d = (alpha + 1 if alpha < 1 else alpha) - 1 / 3
    parts = u[..., 1:].reshape(len(keys), 2, tries, 3)
    x = normals(parts[..., 0], parts[..., 1])
    v = (1 + x / math.sqrt(9 * d)) ** 3
    safe = np.maximum(v, 1e-12)
    good = (v > 0) & (np.log(np.maximum(parts[..., 2], 2.0**-60)) < 0.5 * x * x + d - d * v + d * np.log(safe))
    good[..., -1] = True
    chosen = np.take_along_axis(safe, good.argmax(axis=-1)[..., None], axis=-1)[..., 0]
    logs = np.log(d * chosen) + boost
    return 1.0 / (1.0 + np.exp(np.clip(logs[:, 1] - logs[:, 0], -700, 700)))


def device_normals(keys: Tensor, count: int) -> Tensor:
    """Standard normal numbers [k, count] float32 on the device of `keys` [k] int64 (the bits of a key).

    The same hash as in `uniforms`; its two halves of 32 bits make one number.
    """
    counter = torch.arange(1, count + 1, dtype=torch.int64, device=keys.device) * _signed(_GOLDEN)
    state = keys[:, None] + counter
    for shift, factor in ((30, _FIRST), (27, _SECOND)):
        state = (state ^ _shift(state, shift)) * _signed(factor)
    state = state ^ _shift(state, 31)
    u = (_shift(state, 32).double() + 0.5) * 2.0**-32
    v = (state & 0xFFFFFFFF).double() * 2.0**-32
    return (torch.sqrt(-2.0 * torch.log(u)) * torch.cos(2.0 * math.pi * v)).float()


def _signed(number: int) -> int:
    """The int64 with the same 64 bits."""
    return number - _BITS if number >= _BITS // 2 else number


def _shift(state: Tensor, bits: int) -> Tensor:
    """Logical right shift of an int64's 64 bits."""
    return (state >> bits) & ((1 << (64 - bits)) - 1)
