"""The optional decoder of crops against the default one. Skipped where the package is not installed."""

import dataclasses
import importlib.util
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import jpeg, keys_for, photograph
from PIL import Image

from lgp_dist.config.run_config import AugmentConfig, DataConfig
from lgp_dist.data.augment.crops import DRAWS, Crop, random_box
from lgp_dist.data.augment.keyed_random import uniforms
from lgp_dist.data.augment.nvimgcodec import RegionDecoder
from lgp_dist.data.loader import Loader, Plan
from lgp_dist.data.shards.decode import ShardFiles, decode_pixels
from lgp_dist.data.shards.index import ShardIndex
from lgp_dist.errors import UserError

needs_codec = pytest.mark.skipif(
    importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.nvimgcodec") is None,
    reason="nvidia-nvimgcodec is not installed",
)


def shard_of(folder: Path, contents: list[bytes]) -> ShardIndex:
    """An index of images that lie one after the other in a file."""
    path = folder / "x-train-0.tar"
    path.write_bytes(b"".join(contents))
    size = np.array([len(content) for content in contents])
    zeros = np.zeros(len(contents), dtype=np.int64)
    keys = np.array([f"k{number}" for number in range(len(contents))])
    places = zeros, np.cumsum(size) - size, size
    return ShardIndex(folder, (path.name,), *places, zeros, keys, zeros, zeros, zeros - 1, ShardFiles([path]))


@needs_codec
def test_crops_are_those_of_the_whole_image() -> None:
    crop, decoder = Crop(DataConfig(image_size=64, augment=AugmentConfig(crop_scale=(0.08, 1.0)))), RegionDecoder()
    for seed, subsampling in ((0, 0), (1, 2), (2, 1)):
        content = jpeg(photograph(seed, 203, 151), subsampling=subsampling)
        whole = decode_pixels(content, 3, "x").copy()
        for draws in uniforms(keys_for(6, f"region{seed}"), DRAWS).tolist():
            left, top, w, h = random_box(203, 151, (0.08, 1.0), draws)
            found = decoder.crop(content, crop, draws)
            assert found is not None
            error = abs(found.astype(int) - whole[top : top + h, left : left + w])
            assert np.quantile(error, 0.99) <= 1 and error[2:-2, 2:-2].max() <= 1


@needs_codec
def test_what_it_does_not_read_goes_to_the_other_decoder(tmp_path: Path) -> None:
    """PNG, grey, CMYK and JPEG in one batch, with both decoders and with threads."""
    image = photograph(4, 90, 70)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    contents = [jpeg(image), buffer.getvalue(), jpeg(image.convert("L")), jpeg(image.convert("CMYK"))]
    index, keys = shard_of(tmp_path, contents), keys_for(4)
    data = DataConfig(image_size=48, threads=0, interpolation="bilinear")
    found = {}
    for decoder in ("simplejpeg", "nvimgcodec"):
        for threads in (0, 2):
            config = dataclasses.replace(data, decoder=decoder, threads=threads)
            loader = Loader(index, config, torch.device("cpu"))
            found[decoder, threads] = next(loader.load([Plan(np.arange(4), keys)])).images.clone().int()
    first = found["simplejpeg", 0]
    assert first.shape == (4, 3, 48, 48) and all((images - first).abs().max() <= 2 for images in found.values())
    assert all(torch.equal(found[decoder, 0], found[decoder, 2]) for decoder, _ in found)
    assert abs(np.asarray(Image.open(io.BytesIO(contents[1]))).astype(int) - np.asarray(image)).max() == 0


def test_decoder_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lgp_dist.data.augment.nvimgcodec._MODULE", "nvidia.no_such_codec")
    with pytest.raises(UserError, match="data.decoder is nvimgcodec, which is not installed: run"):
        RegionDecoder()
