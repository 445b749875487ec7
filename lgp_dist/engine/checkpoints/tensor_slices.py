"""Slices of parameters by name: what some ranks write, another number of ranks or another engine can read.

A rank writes slices, each some consecutive elements of a flattened parameter's weight or optimizer state. A reader asks
for the elements that its own engine holds, and gets them from whichever files have them.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lgp_dist.engine.checkpoints.manifest import ADVICE, Manifest
from lgp_dist.errors import UserError

WEIGHT = "weight"
"""The kind of a slice of a weight; other kinds are the optimizer's names."""


@dataclass(frozen=True)
class TensorSlice:
    """A view of consecutive elements of a flattened parameter or its optimizer state."""

    parameter: str
    kind: str
    """weight, or the optimizer's name: exp_avg, exp_avg_sq, momentum_buffer, ema."""
    start: int
    """Of the first element in the flattened parameter."""
    values: Tensor
    """[n] fp32."""

    @property
    def name(self) -> str:
        """Of the tensor in a file."""
        return f"{self.kind}/{self.parameter}@{self.start}"


@contextmanager
def open_slices(manifest: Manifest) -> Iterator[Callable[[TensorSlice], None]]:
    """A context with the files of a checkpoint open; yields a function that copies a slice's elements into it.

    Both raise UserError: for a file that is not a checkpoint's, and if the checkpoint lacks some of the elements.
    """
    places: dict[tuple[str, str], list[tuple[int, int, Any, str]]] = {}  # to start, length, file and tensor of slices

    def fill(wanted: TensorSlice) -> None:
        at, end = wanted.start, wanted.start + wanted.values.numel()
        for start, length, file, key in sorted(places.get((wanted.parameter, wanted.kind), ()), key=itemgetter(0)):
            if start <= at < min(end, start + length):
                stop = min(end, start + length)
                found = file.get_slice(key)[at - start : stop - start]
                wanted.values[at - wanted.start : stop - wanted.start].copy_(found)
                at = stop
        if at < end:
            raise UserError(
                f"{manifest.folder} holds no {wanted.kind} of {wanted.parameter} from element {at} on: "
                "resume with the recipe and the optimizer that it was made with."
            )

    with ExitStack() as stack:
        for name in manifest.files:
            path = manifest.folder / name
            try:
                file = stack.enter_context(safe_open(path, framework="pt"))
                for key in file.keys():  # noqa: SIM118  not a mapping
                    kind, rest = key.split("/", 1)
                    parameter, start = rest.rsplit("@", 1)
                    (length,) = file.get_slice(key).get_shape()
                    if not start.isdecimal():
                        raise ValueError(f"tensor {key!r} has no start")
                    places.setdefault((parameter, kind), []).append((int(start), length, file, key))
            except (SafetensorError, OSError, ValueError) as error:
                raise UserError(f"{path} is not a file of a checkpoint ({error}): {ADVICE}.") from error
        yield fill


def check_shapes(manifest: Manifest, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises UserError unless the checkpoint has exactly these parameters."""

    def shown(shape: tuple[int, ...] | None) -> str:
        return "not at all" if shape is None else f"as {list(shape)}"

    for name in sorted(shapes.keys() | manifest.shapes.keys()):
        theirs, ours = manifest.shapes.get(name), shapes.get(name)
        if theirs != ours:
            raise UserError(
                f"{manifest.folder} has {name} {shown(theirs)}, and this recipe {shown(ours)}: "
                "resume with the recipe that it was made with."
            )


def consolidate(manifest: Manifest) -> dict[str, Tensor]:
    """Returns all weights, whole, by name. Raises UserError if files are damaged or incomplete."""
    manifest.check_files()
    needed = sum(4 * prod(shape) for shape in manifest.shapes.values())
    held = sum(size for size, _ in manifest.files.values())
    if needed > held:
        raise UserError(f"{manifest.folder} says that it has {needed} bytes of weights, but holds {held}: {ADVICE}.")
    whole = {name: torch.empty(shape) for name, shape in manifest.shapes.items()}
    with open_slices(manifest) as fill:
        for name, tensor in whole.items():
            fill(TensorSlice(name, WEIGHT, 0, tensor.view(-1)))
    return whole


def same(path: Path, slices: Iterable[TensorSlice]) -> bool:
    """Whether a file holds exactly these slices, bit for bit."""
    wanted = {one.name: one.values for one in slices}
    with safe_open(path, framework="pt") as file:
        return set(file.keys()) == wanted.keys() and all(
            torch.equal(file.get_tensor(name).view(torch.int32), values.view(torch.int32))
            for name, values in wanted.items()
        )
