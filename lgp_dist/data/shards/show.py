"""What is in a folder of shards: numbers, a histogram of classes, a contact sheet."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from lgp_dist.data.order import permutation, turns
from lgp_dist.data.shards.index import ShardIndex, read_image
from lgp_dist.data.shards.manifest import ShardManifest
from lgp_dist.errors import UserError
from lgp_dist.files import write_atomic

BARS = 20
"""Classes that the text shows of each split; the JSON has all."""
THUMBNAIL = 96
"""Pixels of a side."""
CAPTION = 12
MAX_IMAGES = 4096


def summarise(manifest: ShardManifest) -> dict[str, Any]:
    """Numbers of a folder of shards, for JSON: see `describe` for the same as text. Raises UserError."""
    return {
        "root": str(manifest.root),
        "source": manifest.source,
        "licence": manifest.licence,
        "classes": len(manifest.classes),
        "splits": {split: _split(manifest, split) for split in manifest.splits},
    }


def _split(manifest: ShardManifest, split: str) -> dict[str, Any]:
    """Numbers of a split."""
    entries = manifest.entries(split)
    if not sum(entry.samples for entry in entries):
        return {"shards": len(entries), "samples": 0, "bytes": sum(entry.bytes for entry in entries), "histogram": {}}
    index = ShardIndex.load(manifest, split, np.iinfo(np.int64).max)
    labels, counts = np.unique(index.label, return_counts=True)
    known = (index.width > 0) & (index.height > 0)
    sides = {"width": index.width[known], "height": index.height[known]}
    per_shard = [entry.samples for entry in entries]
    return {
        "shards": len(entries),
        "samples": len(index),
        "bytes": sum(entry.bytes for entry in entries),
        "samples_per_shard": [min(per_shard), max(per_shard)],
        "image_bytes": {"mean": float(index.size.mean()), "min": int(index.size.min()), "max": int(index.size.max())},
        **{
            side: {"min": int(values.min()), "median": float(np.median(values)), "max": int(values.max())}
            for side, values in sides.items()
            if len(values)
        },
        "histogram": {_name(manifest, int(label)): int(count) for label, count in zip(labels, counts, strict=True)},
    }


def describe(summary: dict[str, Any]) -> str:
    """The numbers as text: a line for each split, then a bar for each class, the rarest and most frequent of many."""
    lines = [f"{summary['root']}: {summary['classes'] or 'unnamed'} classes"]
    lines += [f"  {key}: {summary[key]}" for key in ("source", "licence") if summary[key]]
    for split, found in summary["splits"].items():
        lines.append(
            f"{split}: {found['samples']:,} samples in {found['shards']:,} shards, {found['bytes'] / 1e6:,.1f} MB"
        )
        if not found["samples"]:
            continue
        if "width" in found:
            sides = [f"{found[side]['min']} to {found[side]['max']}" for side in ("width", "height")]
            median = f"{found['width']['median']:.0f} x {found['height']['median']:.0f}"
            lines.append(f"  images: median {median} pixels (width {sides[0]}, height {sides[1]}),")
            lines.append(f"  {found['image_bytes']['mean'] / 1e3:,.1f} KB on average")
        lines += _bars(found["histogram"])
    return "\n".join(lines)


def _bars(histogram: dict[str, int]) -> list[str]:
    """Lines of a histogram."""
    rows = list(histogram.items())
    if len(rows) > BARS:
        ordered = sorted(rows, key=lambda row: row[1])
        rows = [*ordered[: BARS // 2], ("...", 0), *ordered[-BARS // 2 :]]
    most = max(histogram.values())
    return [
        f"  {name[:32]:<32} {count:>9,} {'#' * round(30 * count / most)}" if count else "  ..." for name, count in rows
    ]


def contact_sheet(manifest: ShardManifest, split: str, path: Path, images: int = 64, seed: int = 0) -> None:
    """Writes a PNG of thumbnails with their classes, classes in turn; raises UserError for what cannot be shown.

    split: the first one if empty. An image that does not decode is drawn as a crossed box.
    """
    if not 1 <= images <= MAX_IMAGES:
        raise UserError(f"--images is {images}: set it to 1 .. {MAX_IMAGES}.")
    if path.suffix.lower() != ".png":
        raise UserError(f"--sheet is {path}: give it a name that ends in .png.")
    split = split or next(iter(manifest.splits), "")
    index = ShardIndex.load(manifest, split, np.iinfo(np.int64).max)
    places = _in_turn(index, images, seed)
    columns = int(np.ceil(np.sqrt(len(places))))
    rows = -(-len(places) // columns)
    cell = THUMBNAIL + 4
    sheet = Image.new("RGB", (columns * cell, rows * (cell + CAPTION)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, i in enumerate(places):
        left, top = number % columns * cell + 2, number // columns * (cell + CAPTION) + 2
        try:
            image = ImageOps.contain(read_image(index, i, 3), (THUMBNAIL, THUMBNAIL))
            sheet.paste(image, (left + (THUMBNAIL - image.width) // 2, top + (THUMBNAIL - image.height) // 2))
        except UserError:
            draw.rectangle((left, top, left + THUMBNAIL - 1, top + THUMBNAIL - 1), outline="red")
            draw.line((left, top, left + THUMBNAIL - 1, top + THUMBNAIL - 1), fill="red")
        name = _name(manifest, int(index.label[i])).encode("ascii", "replace").decode()
        draw.text((left, top + THUMBNAIL), name[: THUMBNAIL // 6], fill="black")
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    write_atomic(path, buffer.getvalue())


def _in_turn(index: ShardIndex, count: int, seed: int) -> list[int]:
    """Samples at random, so that each class comes once before one comes twice, ordered by class."""
    order = permutation(len(index), "sheet", seed)
    by_label = order[np.argsort(index.label[order], kind="stable")]
    chosen = np.sort(np.argsort(turns(index.label[by_label]), kind="stable")[:count])
    return by_label[chosen].tolist()


def _name(manifest: ShardManifest, label: int) -> str:
    """Number and name of a class."""
    return f"{label} {manifest.classes[label]}" if 0 <= label < len(manifest.classes) else str(label)
