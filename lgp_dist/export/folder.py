"""An exported descendant: a folder of formats, each compared with the model in memory before it counts."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lgp_dist.config.run_config import ExportConfig
from lgp_dist.errors import UserError
from lgp_dist.export.card import model_card
from lgp_dist.export.formats import FORMATS, wanted
from lgp_dist.files import write_json
from lgp_dist.protocols import Batch
from lgp_dist.run.tensors import save_tensors


@dataclass(frozen=True)
class Exported:
    """What a folder is written from."""

    model: nn.Module
    """On the CPU, in eval mode."""
    config: dict[str, Any]
    """config.json: `models.descendant.exported_config`."""
    facts: dict[str, Any]
    """key, params, flops, top1 and top5 (percent), and what `latency.with_latencies` adds."""
    origin: dict[str, str]
    """Where the weights come from, in words -> id or hash."""


def write_folder(
    folder: Path,
    exported: Exported,
    settings: ExportConfig,
    batches: Callable[[int], Iterable[Batch]],
    reference: Callable[[Tensor], Tensor],
) -> dict[str, Any]:
    """Writes every format into an empty folder, compares each on real images, and returns what verify.json says.

    batches: a number of images to that many, as batches. reference: what the logits must equal. UserError where a
    format differs by more than its bound; the folder is then to be removed.
    """
    save_tensors(folder / "model.safetensors", exported.model.state_dict())
    names, left_out = wanted(settings.formats)
    write_json(folder / "config.json", exported.config)
    pair = next(iter(batches(1))).images[:1].repeat(2, 1, 1, 1)  # a batch of one would be taken for a constant
    for name in names:
        FORMATS[name].write(exported.model, pair, folder)
    images = int(sum(batch.weight.sum() for batch in batches(settings.images)))
    verdict: dict[str, Any] = {"images": images, "formats": {}, "left_out": left_out}
    for name in names:
        run, bound = FORMATS[name].open(folder), FORMATS[name].bound
        difference = largest_difference(run, reference, batches(settings.images))
        verdict["formats"][name] = {"file": FORMATS[name].file, "largest_difference": difference, "bound": bound}
        if bound is not None and not difference <= bound:
            advice = f"leave {name} out of --export.formats, and report it" if name in settings.formats else "report it"
            raise UserError(
                f"{FORMATS[name].file} of {exported.facts['key']} differs from its path by {difference:.3g}, above "
                f"{bound:g}, so nothing was exported: {advice}."
            )
    if "int8" in names:
        verdict["int8"] = _accuracy_loss(reference, FORMATS["int8"].open(folder), batches(settings.int8_images))
    write_json(folder / "verify.json", verdict)
    (folder / "README.md").write_text(model_card(exported.config, exported.facts, exported.origin, verdict))
    return verdict


def told(verdict: dict[str, Any]) -> list[str]:
    """What a person should hear of a verdict: the largest differences, what int8 loses, and what was left out."""
    files = verdict["formats"].values()
    found = ", ".join(f"{each['file']} {each['largest_difference']:.2g}" for each in files if each["bound"] is not None)
    lines = [f"largest difference of a logit on {verdict['images']} images: {found}"]
    if int8 := verdict.get("int8"):
        lines.append(
            f"int8: top-1 {int8['top1']:.2f} % where the path has {int8['top1_path']:.2f} %, {int8['loss']:.2f} points "
            f"lost, on {int8['images']} images"
        )
    return [*lines, verdict["left_out"]] if verdict["left_out"] else lines


@torch.no_grad()
def largest_difference(
    run: Callable[[Tensor], Tensor], reference: Callable[[Tensor], Tensor], batches: Iterable[Batch]
) -> float:
    """Largest difference of a logit; each batch is run whole, and its first image alone. NaN differs from anything."""
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
) -> dict[str, float]:
    """Top-1 of both in percent, on the same images, and what the second loses."""
    counts = torch.zeros(3, dtype=torch.float64)
    for batch in batches:
        hits = [(each(batch.images).argmax(-1) == batch.targets).double() for each in (reference, run)]
        weight = batch.weight.double()
        counts += torch.stack([weight.sum(), *((hit * weight).sum() for hit in hits)])
    images, path, other = counts.tolist()
    top1_path, top1 = 100 * path / images, 100 * other / images
    return {"images": int(images), "top1_path": top1_path, "top1": top1, "loss": top1_path - top1}
