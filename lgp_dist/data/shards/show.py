"""What is in a folder of shards: numbers, a histogram of classes, a contact sheet."""

import io
from pathlib import Path
from typing import TypedDict

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from lgp_dist.data.order import nth_of_class, permutation
from lgp_dist.data.shards.account import class_lines, shown
from lgp_dist.data.shards.index import ShardIndex, read_image
from lgp_dist.data.shards.manifest import ShardManifest
from lgp_dist.errors import UserError
from lgp_dist.files import write_atomic

BARS = 20
"""Classes that the text shows of each split; the JSON has all."""
THUMBNAIL, MARGIN, CAPTION = 96, 2, 12
"""Pixels: side of a thumbnail, border around it, height of the text below it."""
MAX_IMAGES = 4096


class SplitSummary(TypedDict, total=False):
    """Numbers of a split. One without samples has none about images; width and height are missing where unknown."""

    shards: int
    samples: int
    bytes: int
    samples_per_shard: list[int]
    """Fewest and most."""
    image_bytes: dict[str, float]
    """mean, min and max."""
    width: dict[str, float]
    """min, median and max, pixels."""
    height: dict[str, float]
    histogram: dict[str, int]
    """Class -> samples."""


def summarise(manifest: ShardManifest) -> dict[str, SplitSummary]:
    """The numbers of each split; raises UserError."""
    return {split: _summarise(manifest, split) for split in manifest.splits}


def _summarise(manifest: ShardManifest, split: str) -> SplitSummary:
    entries = manifest.entries(split)
    lengths = [entry.samples for entry in entries]
    found = SplitSummary(shards=len(entries), samples=sum(lengths), bytes=sum(entry.bytes for entry in entries))
    if not sum(lengths):
        return found | SplitSummary(histogram={})
    index = ShardIndex.load(manifest, split, np.iinfo(np.int64).max)
    found["samples_per_shard"] = [min(lengths), max(lengths)]
    size = index.size
    found["image_bytes"] = {"mean": float(size.mean()), "min": int(size.min()), "max": int(size.max())}
    known = (index.width > 0) & (index.height > 0)
    if known.any():
        found["width"], found["height"] = _spread(index.width[known]), _spread(index.height[known])
    labels, counts = (values.tolist() for values in np.unique(index.label, return_counts=True))
    found["histogram"] = {_name(manifest, label): count for label, count in zip(labels, counts, strict=True)}
    return found


def _spread(values: np.ndarray) -> dict[str, float]:
    return {"min": int(values.min()), "median": float(np.median(values)), "max": int(values.max())}


def describe(manifest: ShardManifest, splits: dict[str, SplitSummary]) -> str:
    """The numbers as text: a line for each split, then a bar for each class, the rarest and most frequent of many."""
    lines = [f"{manifest.root}: {len(manifest.classes) or 'unnamed'} classes"]
    lines += [f"  {name}: {text}" for name in ("source", "licence") if (text := getattr(manifest, name))]
    for split, found in splits.items():
        lines.append(
            f"{split}: {found['samples']:,} samples in {found['shards']:,} shards, {found['bytes'] / 1e6:,.1f} MB"
        )
        if "width" in found:
            width, height = found["width"], found["height"]
            lines += [
                f"  images: median {width['median']:.0f} x {height['median']:.0f} pixels (width {width['min']} to"
                f" {width['max']}, height {height['min']} to {height['max']}),",
                f"  {found['image_bytes']['mean'] / 1e3:,.1f} KB on average",
            ]
        if found["samples"]:
            lines += _bars(found["histogram"])
        if problems := [problem for entry in manifest.entries(split) if (problem := manifest.problem(entry))]:
            lines.append(f"  {len(problems)} of {found['shards']} shards are not as the manifest says: {problems[0]}")
    return "\n".join(lines)


def class_report(manifest: ShardManifest, splits: dict[str, SplitSummary]) -> list[str]:
    """Lines for the classes that have no images, in all splits or in one."""
    labels = {split: [int(name.partition(" ")[0]) for name in found["histogram"]] for split, found in splits.items()}
    return class_lines(labels, manifest.classes)


def _bars(histogram: dict[str, int]) -> list[str]:
    """Lines of a histogram: the rarest and the most frequent classes where there are many."""
    rows = list(histogram.items())
    if len(rows) > BARS:
        ordered = sorted(rows, key=lambda row: row[1])
        rows = [*ordered[: BARS // 2], ("...", 0), *ordered[-BARS // 2 :]]
    most = max(histogram.values())
    return [
        f"  {shown(name)[:32]:<32} {count:>9,} {'#' * round(30 * count / most)}" if count else "  ..."
        for name, count in rows
    ]


def contact_sheet(manifest: ShardManifest, split: str, path: Path, images: int = 64, seed: int = 0) -> None:
    """Writes a PNG of thumbnails with their classes, equally many of each class; raises UserError.

    split: the first one if empty. An image that does not decode is drawn as a crossed box.
    """
    if not 1 <= images <= MAX_IMAGES:
        raise UserError(f"--images is {images}: set it to 1 .. {MAX_IMAGES}.")
    if path.suffix.lower() != ".png":
        raise UserError(f"--sheet is {path}: give it a name that ends in .png.")
    split = split or next(iter(manifest.splits), "")
    index = ShardIndex.load(manifest, split, np.iinfo(np.int64).max)
    samples = _of_all_classes(index, images, seed)
    columns = int(np.ceil(np.sqrt(len(samples))))
    width, height = THUMBNAIL + 2 * MARGIN, THUMBNAIL + 2 * MARGIN + CAPTION
    sheet = Image.new("RGB", (columns * width, -(-len(samples) // columns) * height), "white")
    draw = ImageDraw.Draw(sheet)
    for number, i in enumerate(samples):
        left, top = number % columns * width + MARGIN, number // columns * height + MARGIN
        try:
            image = ImageOps.contain(read_image(index, i, 3), (THUMBNAIL, THUMBNAIL))
            sheet.paste(image, (left + (THUMBNAIL - image.width) // 2, top + (THUMBNAIL - image.height) // 2))
        except UserError:
            box = (left, top, left + THUMBNAIL - 1, top + THUMBNAIL - 1)
            draw.rectangle(box, outline="red")
            draw.line(box, fill="red")
        name = _name(manifest, int(index.label[i])).encode("ascii", "replace").decode()
        draw.text((left, top + THUMBNAIL), name[: THUMBNAIL // 6], fill="black")
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    write_atomic(path, buffer.getvalue())


def _of_all_classes(index: ShardIndex, count: int, seed: int) -> list[int]:
    """Random samples, each class once before any class twice, ordered by class."""
    order = permutation(len(index), "sheet", seed)
    by_label = order[np.argsort(index.label[order], kind="stable")]
    chosen = np.sort(np.argsort(nth_of_class(index.label[by_label]), kind="stable")[:count])
    return by_label[chosen].tolist()


def _name(manifest: ShardManifest, label: int) -> str:
    """Number and name of a class."""
    return f"{label} {manifest.classes[label]}" if 0 <= label < len(manifest.classes) else str(label)
