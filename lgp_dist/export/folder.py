"""An exported descendant: a folder of formats, each compared with the path on real images."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lgp_dist.config.run_config import ExportConfig
from lgp_dist.errors import UserError
from lgp_dist.export.card import int8_words, model_card
from lgp_dist.export.formats import FORMATS, CheckedFile, Int8Accuracy, Verification, wanted
from lgp_dist.files import write_json
from lgp_dist.protocols import Batch
from lgp_dist.run.path_rows import PathRow
from lgp_dist.run.tensors import save_tensors


@dataclass(frozen=True)
class Exported:
    """A descendant to export."""

    model: nn.Module
    """On the CPU, in eval mode."""
    config: dict[str, Any]
    """config.json: `models.descendant.exported_config`."""
    facts: PathRow
    """With latencies."""
    origin: dict[str, str]
    """Where the weights come from: description to id or hash."""


def write_folder(
    folder: Path,
    exported: Exported,
    settings: ExportConfig,
    batches: Callable[[int], Iterable[Batch]],
    reference: Callable[[Tensor], Tensor],
) -> Verification:
    """Writes all formats into an empty folder, compares each with `reference`, and returns what verify.json says.

    batches: a number of images to batches of that many. reference: images to the path's logits. UserError if a format
    differs by more than its bound; the caller then removes the folder.
    """
    save_tensors(folder / "model.safetensors", exported.model.state_dict())
    names, left_out = wanted(settings.formats)
    write_json(folder / "config.json", exported.config)
    pair = next(iter(batches(1))).images[:1].repeat(2, 1, 1, 1)  # torch.export would fix a batch size of one
    for name in names:
        FORMATS[name].write(exported.model, pair, folder)
    images = int(sum(batch.weight.sum() for batch in batches(settings.images)))
    verdict: Verification = {"images": images, "formats": {}, "left_out": left_out}
    for name in names:
        run, bound = FORMATS[name].open(folder), FORMATS[name].bound
        file, key = FORMATS[name].file, exported.facts["key"]
        found = checked(
            CheckedFile(file=file, largest_difference=0.0, bound=bound), key, run, reference, batches(settings.images)
        )
        verdict["formats"][name] = found
    if "int8" in names:
        verdict["int8"] = _accuracy_loss(reference, FORMATS["int8"].open(folder), batches(settings.int8_images))
    write_json(folder / "verify.json", verdict)
    (folder / "README.md").write_text(model_card(exported.config, exported.facts, exported.origin, verdict))
    return verdict


def told(verdict: Verification) -> list[str]:
    """What a person is told: the largest differences, the accuracy of int8, and what was left out."""
    files = verdict["formats"].values()
    found = ", ".join(f"{each['file']} {each['largest_difference']:.2g}" for each in files if each["bound"] is not None)
    lines = [f"largest difference of a logit on {verdict['images']} images: {found}"]
    lines += [int8_words(verdict["int8"])] if "int8" in verdict else []
    return [*lines, verdict["left_out"]] if verdict["left_out"] else lines


def checked(
    before: CheckedFile,
    key: str,
    run: Callable[[Tensor], Tensor],
    reference: Callable[[Tensor], Tensor],
    batches: Iterable[Batch],
) -> CheckedFile:
    """What was found of a file, now with the path `key`. UserError if a logit differs by more than the file's bound."""
    difference, bound = largest_difference(run, reference, batches), before["bound"]
    if bound is not None and not difference <= bound:
        raise UserError(
            f"{before['file']} of {key} differs from its path by {difference:.3g}, more than {bound:g}, so nothing was "
            "exported: leave the format out, if it was asked for, and report it."
        )
    return {**before, "largest_difference": max(difference, before["largest_difference"])}


@torch.no_grad()
def largest_difference(
    run: Callable[[Tensor], Tensor], reference: Callable[[Tensor], Tensor], batches: Iterable[Batch]
) -> float:
    """Largest difference of a logit, for whole batches and for each batch's first image alone. NaN if one is NaN."""
    largest = 0.0
    for batch in batches:
        for images in (batch.images, batch.images[:1]):
            difference = float((run(images) - reference(images)).abs().max())
            if not difference <= largest:
                largest = difference
    return largest


@torch.no_grad()
def _accuracy_loss(
    reference: Callable[[Tensor], Tensor], run: Callable[[Tensor], Tensor], batches: Iterable[Batch]
) -> Int8Accuracy:
    """Top-1 of both on the same images."""
    counts = torch.zeros(3, dtype=torch.float64)
    for batch in batches:
        hits = [(each(batch.images).argmax(-1) == batch.targets).double() for each in (reference, run)]
        weight = batch.weight.double()
        counts += torch.stack([weight.sum(), *((hit * weight).sum() for hit in hits)])
    images, path, other = counts.tolist()
    top1_path, top1 = 100 * path / images, 100 * other / images
    return {"images": int(images), "top1_path": top1_path, "top1": top1, "loss": top1_path - top1}
