"""Accuracy of many forwards in one pass over the data; every image counts once over all ranks."""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from lgp_dist.engine.workers import Workers
from lgp_dist.protocols import Batch

Forward = Callable[[Tensor], Tensor]
"""Images [B, C, H, W] to logits [B, classes]."""


@torch.no_grad()
def accuracies(
    forwards: Mapping[str, Forward], batches: Iterable[Batch], workers: Workers
) -> dict[str, tuple[float, float]]:
    """Returns top-1 and top-5 accuracy of each named forward, in per cent.

    batches: the same number on every rank; a sample of weight 0 does not count. Each forward is progress for the
    watchdog.
    """
    counts = torch.zeros(len(forwards), 2, dtype=torch.float64)
    total = torch.zeros(1, dtype=torch.float64)
    for batch in batches:
        moved = batch.to(workers.device)
        total += batch.weight.sum().double()
        for index, forward in enumerate(workers.watchdog.over(forwards.values())):
            with workers.autocast():
                logits = forward(moved.images)
            counts[index] += correct(logits.float(), moved.targets, moved.weight).cpu()
    shares = (100.0 * workers.sum(counts) / workers.sum(total)).tolist()
    return {name: (row[0], row[1]) for name, row in zip(forwards, shares, strict=True)}


def correct(logits: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    """Returns the weighted number of images whose label comes first, and among the first five, [2] float64.

    logits: [B, classes]. targets: [B]. weight: [B].
    """
    top = logits.topk(min(5, logits.shape[1]), dim=1).indices
    hits = (top == targets[:, None]) * weight[:, None]
    return torch.stack([hits[:, 0].sum(), hits.sum()]).double()
