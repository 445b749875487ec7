"""Images and tokens of a foreign ancestry, against torchvision, timm and SciPy."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from numerics_cases import images, shake, stock_vit
from safetensors.torch import load_file, save_file
from scipy.optimize import minimize
from scipy.special import log_softmax
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import normalize, resize

from lgp_dist.models.ancestry import Ancestry, adapted_weights
from lgp_dist.models.ancestry_adapter import ImageAdapter, TokenAdapter, fit_classifier, has_token_blocks, tap
from lgp_dist.models.vit import forward_with_taps

GREY = ([0.3], [0.35])
IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
HALVES = ([0.5, 0.5, 0.5], [0.25, 0.5, 1.0])


@pytest.mark.parametrize("size", [28, 32, 20])
def test_images_as_torchvision_makes_them(size: int) -> None:
    pixels = torch.rand(2, 3, 28, 28)
    adapter = ImageAdapter(size, IMAGENET, HALVES)
    found = adapter(normalize(pixels, *IMAGENET))
    wanted = normalize(resize(pixels, [size, size], InterpolationMode.BICUBIC, antialias=True), *HALVES)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert not adapter.is_identity(28)


def test_grey_images_take_the_mean_of_three_channels() -> None:
    pixels = torch.rand(2, 1, 28, 28)
    found = ImageAdapter(28, GREY, HALVES)(normalize(pixels, *GREY))
    torch.testing.assert_close(found, normalize(pixels, [0.5], [1.75 / 3]))


def test_the_same_images_stay_as_they_are() -> None:
    adapter, batch = ImageAdapter(28, IMAGENET, IMAGENET), torch.rand(2, 3, 28, 28)
    assert adapter.is_identity(28) and not adapter.is_identity(32) and adapter(batch) is batch


@pytest.mark.parametrize(
    ("name", "prefix", "has_class"),
    [("vit_small_patch14_reg4_dinov2", 5, True), ("vit_wee_patch16_reg1_gap_256", 1, False), ("test_vit", 1, True)],
)
def test_tokens_as_torchvision_resizes_them(name: str, prefix: int, has_class: bool) -> None:
    """A grid of 2 x 2 becomes one of 4 x 4; a missing class token is the mean of the grid."""
    model = timm.create_model(name, img_size=28 if "14" in name else 32, depth=1)
    adapter, tokens = TokenAdapter(model, 4), torch.randn(2, prefix + 4, 6)
    maps = tokens[:, prefix:].transpose(1, 2).unflatten(2, (2, 2))
    wanted = resize(maps, [4, 4], InterpolationMode.BILINEAR, antialias=True).flatten(2).transpose(1, 2)
    found = adapter(tokens)
    assert not adapter.is_identity and found.shape == (2, 17, 6)
    torch.testing.assert_close(found[:, 1:], wanted)
    torch.testing.assert_close(found[:, 0], tokens[:, 0] if has_class else tokens[:, prefix:].mean(1))


def test_the_rows_own_tokens_stay_as_they_are() -> None:
    assert TokenAdapter(stock_vit(16, 2, 2), 4).is_identity
    assert not TokenAdapter(stock_vit(16, 2, 2), 2).is_identity


def test_taps_of_any_model_are_those_of_a_plain_vit() -> None:
    vit, batch = stock_vit(16, 4, 2), images(3)
    with torch.no_grad():
        logits, blocks, attentions = tap(vit, batch, {3, 1})
        wanted = forward_with_taps(vit, batch, {3, 1})
    torch.testing.assert_close(logits, wanted[0])
    for index in (1, 3):
        torch.testing.assert_close(blocks[index], wanted[1][index])
        torch.testing.assert_close(attentions[index], wanted[2][index])
    assert not any(module._forward_hooks for module in vit.modules())


@pytest.mark.parametrize(
    "name", ["vit_small_patch16_dinov3", "deit_tiny_distilled_patch16_224", "vit_small_patch16_rope_224"]
)
def test_logits_and_taps_of_other_models_are_timms(name: str) -> None:
    model = timm.create_model(name, img_size=32, in_chans=1, num_classes=10, depth=2)
    shake(model)
    ancestry, batch = Ancestry(model, tokens=TokenAdapter(model, 4)), torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        logits, blocks, attentions = ancestry(batch, {0})
        torch.testing.assert_close(logits, model(batch))
        torch.testing.assert_close(ancestry(batch)[0], logits)
        first = model.forward_intermediates(batch, indices=[0], intermediates_only=True, return_prefix_tokens=True)[0]
    torch.testing.assert_close(blocks[0][:, 0], first[1][:, 0])
    assert blocks[0].shape == attentions[0].shape == (2, 17, model.embed_dim)


def test_models_without_a_grid_of_tokens() -> None:
    assert not has_token_blocks(timm.create_model("test_resnet")) and has_token_blocks(stock_vit(16, 2, 2))


@pytest.mark.parametrize("classes", [0, 10])
@pytest.mark.parametrize("name", ["test_vit", "vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3"])
def test_weights_are_adapted_as_timm_does_it(name: str, classes: int, tmp_path: Path) -> None:
    """To grey images of another size, with another head or none: against create_model(pretrained=True) on the file."""
    torch.manual_seed(0)
    patch = 14 if "14" in name else 16
    shape = {} if name == "test_vit" else {"depth": 1}
    stored = timm.create_model(name, img_size=4 * patch, num_classes=7, **shape)
    save_file(stored.state_dict(), tmp_path / "weights.safetensors")
    other = {"img_size": 2 * patch, "in_chans": 1, "num_classes": classes, **shape}
    model = timm.create_model(name, **other)
    head = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("head.")}
    found = adapted_weights(model, load_file(tmp_path / "weights.safetensors"), head=False)
    overlay = {"file": str(tmp_path / "weights.safetensors"), "num_classes": 7}
    wanted = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **other).state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], head.get(key, value)) for key, value in wanted.items())


def test_the_fitted_head_is_logistic_regression() -> None:
    """The same minimum as SciPy's on standardised features, of which one never varies."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 200)
    features = rng.normal(size=(200, 5)) * 3 + 2 + labels[:, None] * np.array([2, 1, 0, 0, 0])
    features[:, 4] = 7.0
    weight, bias = fit_classifier(torch.tensor(features, dtype=torch.float32), torch.tensor(labels), 3, decay=1e-2)
    inputs = (features - features.mean(0)) / np.maximum(features.std(0, ddof=1), 1e-6)

    def loss(flat: np.ndarray) -> float:
        logits = inputs @ flat[:15].reshape(3, 5).T + flat[15:]
        return -log_softmax(logits, 1)[np.arange(200), labels].mean() + 1e-2 * np.square(flat[:15]).sum()

    solved = minimize(loss, np.zeros(18), tol=1e-8).x
    wanted = log_softmax(inputs @ solved[:15].reshape(3, 5).T + solved[15:], 1)
    found = log_softmax(features @ weight.double().numpy().T + bias.double().numpy(), 1)
    np.testing.assert_allclose(found, wanted, atol=2e-3)
