"""Images per CPU second of this project's loader and of others on generated photographs, each in its own process."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from lgp_dist.bench.common import check_least, facts, spread
from lgp_dist.bench.loaders.photos import VARIANTS, make_photographs
from lgp_dist.bench.sampler import listed, parse_names
from lgp_dist.data.shards.manifest import ShardManifest
from lgp_dist.errors import UserError

BASE = "webdataset"
"""The loader that others are divided by."""
NEEDS = {
    "webdataset": "webdataset",
    "timm": "timm",
    "dali": "nvidia.dali",
    "lgp": "simplejpeg",
    "lgp-nvimgcodec": "nvidia.nvimgcodec",
}
"""Loaders, in the order of their turns -> the module that each needs."""
COLUMNS = (("data", "loader", "images_per_cpu_second", "ratio", "spread"),)
TIMEOUT_S = 3600
"""A loader that takes longer for one pass, in seconds, fails."""


def installed(loader: str) -> bool:
    """Whether the package that a loader needs can be imported."""
    try:
        return importlib.util.find_spec(NEEDS[loader]) is not None
    except ModuleNotFoundError:
        return False


def bench_data(
    folder: Path,
    photos: str = "",
    samples: int = 4000,
    loaders: str = "",
    threads: int = 2,
    batch: int = 128,
    repeats: int = 3,
) -> list[dict[str, Any]]:
    """One object for each kind of file (full, s256) and loader.

    images_per_cpu_second: median over `repeats` rounds in which the loaders take turns; CPU seconds are those of the
    process and its workers without imports. spread: (fastest - slowest) / median. ratio: to webdataset's canonical
    pipeline in the same rounds.

    folder: of the photographs; they are made if `photos` names folders. photos, loaders: separated by commas; no loader
    for all that are installed. UserError for options that are out of range or name nothing.
    """
    chosen = _check(loaders, samples, threads, batch, repeats)
    if photos:
        sources = [Path(part) for part in listed(photos)]
        make_photographs(sources, folder, samples, max(1, min(8, samples // batch)))
    elif not all((folder / variant).is_dir() for variant in VARIANTS):
        raise UserError(f"--folder {folder} has no photographs: make them with --photos FOLDER_OF_PHOTOGRAPHS.")
    about, rows = facts(), []
    sizes = {variant: _sizes(folder / variant) for variant in VARIANTS}
    for variant in VARIANTS:
        rates = _rates(folder / variant, chosen, threads, batch, repeats)
        middle = {loader: median(values) for loader, values in rates.items()}
        for loader in chosen:
            base = middle.get(BASE)
            rows.append(
                {
                    "loader": loader,
                    "data": variant,
                    "images_per_cpu_second": round(middle[loader], 1),
                    "ratio": round(middle[loader] / base, 3) if base else None,
                    "spread": spread(rates[loader]),
                    **sizes[variant],
                    "threads": threads,
                    "batch": batch,
                    "repeats": repeats,
                    **about,
                }
            )
    return rows


def _check(loaders: str, samples: int, threads: int, batch: int, repeats: int) -> tuple[str, ...]:
    """The loaders to measure; UserError for an option that is out of range or names no loader."""
    for option, value in (("--samples", samples), ("--threads", threads), ("--batch", batch), ("--repeats", repeats)):
        check_least(option, value, 1)
    asked = parse_names("--loaders", loaders, NEEDS)
    for loader in asked:
        if not installed(loader):
            raise UserError(f"--loaders names {loader!r}, which needs {NEEDS[loader]}: install it, or leave it out.")
    return asked or tuple(loader for loader in NEEDS if installed(loader))


def _rates(folder: Path, loaders: Sequence[str], threads: int, batch: int, repeats: int) -> dict[str, list[float]]:
    """Images per CPU second of each loader in each round."""
    rates: dict[str, list[float]] = {loader: [] for loader in loaders}
    for turn in range(repeats):
        for loader in loaders:
            found = _run(loader, folder, threads, batch)
            rates[loader].append(found["images"] / found["cpu_s"])
            rate = f"{rates[loader][-1]:.0f} images per CPU second"
            sys.stderr.write(f"{folder.name}, round {turn + 1}, {loader}: {rate}\n")
    return rates


def _run(loader: str, folder: Path, threads: int, batch: int) -> dict[str, float]:
    """One pass in a process of its own, its libraries with one thread each; UserError where it fails."""
    command = [sys.executable, "-m", "lgp_dist.bench.loaders.loaders", loader, str(folder), str(threads), str(batch)]
    single = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    try:
        done = subprocess.run(
            command, env=os.environ | single, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise UserError(f"Loader {loader} took more than {TIMEOUT_S} s: take fewer --samples.") from error
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1].rstrip(".")
        raise UserError(f"Loader {loader} failed on {folder} ({last}): leave it out with --loaders.")
    return json.loads(lines[-1])


def _sizes(folder: Path) -> dict[str, Any]:
    """How many images the shards have and their mean bytes in the tar."""
    entries = ShardManifest.load(folder).entries("train")
    images = sum(entry.samples for entry in entries)
    return {"images": images, "mean_bytes": round(sum(entry.bytes for entry in entries) / images)}
