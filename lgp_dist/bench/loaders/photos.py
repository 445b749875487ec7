"""JPEGs of ImageNet's sizes and bit rate, cut from real photographs: shards to measure loaders on."""

import io
import shutil
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from lgp_dist.data.build.build import build_shards, write_shard
from lgp_dist.data.build.options import BuildOptions
from lgp_dist.data.build.source import Item
from lgp_dist.data.shards.index import write_indexes
from lgp_dist.data.shards.manifest import ShardManifest
from lgp_dist.errors import UserError
from lgp_dist.files import replace_folder

VARIANTS = ("full", "s256")
"""About 500 x 375 at quality 93 to 98; and the same resharded with --short-side 256."""
SIZES = {
    (500, 375): 46,
    (375, 500): 14,
    (500, 333): 12,
    (333, 500): 5,
    (640, 480): 5,
    (400, 300): 5,
    (300, 225): 5,
    (500, 500): 4,
    (1024, 768): 3,
    (1600, 1200): 1,
}
"""Width and height, and their share in per cent."""
QUALITIES = (93, 95, 96, 97, 98)
SMALLEST = 800
"""Photographs with a shorter side are left out, since they would be enlarged."""
LARGEST = 3000
"""Longer photographs are reduced first, since they have little detail per pixel."""
CLASSES = 1000


def find_photographs(folders: Sequence[Path]) -> list[Path]:
    """All JPEGs and PNGs below some folders that are large enough, sorted; UserError if no image is."""
    found = []
    for path in sorted(path for folder in folders for path in folder.rglob("*")):
        if path.suffix.lower() not in (".jpg", ".jpeg", ".png") or not path.is_file():
            continue
        try:
            with Image.open(path) as image:
                if min(image.size) >= SMALLEST:
                    found.append(path.resolve())
        except (OSError, Image.DecompressionBombError):
            continue
    if not found:
        names = ", ".join(map(str, folders))
        raise UserError(
            f"--photos {names} has no photograph of {SMALLEST} pixels or more: name folders that have, such as"
            " /usr/share/backgrounds,/usr/share/wallpapers with Debian's mate-backgrounds and"
            " plasma-workspace-wallpapers."
        )
    return list(dict.fromkeys(found))


def make_photographs(folders: Sequence[Path], out: Path, samples: int, shards: int) -> None:
    """Writes out/full and out/s256, `shards` shards each with manifest and index. Equal inputs give equal bytes.

    UserError where there are no photographs or out exists.
    """
    if out.exists():
        raise UserError(f"--folder {out} exists already: name another, or leave out --photos to use it.")
    sources, per = find_photographs(folders), -(-samples // shards)

    def fill(folder: Path) -> None:
        full, spool = folder / VARIANTS[0], folder / "spool"
        for made in (full, spool):
            made.mkdir()
        with ProcessPoolExecutor() as pool:
            jobs = pool.map(partial(_sample, sources, spool), range(samples), chunksize=max(1, per // 4))
            items = list(tqdm(jobs, "photographs", samples, disable=None))
        starts = range(0, samples, per)
        indexed = [
            write_shard(full / f"photos-train-{number:04d}.tar", items[start : start + per])
            for number, start in enumerate(starts)
        ]
        shutil.rmtree(spool)
        manifest = ShardManifest(full, (), {"train": tuple(shard.entry for shard in indexed)})
        write_indexes(manifest, {"train": indexed})
        build_shards(
            "webdataset", full, folder / VARIANTS[1], BuildOptions(per_shard=per, short_side=256), lambda line: None
        )

    replace_folder(out, fill)


def _sample(sources: Sequence[Path], spool: Path, number: int) -> Item:
    """A JPEG in the folder `spool`: a random part of a photograph, mostly reduced, as in real photo sets.

    Photographs with more detail are drawn more often, so that the files are as large as ImageNet's.
    """
    rng = np.random.default_rng(number)
    weights = np.array([_detail(path) for path in sources])
    chosen = int(rng.choice(len(sources), p=weights / weights.sum()))
    image = _load(sources[chosen])
    shares = np.array(list(SIZES.values())) / sum(SIZES.values())
    width, height = list(SIZES)[int(rng.choice(len(SIZES), p=shares))]
    fit = min(image.width / width, image.height / height)
    zoom = min(max(fit * rng.uniform(0.35, 1.0), 1.0), fit) if fit >= 1 else fit
    left, top = rng.uniform(0, image.width - width * zoom), rng.uniform(0, image.height - height * zoom)
    box = (left, top, left + width * zoom, top + height * zoom)
    quality, subsampling = QUALITIES[int(rng.integers(len(QUALITIES)))], 0 if rng.random() < 0.1 else 2
    content = _jpeg(image.resize((width, height), Image.Resampling.LANCZOS, box), quality, subsampling)
    path = spool / f"{number:08d}.jpg"
    path.write_bytes(content)
    return Item(path.stem, (chosen * 40 + number % 40) % CLASSES, str(path), 0, len(content))


def _jpeg(image: Image.Image, quality: int, subsampling: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, subsampling=subsampling)
    return buffer.getvalue()


@lru_cache(maxsize=64)
def _load(path: Path) -> Image.Image:
    image = Image.open(path).convert("RGB")
    if max(image.size) > LARGEST:
        image.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    return image


@lru_cache(maxsize=1024)
def _detail(path: Path) -> float:
    """Bytes of a photograph as a small JPEG, squared."""
    image = _load(path).copy()
    image.thumbnail((500, 500), Image.Resampling.LANCZOS)
    return float(len(_jpeg(image, 95, 2))) ** 2
