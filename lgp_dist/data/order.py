"""Orders and keys as pure functions of numbers: the same on every rank, worker, machine and version of a library."""

from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray


def stream_key(purpose: str, *numbers: int) -> int:
    """A key of 128 bits for one use of randomness: blake2b over its name and its numbers."""
    text = "/".join([purpose, *(str(int(number)) for number in numbers)])
    return int.from_bytes(blake2b(text.encode(), digest_size=16).digest(), "little")


def position_to_sample(seed: int, epoch: int, n: int) -> NDArray[np.int64]:
    """The order of an epoch: element i is the sample at position i of that epoch; a permutation of range(n).

    It sorts n raw 64-bit outputs of the counter-based generator Philox, keyed by (seed, epoch). numpy promises these
    outputs for all its versions (but not what Generator.permutation does with them), so the order never changes.
    """
    raw = np.random.Philox(key=stream_key("order", seed, epoch)).random_raw(n)
    return np.argsort(raw, kind="stable").astype(np.int64, copy=False)
