"""Transforms, generators and mixing against plain numpy."""

import random

import numpy as np
import pytest
import torch
from PIL import Image

from lgp_dist.config import AugmentConfig, DataConfig, TrainConfig
from lgp_dist.data.augment import Mixer, eval_transform, sample_rng, train_transform
from lgp_dist.errors import UserError

GREY = DataConfig(image_size=28, channels=1, mean=(0.3,), std=(0.4,), crop_pct=1.0)


def draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_sample_rng_seeds_all_three_and_restores_them() -> None:
    def inside(*key: int) -> tuple[float, float, float]:
        with sample_rng(*key):
            return draws()

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = [draws(), draws()]
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    found = [draws()]
    first = inside(0, 1, 2)
    found.append(draws())
    assert found == expected
    assert inside(0, 1, 2) == first
    others = [inside(*key) for key in ((1, 1, 2), (0, 2, 2), (0, 1, 3), (0, 12, 0))]
    for number in range(3):
        assert len({draw[number] for draw in [first, *others]}) == 5
    with pytest.raises(KeyError), sample_rng(0, 0, 0):
        raise KeyError
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    assert draws() == expected[0]


def test_eval_transform_is_plain_normalisation_at_the_same_size() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (28, 28), dtype=np.uint8)
    found = eval_transform(GREY)(Image.fromarray(pixels)).numpy()
    assert np.allclose(found, (pixels[None] / 255 - 0.3) / 0.4, atol=1e-6)


def test_eval_transform_crops_the_centre() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 40, 3), dtype=np.uint8)
    data = DataConfig(image_size=28, crop_pct=0.875, mean=(0.0,) * 3, std=(1.0,) * 3)
    found = eval_transform(data)(Image.fromarray(pixels)).numpy()
    assert np.allclose(found, pixels[2:30, 6:34].transpose(2, 0, 1) / 255, atol=1e-6)


def test_flip_alone_is_a_flip() -> None:
    data = DataConfig(
        image_size=16, mean=(0.0,) * 3, std=(1.0,) * 3, augment=AugmentConfig(crop_scale=(1.0, 1.0), hflip=1.0)
    )
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    transform = train_transform(data)
    found = 0
    for sample in range(20):  # a random aspect ratio that does not fit falls back to the whole image
        with sample_rng(0, 0, sample):
            image = transform(Image.fromarray(pixels)).numpy()
        found += np.allclose(image, pixels[:, ::-1].transpose(2, 0, 1) / 255, atol=1e-6)
    assert found > 0


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"channels": 2}, "data.channels is 2"),
        ({"mean": (0.1, 0.2, 0.3)}, "data.mean has 3 numbers but data.channels is 1"),
        ({"std": (0.0,)}, "data.std"),
        ({"crop_pct": 0.0}, "data.crop_pct is 0.0"),
        ({"image_size": 0}, "data.image_size is 0"),
        ({"augment": AugmentConfig(crop_scale=(0.9, 0.5))}, "data.augment.crop_scale"),
        ({"augment": AugmentConfig(auto_augment="foo")}, "data.augment.auto_augment 'foo'"),
    ],
)
def test_bad_values_have_a_sentence(change: dict, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        train_transform(DataConfig(**{**vars(GREY), **change}))


def test_no_mixing_leaves_labels() -> None:
    images, labels = torch.rand(3, 1, 4, 4), torch.tensor([0, 2, 1])
    out, targets = Mixer(TrainConfig(), 3)(images.clone(), labels, 1)
    assert torch.equal(out, images) and targets is labels


def test_smoothing_alone() -> None:
    images, labels = torch.rand(3, 1, 4, 4), torch.tensor([0, 2, 1])
    out, targets = Mixer(TrainConfig(label_smoothing=0.3), 3)(images.clone(), labels, 1)
    assert torch.equal(out, images) and targets.dtype == torch.float32
    assert np.allclose(targets.numpy(), 0.7 * np.eye(3)[[0, 2, 1]] + 0.1)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_mixup_mixes_images_and_labels_alike(smoothing: float) -> None:
    mixer = Mixer(TrainConfig(mixup=0.8, label_smoothing=smoothing), 4)
    images, labels = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 3])
    lams = set()
    for key in range(5):
        out, targets = mixer(images.clone(), labels, key)
        lam = (float(targets[0, 0]) - smoothing / 4) / (1 - smoothing)
        lams.add(round(lam, 6))
        assert torch.allclose(out, lam * images + (1 - lam) * images.flip(0), atol=1e-5)
        one_hot = np.eye(4)[[0, 1, 2, 3]] * (1 - smoothing) + smoothing / 4
        assert np.allclose(targets.numpy(), lam * one_hot + (1 - lam) * one_hot[::-1], atol=1e-5)
    assert len(lams) == 5


def test_cutmix_label_share_is_the_share_of_pixels() -> None:
    mixer = Mixer(TrainConfig(cutmix=1.0), 2)
    images = torch.stack([torch.zeros(1, 16, 16), torch.ones(1, 16, 16)])
    for key in range(5):
        out, targets = mixer(images.clone(), torch.tensor([0, 1]), key)
        assert float(out[0].mean()) == pytest.approx(float(targets[0, 1]), abs=1e-6)


def test_mixing_depends_on_the_key_only() -> None:
    mixer = Mixer(TrainConfig(mixup=0.8, cutmix=1.0), 4)
    images, labels = torch.rand(4, 1, 8, 8), torch.arange(4)
    first = mixer(images.clone(), labels, 2**100 + 7)
    np.random.rand(3)
    state = np.random.get_state()[1].copy()
    again = mixer(images.clone(), labels, 2**100 + 7)
    assert np.array_equal(np.random.get_state()[1], state)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], mixer(images.clone(), labels, 2**100 + 8)[0])


def test_odd_batch_cannot_be_mixed() -> None:
    with pytest.raises(UserError, match="micro-batch of 3 images is odd.*batch_size"):
        Mixer(TrainConfig(mixup=0.8), 4)(torch.rand(3, 1, 8, 8), torch.arange(3), 0)
