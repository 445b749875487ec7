"""Crops, operations and mixing against timm, torchvision and Pillow with the same numbers."""

import math
import random

import numpy as np
import pytest
import timm.data.auto_augment as timm_ops
import torch
from data_helpers import jpeg, keys_for, photograph
from PIL import Image
from timm.data import create_transform
from timm.data.mixup import mixup_target, rand_bbox
from timm.data.random_erasing import RandomErasing
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as vision

from lgp_dist.config.run_config import AugmentConfig, DataConfig, TrainConfig
from lgp_dist.data.augment.crops import DRAWS, Crop, random_box
from lgp_dist.data.augment.keyed_random import betas, device_normals, sample_keys, uniforms
from lgp_dist.data.augment.mixing import Mixer
from lgp_dist.data.augment.pixels import Pixels, erase_box
from lgp_dist.data.augment.randaugment import GEOMETRY, NAMES, OPS, RandAugment, apply_op, colour_jitter
from lgp_dist.data.shards.decode import decode_image, decode_pixels
from lgp_dist.errors import UserError
from lgp_dist.recipes import RECIPES

CPU = torch.device("cpu")
GREY = DataConfig(image_size=28, channels=1, mean=(0.3,), std=(0.4,), crop_pct=1.0)
FILL = torch.tensor([124.0, 116.0, 104.0])


# Numbers


def test_keys_and_uniforms() -> None:
    """Another purpose, seed, epoch or sample gives other numbers; they are uniform and uncorrelated."""
    epochs, samples = np.arange(4).repeat(25_000), np.tile(np.arange(25_000), 4)
    keys = sample_keys("a", 0, epochs, samples)
    assert len(set(keys.tolist())) == 100_000
    assert not set(keys.tolist()) & set(sample_keys("b", 0, epochs, samples).tolist())
    assert not set(keys.tolist()) & set(sample_keys("a", 1, epochs, samples).tolist())
    drawn = uniforms(keys, 4)
    assert drawn.min() >= 0 and drawn.max() < 1
    for column in drawn.T:
        counts = np.histogram(column, 100, (0, 1))[0]
        assert ((counts - 1000) ** 2 / 1000).sum() < 170  # 99 free; p < 1e-5
    assert abs(np.corrcoef(drawn.T) - np.eye(4)).max() < 0.02
    assert abs(np.corrcoef(drawn[:-1, 0], drawn[1:, 0])[0, 1]) < 0.02
    assert np.array_equal(uniforms(keys[7:9], 2), drawn[7:9, :2])


def test_first_numbers_of_splitmix() -> None:
    """From state 0 the published generator gives 0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4."""
    expected = [(number >> 11) * 2.0**-53 for number in (0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4)]
    assert uniforms(np.zeros(1, np.uint64), 2)[0].tolist() == expected


@pytest.mark.parametrize("alpha", [0.2, 0.8, 1.0, 4.0])
def test_betas_against_numpy(alpha: float) -> None:
    """Kolmogorov-Smirnov distance to equally many numbers of NumPy: p < 1e-4 at 2.2 sqrt(2 / n)."""
    found, truth = np.sort(betas(keys_for(40_000), alpha)), np.sort(np.random.default_rng(0).beta(alpha, alpha, 40_000))
    grid = np.linspace(0, 1, 501)
    distance = abs(np.searchsorted(found, grid) - np.searchsorted(truth, grid)).max() / 40_000
    assert distance < 2.2 * math.sqrt(2 / 40_000)


def test_device_normals() -> None:
    found = device_normals(torch.from_numpy(keys_for(200).view(np.int64)), 1000).double()
    assert found.mean().abs() < 0.01 and (found.std() - 1).abs() < 0.01
    assert (found.pow(4).mean() - 3).abs() < 0.1
    assert (found[:-1] * found[1:]).mean().abs() < 0.01 and (found[:, :-1] * found[:, 1:]).mean().abs() < 0.01


# Decoding and crops


@pytest.mark.slow
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_quality_of_crops_is_that_of_pillow(interpolation: str) -> None:
    """Decoded and randomly cropped photographs: the median error to Pillow is 1 level, the median PSNR above 60 dB."""
    crop = Crop(DataConfig(image_size=224, interpolation=interpolation, augment=AugmentConfig(crop_scale=(0.08, 1.0))))
    resample = vision.InterpolationMode(interpolation)
    noise, middles = [], []
    for seed, (width, height) in enumerate([(500, 375), (375, 500), (640, 480), (300, 225), (800, 600), (256, 341)]):
        content = jpeg(photograph(seed, width, height), subsampling=2 if seed % 3 else 0)
        pixels, out = decode_pixels(content, 3, "x").copy(), torch.empty(1, 224, 224, 3, dtype=torch.uint8)
        for draws in uniforms(keys_for(4, f"crop{seed}"), DRAWS).tolist():
            crop.random(pixels, draws, out.permute(0, 3, 1, 2))
            left, top, w, h = random_box(width, height, (0.08, 1.0), draws)
            truth = vision.resized_crop(decode_image(content, 3, "x"), top, left, h, w, [224, 224], resample)
            error = out[0].numpy().astype(float) - np.asarray(truth)
            middles.append(np.quantile(abs(error), 0.99))
            noise.append(10 * math.log10(255**2 / max((error**2).mean(), 1e-9)))
    assert np.median(noise) > 60 and max(middles) <= 1


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGB"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_kind_of_jpeg_is_read_as_pillow_does(mode: str, channels: int) -> None:
    content = jpeg(photograph(1, 90, 60).convert(mode), subsampling=0)
    found = decode_pixels(content, channels, "x")
    truth = np.asarray(decode_image(content, channels, "x")).reshape(60, 90, channels)
    assert found.shape == truth.shape and abs(found.astype(int) - truth).max() <= 1


def test_random_boxes_are_those_of_torchvision() -> None:
    """Area, ratio and place have torchvision's distribution: means of 4,000 boxes agree within five standard errors."""
    size, scale = (300, 200), (0.2, 0.9)
    ours = np.array([random_box(*size, scale, draws) for draws in uniforms(keys_for(4000), DRAWS).tolist()], float)
    torch.manual_seed(0)
    image = torch.empty(1, size[1], size[0])
    theirs = [RandomResizedCrop.get_params(image, list(scale), [3 / 4, 4 / 3]) for _ in range(4000)]
    truth = np.array([(left, top, w, h) for top, left, h, w in theirs], float)
    for mine, other in ((ours, truth), (ours[:, 2:] ** 2, truth[:, 2:] ** 2)):
        error = np.sqrt((mine.var(0) + other.var(0)) / 4000)
        assert (abs(mine.mean(0) - other.mean(0)) < 5 * error).all()
    for width, height in ((1000, 10), (10, 1000), (1, 1)):
        left, top, w, h = random_box(width, height, (0.9, 1.0), uniforms(keys_for(1), DRAWS)[0].tolist())
        assert 0 <= left <= width - w and 0 <= top <= height - h and w > 0 < h


@pytest.mark.parametrize(("width", "height"), [(90, 60), (60, 90), (64, 64), (57, 40)])
@pytest.mark.parametrize(("pct", "interpolation"), [(0.875, "bicubic"), (0.9, "bilinear"), (1.0, "bicubic")])
def test_evaluation_is_that_of_timm(width: int, height: int, pct: float, interpolation: str) -> None:
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    data = DataConfig(image_size=32, crop_pct=pct, interpolation=interpolation, mean=mean, std=std)
    image = photograph(3, width, height)
    out = torch.empty(1, 32, 32, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    Crop(data).centre(np.array(image), out)
    found = Pixels(data, CPU).normalise(out)[0]
    truth = create_transform(32, is_training=False, interpolation=interpolation, mean=mean, std=std, crop_pct=pct)(
        image
    )
    assert ((found - truth).abs().amax((1, 2)) <= 1.01 / 255 / torch.tensor(std)).all()


# Augmentation on the device


def test_normalisation_against_numpy() -> None:
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (4, 1, 28, 28), dtype=np.uint8))
    assert np.allclose(Pixels(GREY, CPU).normalise(images).numpy(), (images.numpy() / 255 - 0.3) / 0.4, atol=1e-6)


def test_flips_half_of_the_samples() -> None:
    data = DataConfig(image_size=16, channels=1, mean=(0.0,), std=(1.0,))
    images = torch.randint(0, 256, (400, 1, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = Pixels(data, CPU).augment(images.clone(), keys_for(400)) * 255
    flipped = [torch.allclose(a, b.flip(-1).float(), atol=1e-3) for a, b in zip(found, images, strict=True)]
    straight = [torch.allclose(a, b.float(), atol=1e-3) for a, b in zip(found, images, strict=True)]
    assert [not a for a in flipped] == straight and 150 < sum(flipped) < 250


TIMM = {
    "autocontrast": (timm_ops.auto_contrast, 0.0),
    "equalize": (timm_ops.equalize, 0.0),
    "invert": (timm_ops.invert, 0.0),
    "posterize": (timm_ops.posterize, 2),
    "solarize": (timm_ops.solarize, 77),
    "solarize_add": (timm_ops.solarize_add, 55),
    "colour": (timm_ops.color, 1.63),
    "contrast": (timm_ops.contrast, 0.37),
    "brightness": (timm_ops.brightness, 1.4),
    "sharpness": (timm_ops.sharpness, 1.8),
    "rotate": (timm_ops.rotate, -17.0),
    "shear_x": (timm_ops.shear_x, 0.21),
    "shear_y": (timm_ops.shear_y, -0.3),
    "shift_x": (timm_ops.translate_x_rel, 0.3),
    "shift_y": (timm_ops.translate_y_rel, -0.17),
}
"""Our name -> timm's function, and a level."""


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("channels", [1, 3])
def test_operations_are_those_of_timm(name: str, channels: int) -> None:
    """Within 1 level; operations that resample, within 2 in 99 % of the pixels (Pillow rounds its coefficients)."""
    call, level = TIMM[name]
    images = [photograph(seed, 48, 48).convert("L" if channels == 1 else "RGB") for seed in range(3)]
    pixels = torch.from_numpy(np.stack([np.array(image).reshape(48, 48, channels) for image in images])).permute(
        0, 3, 1, 2
    )
    fill = (124, 116, 104)[:channels]
    found = apply_op(name, pixels, torch.full((3,), float(level)), FILL[:channels]).numpy()
    more = {"resample": Image.BILINEAR, "fillcolor": fill if channels == 3 else fill[0]} if name in GEOMETRY else {}
    for mine, image in zip(found, images, strict=True):
        truth = call(image, *([] if name in ("autocontrast", "equalize", "invert") else [level]), **more)
        truth = np.asarray(truth, dtype=int).reshape(48, 48, channels)
        error = abs(mine.transpose(1, 2, 0).astype(int) - truth)
        assert np.quantile(error, 0.99) <= 2 if name in GEOMETRY else error.max() <= 1


def test_levels_are_those_of_timm() -> None:
    """For whole magnitudes and both rules; the sign, which timm draws, is an argument here."""
    functions = {
        "rotate": timm_ops._rotate_level_to_arg,
        "shear_x": timm_ops._shear_level_to_arg,
        "shift_x": timm_ops._translate_rel_level_to_arg,
        "solarize_add": timm_ops._solarize_add_level_to_arg,
    }
    rules = {
        True: {
            "posterize": timm_ops._posterize_increasing_level_to_arg,
            "solarize": timm_ops._solarize_increasing_level_to_arg,
            "colour": timm_ops._enhance_increasing_level_to_arg,
        },
        False: {
            "posterize": timm_ops._posterize_level_to_arg,
            "solarize": timm_ops._solarize_level_to_arg,
            "colour": timm_ops._enhance_level_to_arg,
        },
    }
    for increasing, more in rules.items():
        for name, call in (functions | more).items():
            for level in range(11):
                values = {call(level, {})[0] for _ in range(30)}
                signs = np.array([-1.0, 1.0])
                found = RandAugment(increasing=increasing).levels([name] * 2, np.full(2, level / 10), signs)
                assert {round(v, 9) for v in values} <= {round(v, 9) for v in found.tolist()}, (name, level)


def test_timm_has_the_same_operations() -> None:
    assert len(NAMES) == len(timm_ops._RAND_INCREASING_TRANSFORMS) == len(timm_ops._RAND_TRANSFORMS) == len(TIMM)
    assert {name for name, operation in OPS.items() if operation is None} == set(GEOMETRY)


def test_each_of_equal_images_has_its_own_augmentation() -> None:
    """Each of 16 equal images has its own result (torchvision's v2 gives all the same), which its key alone decides."""
    data = DataConfig(augment=AugmentConfig(auto_augment="rand-m9-mstd0.5-inc1", random_erase=0.25), image_size=32)
    one = torch.from_numpy(np.array(photograph(5, 32, 32))).permute(2, 0, 1)
    keys, pixels = keys_for(64), Pixels(data, CPU)
    found = pixels.augment(one.expand(64, -1, -1, -1).clone(), keys)
    assert len({image.numpy().tobytes() for image in found}) > 50
    order = np.random.default_rng(0).permutation(64)[:17]
    assert torch.equal(pixels.augment(one.expand(17, -1, -1, -1).clone(), keys[order]), found[order])
    other = pixels.augment(one.expand(64, -1, -1, -1).clone(), keys_for(64, epoch=1))
    assert sum(torch.equal(a, b) for a, b in zip(found, other, strict=True)) < 12


def test_share_of_operations() -> None:
    """Half of the layers apply nothing, 1/30 each of the 15 operations: within 5 standard errors of 8,000."""
    counts: dict[str, int] = {}
    images = torch.zeros(4000, 1, 3, 3, dtype=torch.uint8)

    class Counting(RandAugment):
        def levels(self, names: list[str], *rest: np.ndarray) -> np.ndarray:
            for name in names:
                counts[name] = counts.get(name, 0) + 1
            return super().levels([""] * len(names), *rest) * 0 + 1

    Counting(increasing=True)(images, keys_for(4000), torch.zeros(1))
    assert counts[""] == pytest.approx(4000, abs=5 * 45)
    assert all(counts[name] == pytest.approx(8000 / 30, abs=5 * 16) for name in NAMES)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rand-m9-mstd0.5-inc1", RandAugment(9, 0.5, 2, 0.5, True)),
        ("rand-m7-n3-p0.25", RandAugment(7, 0, 3, 0.25, False)),
        ("rand", RandAugment()),
    ],
)
def test_names_of_policies(text: str, expected: RandAugment) -> None:
    assert RandAugment.parse(text) == expected


def test_colour_jitter_against_torchvision() -> None:
    """Equal to torchvision with the same factors in the same order; brightness stays in range."""
    keys = keys_for(6)
    images = torch.from_numpy(np.stack([np.array(photograph(seed, 40, 40)) for seed in range(6)])).permute(0, 3, 1, 2)
    found = colour_jitter(images.clone(), 0.4, keys)
    calls = (vision.adjust_brightness, vision.adjust_contrast, vision.adjust_saturation)
    for row, image, mine in zip(uniforms(keys, 6), images, found, strict=True):
        truth = Image.fromarray(image.permute(1, 2, 0).numpy())
        for kind in np.argsort(row[:3]).tolist():
            truth = calls[kind](truth, 0.6 + 0.8 * row[3 + kind])
        assert abs(mine.permute(1, 2, 0).numpy().astype(int) - np.asarray(truth)).max() <= 1


def test_erasing_is_that_of_timm() -> None:
    """Share of erased images and their area as in timm; noise inside, no change outside."""
    data = DataConfig(
        image_size=32, channels=1, mean=(0.5,), std=(0.5,), augment=AugmentConfig(hflip=0, random_erase=0.25)
    )
    plain = torch.full((4000, 1, 32, 32), 200, dtype=torch.uint8)
    found = Pixels(data, CPU).augment(plain.clone(), keys_for(4000))
    changed = (found - (200 / 255 - 0.5) / 0.5).abs() > 1e-5
    areas = changed.flatten(1).float().mean(1)
    random.seed(0), torch.manual_seed(0)
    theirs = RandomErasing(0.25, mode="pixel", device="cpu")(torch.full((4000, 1, 32, 32), 0.5))
    truth = (theirs != 0.5).flatten(1).float().mean(1)
    assert (areas > 0).float().mean() == pytest.approx(0.25, abs=0.03)
    assert areas[areas > 0].mean() == pytest.approx(float(truth[truth > 0].mean()), abs=0.02)
    noise = found[changed]
    assert noise.mean().abs() < 0.05 and (noise.std() - 1).abs() < 0.05
    assert erase_box(32, 32, [1.0, 1.0, 0.5] * 10) == (0, 0, 0, 0)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"channels": 2}, "data.channels is 2"),
        ({"mean": (0.1, 0.2, 0.3)}, "data.mean has 3 values, but data.channels is 1"),
        ({"std": (0.0,)}, "data.std"),
        ({"crop_pct": 0.0}, "data.crop_pct is 0.0"),
        ({"image_size": 0}, "data.image_size is 0"),
        ({"augment": AugmentConfig(crop_scale=(0.9, 0.5))}, "data.augment.crop_scale"),
        ({"augment": AugmentConfig(auto_augment="foo")}, "data.augment.auto_augment 'foo'"),
        ({"augment": AugmentConfig(auto_augment="rand-m11")}, "data.augment.auto_augment 'rand-m11'"),
        ({"augment": AugmentConfig(auto_augment="rand-w0")}, "rand-w0"),
    ],
)
def test_bad_values_have_a_sentence(change: dict, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        Pixels(DataConfig(**{**vars(GREY), **change}), CPU)


# Mixing


def test_no_mixing_leaves_labels() -> None:
    images, labels = torch.rand(3, 1, 4, 4), torch.tensor([0, 2, 1])
    out, targets = Mixer(TrainConfig(), 3)(images.clone(), labels, keys_for(3))
    assert torch.equal(out, images) and targets is labels


def test_smoothing_alone() -> None:
    images, labels = torch.rand(3, 1, 4, 4), torch.tensor([0, 2, 1])
    out, targets = Mixer(TrainConfig(label_smoothing=0.3), 3)(images.clone(), labels, keys_for(3))
    assert torch.equal(out, images) and targets.dtype == torch.float32
    assert np.allclose(targets.numpy(), 0.7 * np.eye(3)[[0, 2, 1]] + 0.1)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_mixup_mixes_images_and_labels_by_the_same_share(smoothing: float) -> None:
    """Each image mixes with its neighbour by its own share; for equal shares, targets are timm's."""
    images, labels = torch.rand(6, 1, 8, 8), torch.tensor([0, 1, 2, 3, 1, 0])
    out, targets = Mixer(TrainConfig(mixup=0.8, label_smoothing=smoothing), 4)(images.clone(), labels, keys_for(6))
    partner = [1, 0, 3, 2, 5, 4]
    shares = []
    for i in range(6):
        lam = (float(targets[i, labels[i]]) - smoothing / 4) / (1 - smoothing)
        shares.append(lam)
        assert torch.allclose(out[i], lam * images[i] + (1 - lam) * images[partner[i]], atol=1e-5)
        pair = mixup_target(labels[[i, partner[i]]], 4, lam, smoothing)  # timm's partner is the mirror place
        assert torch.allclose(targets[i], pair[0], atol=1e-5)
    assert len({round(share, 5) for share in shares}) == 6


def test_cutmix_label_share_is_the_share_of_pixels() -> None:
    """On constant images the mean shows how much is left. The mean area is that of timm's boxes."""
    count = 2000
    images = torch.zeros(count, 1, 16, 16)
    images[1::2] = 1
    out, targets = Mixer(TrainConfig(cutmix=1.0), 2)(images, torch.arange(count) % 2, keys_for(count))
    assert torch.allclose(out.mean((1, 2, 3)), targets[:, 1], atol=1e-6)
    np.random.seed(0)
    boxes = [rand_bbox((1, 1, 16, 16), lam) for lam in np.random.beta(1, 1, 4000)]
    areas = np.array([(bottom - top) * (right - left) / 256 for top, bottom, left, right in boxes])
    found = torch.where(torch.arange(count) % 2 == 0, targets[:, 1], targets[:, 0]).numpy()
    assert found.mean() == pytest.approx(areas.mean(), abs=5 * areas.std() / math.sqrt(count))


def test_both_are_drawn_as_often() -> None:
    """Mixup gives intermediate values, CutMix does not."""
    images = torch.zeros(2000, 1, 8, 8)
    images[1::2] = 1
    out, _ = Mixer(TrainConfig(mixup=0.8, cutmix=1.0), 2)(images, torch.arange(2000) % 2, keys_for(2000))
    between = ((out > 0.001) & (out < 0.999)).flatten(1).all(1).float().mean()
    assert float(between) == pytest.approx(0.5, abs=0.06)


def test_mixing_depends_on_key_and_neighbour_only() -> None:
    mixer, keys = Mixer(TrainConfig(mixup=0.8, cutmix=1.0), 4), keys_for(8)
    images, labels = torch.rand(8, 1, 8, 8), torch.arange(8) % 4
    first = mixer(images.clone(), labels, keys)
    again = mixer(images[2:6].clone(), labels[2:6], keys[2:6])
    assert torch.equal(first[0][2:6], again[0]) and torch.equal(first[1][2:6], again[1])
    assert not torch.equal(first[0], mixer(images.clone(), labels, keys_for(8, epoch=1))[0])


@pytest.mark.parametrize("name", RECIPES)
def test_augmentation_of_every_recipe_can_be_made(name: str) -> None:
    """A batch of the recipe's size, with finite numbers."""
    data = RECIPES[name]().data
    images = torch.randint(0, 256, (8, data.channels, data.image_size, data.image_size), dtype=torch.uint8)
    found = Pixels(data, CPU).augment(images, keys_for(8))
    assert found.shape == images.shape and found.dtype == torch.float32 and bool(found.isfinite().all())
