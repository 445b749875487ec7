"""Distillation against a second computation in NumPy, from features that hooks on stock timm models saw."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from numerics_cases import Array, array, capture, images, label_loss, shake, soft_loss, stock_vit
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from lgp_dist.config.run_config import DistilConfig, RowConfig, TrainConfig
from lgp_dist.engine.optim import build_optimizer, decays_matrix
from lgp_dist.models.ancestry import Ancestry
from lgp_dist.models.auxiliary import AuxiliaryRows, build_rows
from lgp_dist.models.pool import LearngenePool
from lgp_dist.models.transformation import levels_of
from lgp_dist.models.vit import forward_with_taps
from lgp_dist.paths.stitched import PathSpace
from lgp_dist.protocols import Batch, StepContext
from lgp_dist.stages.distil import decays
from lgp_dist.tasks.distil import DistilTask

SPACE = PathSpace((16, 32), 6, image_size=28, patch_size=7, channels=1, num_classes=10)
HEADS = (2, 4)
CONTEXT = StepContext(step=0, micro_step=0, rank=0, world=1)
LEVELS = {"none": (), "last": ((11, 5),), "dense": ((3, 1), (7, 3), (11, 5))}
"""Ancestry and auxiliary block of each level, from 0, for 12 and 6 blocks."""
SETTINGS = (
    DistilConfig(),
    DistilConfig(alpha=0.35, tau=2.0, inverse_weight=0.0),
    DistilConfig(alpha=1.0, loss_scale="paper", inverse_weight=0.25),
    DistilConfig(alpha=0.0, tau=2.0, loss_scale="paper"),
)


def make_task(narrow: str, wide: str, config: DistilConfig) -> DistilTask:
    """Two rows of 6 blocks below an ancestry of 12, all parameters with noise."""
    rows = (RowConfig(16, HEADS[0], narrow), RowConfig(32, HEADS[1], wide))
    module = AuxiliaryRows(build_rows(SPACE, rows, config, ancestry_depth=12, ancestry_width=32))
    shake(module)
    return DistilTask(module, Ancestry(stock_vit(32, 12, 4)), config)


def make_batch(soft: bool, count: int = 4) -> Batch:
    """Images with labels, or with shares of classes as mixup gives them."""
    targets = torch.randn(count, 10).softmax(-1) if soft else torch.tensor([3, 0, 9, 3])[:count]
    return Batch(images(count), targets, torch.ones(count))


def stock_copy(vit: VisionTransformer, width: int, heads: int, depth: int) -> VisionTransformer:
    """A stock timm model with the same weights."""
    copy = stock_vit(width, depth, heads)
    copy.load_state_dict(vit.state_dict(), strict=True)
    return copy


def layer_norm(tokens: Array, norm: str) -> Array:
    """LayerNorm without affine, eps 1e-5; as they are for `none`."""
    if norm == "none":
        return tokens
    return (tokens - tokens.mean(-1, keepdims=True)) / np.sqrt(tokens.var(-1, keepdims=True) + 1e-5)


def mapped(linear: nn.Module, tokens: Array) -> Array:
    """tokens W + b, or the tokens themselves for the identity."""
    if isinstance(linear, nn.Identity):
        return tokens
    return tokens @ array(linear.weight).T + array(linear.bias)


def reference(task: DistilTask, batch: Batch, levels: list[tuple[tuple[int, int], ...]]) -> dict[str, float]:
    """METHOD, section 2, in NumPy: every named part of every row, and the total."""
    config, named, total = task.config, {}, 0.0
    teacher = capture(stock_copy(task.ancestry.vit, 32, 4, 12), batch.images)
    for index, (row, width, heads) in enumerate(zip(task.module.rows, SPACE.widths, HEADS, strict=True)):
        student = capture(stock_copy(row.vit, width, heads, 6), batch.images)
        errors: dict[str, list[float]] = {"block": [], "attention": [], "inverse": []}
        for number, (above, below) in enumerate(levels[index]):
            target = layer_norm(mapped(row.bank.block[number], teacher.blocks[above]), config.target_norm)
            errors["block"].append(np.square(target - student.blocks[below]).mean())
            target = layer_norm(mapped(row.bank.attention[number], teacher.attentions[above]), config.target_norm)
            errors["attention"].append(np.square(target - student.attentions[below]).mean())
            if width != 32 and config.inverse_weight:
                back = mapped(row.bank.inverse[number], student.blocks[below])
                errors["inverse"].append(np.square(layer_norm(teacher.blocks[above], config.target_norm) - back).mean())
        parts = {name: float(np.mean(values)) if values else 0.0 for name, values in errors.items()}
        parts["cls"] = label_loss(student.logits, array(batch.targets))
        parts["pred"] = soft_loss(teacher.logits, student.logits, config.tau, config.loss_scale)
        distilled = parts["attention"] + parts["block"] + parts["pred"]
        total += config.alpha * parts["cls"] + (1 - config.alpha) * distilled
        total += config.inverse_weight * parts["inverse"]
        named.update({f"row{index}/{name}": value for name, value in parts.items() if errors.get(name) != []})
    return {"loss": total, **named}


def test_a_deeper_row_is_taught_at_its_own_last_block() -> None:
    """Levels of each row by its own number of blocks, so that the ancestry's last block teaches the row's last."""
    space = dataclasses.replace(SPACE, row_depths=(6, 12))
    rows = (RowConfig(16, HEADS[0], "dense"), RowConfig(32, HEADS[1], "last", depth=12))
    narrow, wide = build_rows(space, rows, DistilConfig(), ancestry_depth=12, ancestry_width=32)
    assert [(level.ancestry, level.auxiliary) for level in narrow.levels] == [(3, 1), (7, 3), (11, 5)]
    assert [(level.ancestry, level.auxiliary) for level in wide.levels] == [(11, 11)]
    images = torch.randn(2, 1, 28, 28)
    ancestry = {block: torch.randn(2, 17, 32) for block in (3, 7, 11)}
    assert len(wide(images, ancestry, ancestry)["block"]) == 1 and len(narrow(images, ancestry, ancestry)["block"]) == 3


@pytest.mark.parametrize("norm", ["layer", "none"])
@pytest.mark.parametrize("narrow", LEVELS)
@pytest.mark.parametrize("wide", LEVELS)
@pytest.mark.parametrize("setting", range(len(SETTINGS)))
def test_losses_equal_numpy(setting: int, wide: str, narrow: str, norm: str) -> None:
    """Every part and the total, for every choice of levels, target norm, scale, temperature, alpha and inverse."""
    task = make_task(narrow, wide, dataclasses.replace(SETTINGS[setting], target_norm=norm))
    batch = make_batch(soft=setting % 2 == 0)
    found = {name: value.item() for name, value in task.losses(task.module, batch, CONTEXT).items()}
    expected = reference(task, batch, [LEVELS[narrow], LEVELS[wide]])
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-9)
    assert ("row0/inverse" in found) == (narrow != "none" and task.config.inverse_weight > 0)
    assert "row1/inverse" not in found


@pytest.mark.parametrize("distilled", [False, True])
def test_a_row_of_labels_learns_from_labels_alone(distilled: bool) -> None:
    """Its loss and gradient are those of plain cross-entropy, also next to a distilled row, whose own do not change."""
    config = DistilConfig()
    rows = (RowConfig(16, HEADS[0], "dense"), RowConfig(32, HEADS[1], source="labels"))
    built = build_rows(SPACE, rows, config, ancestry_depth=12, ancestry_width=32)
    module = AuxiliaryRows(built if distilled else built[1:])
    shake(module)
    ancestry = Ancestry(stock_vit(32, 12, 4)) if distilled else None
    task, batch = DistilTask(module, ancestry, config), make_batch(soft=False)
    losses = task.losses(task.module, batch, CONTEXT)
    losses["loss"].backward()
    row = module.rows[-1]
    plain = stock_copy(row.vit, 32, HEADS[1], 6)
    logits = plain(batch.images)
    expected = label_loss(array(logits), array(batch.targets))
    nn.functional.cross_entropy(logits, batch.targets).backward()
    assert losses["row1/cls"].item() == pytest.approx(expected, rel=1e-5)
    for ours, theirs in zip(row.vit.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)
    assert list(row.bank.parameters()) == [] and not any(name in losses for name in ("row1/pred", "row1/block"))
    if distilled:
        narrow = AuxiliaryRows(built[:1])
        expected += DistilTask(narrow, ancestry, config).losses(narrow, batch, CONTEXT)["loss"].item()
    assert losses["loss"].item() == pytest.approx(expected, rel=1e-5)


def test_wide_row_is_the_method_without_maps() -> None:
    """Equal widths: no transformation parameters, and the ancestry's own last block is the target."""
    task = make_task("dense", "last", DistilConfig())
    bank = task.module.rows[1].bank
    assert list(bank.parameters()) == [] and len(bank.inverse) == 0
    tokens = torch.randn(2, 17, 32)
    assert torch.equal(bank.block[0](tokens), tokens) and torch.equal(bank.attention[0](tokens), tokens)
    narrow = {name: tuple(p.shape) for name, p in task.module.rows[0].bank.named_parameters() if "weight" in name}
    assert narrow == {
        **{f"{kind}.{level}.weight": (16, 32) for kind in ("block", "attention") for level in range(3)},
        **{f"inverse.{level}.weight": (32, 16) for level in range(3)},
    }


@pytest.mark.parametrize(
    ("policy", "ancestry", "auxiliary", "expected"),
    [
        ("dense", 12, 6, [(4, 2), (8, 4), (12, 6)]),
        ("dense", 12, 9, [(4, 3), (8, 6), (12, 9)]),
        ("dense", 12, 4, [(4, 1), (8, 3), (12, 4)]),
        ("dense", 12, 12, [(4, 4), (8, 8), (12, 12)]),
        ("last", 12, 6, [(12, 6)]),
        ("last", 12, 9, [(12, 9)]),
        ("none", 12, 6, []),
    ],
)
def test_levels(policy: Any, ancestry: int, auxiliary: int, expected: list[tuple[int, int]]) -> None:
    """METHOD's blocks, counted from 1 here: 4, 8, 12 to the last of each third, or the last alone."""
    found = levels_of(policy, ancestry, auxiliary)
    assert [(level.ancestry + 1, level.auxiliary + 1) for level in found] == expected


@pytest.mark.parametrize("blocks", [(), (5,), (1, 3, 5), range(6)])
def test_taps_are_what_hooks_see(blocks: tuple[int, ...]) -> None:
    """Logits equal timm's forward exactly, and taps what hooks on block and attention capture, at asked blocks only."""
    vit, batch = stock_vit(16, 6, 2), images(3)
    with torch.no_grad():
        logits, outputs, attentions = forward_with_taps(vit, batch, blocks)
    seen = capture(vit, batch)
    assert np.array_equal(array(logits), seen.logits)
    assert outputs.keys() == attentions.keys() == set(blocks)
    for index in blocks:
        assert np.array_equal(array(outputs[index]), seen.blocks[index])
        assert np.array_equal(array(attentions[index]), seen.attentions[index])


def test_taps_keep_stochastic_depth() -> None:
    """In training mode the tapped forward draws the same dropped branches as timm's, with the same gradients."""
    vit, batch = stock_vit(16, 6, 2, drop_path=0.5).train(), images(4)

    def result(logits: Tensor) -> list[Tensor]:
        vit.zero_grad()
        logits.square().sum().backward()
        return [logits.detach(), *(p.grad.clone() for p in vit.parameters())]

    torch.manual_seed(1)
    plain = result(vit(batch))
    torch.manual_seed(1)
    tapped = result(forward_with_taps(vit, batch, range(6))[0])
    assert all(torch.equal(a, b) for a, b in zip(plain, tapped, strict=True))
    torch.manual_seed(2)
    assert not torch.equal(vit(batch), plain[0]), "nothing was dropped"


def test_gradients_reach_the_rows_and_their_transformations_only() -> None:
    """Every student parameter, W, M and V get a gradient; the ancestry none, and it stays in eval mode."""
    task = make_task("dense", "last", DistilConfig())
    task.ancestry = Ancestry(stock_vit(32, 12, 4, drop_path=0.5))
    nn.ModuleList([task.module, task.ancestry]).train()
    assert task.module.rows[0].vit.training
    assert not any(module.training for module in task.ancestry.modules())
    before = {name: value.clone() for name, value in task.ancestry.state_dict().items()}
    batch = make_batch(soft=True)
    losses = task.losses(task.module, batch, CONTEXT)
    assert [name for name, value in losses.items() if value.requires_grad] == ["loss"]
    losses["loss"].backward()
    assert [n for n, p in task.module.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []
    assert all(p.grad is None and not p.requires_grad for p in task.ancestry.parameters())
    assert all(torch.equal(value, before[name]) for name, value in task.ancestry.state_dict().items())
    assert torch.equal(task.ancestry(batch.images)[0], task.ancestry(batch.images)[0])


@pytest.mark.parametrize("name", ["block", "attention", "inverse"])
def test_map_moves_downhill_in_its_own_error_alone(name: str) -> None:
    """The gradient of the loss in one entry of W, M or V is the one that NumPy's losses have there."""
    task, batch = make_task("dense", "last", DistilConfig(alpha=0.1)), make_batch(soft=False)
    task.losses(task.module, batch, CONTEXT)["loss"].backward()
    weight = getattr(task.module.rows[0].bank, name)[1].weight
    slope, step, values = float(weight.grad[3, 5]), 1e-3, []
    for sign in (1, -1):
        with torch.no_grad():
            weight[3, 5] += sign * step
        values.append(reference(task, batch, [LEVELS["dense"], LEVELS["last"]])["loss"])
        with torch.no_grad():
            weight[3, 5] -= sign * step
    assert slope == pytest.approx((values[0] - values[1]) / (2 * step), rel=2e-3)


def matrices(modules: list[nn.Module]) -> set[int]:
    """Identities of the weights of linear layers and convolutions."""
    parts = [part for module in modules for part in module.modules()]
    return {id(part.weight) for part in parts if isinstance(part, nn.Linear | nn.Conv2d)}


def split(optimizer: torch.optim.Optimizer, decay: float) -> tuple[list[int], list[int]]:
    """Identities of decayed and of other parameters; no third strength of decay may exist."""
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, decay}
    found: dict[bool, list[int]] = {True: [], False: []}
    for group in optimizer.param_groups:
        found[group["weight_decay"] > 0] += [id(p) for p in group["params"]]
    return found[True], found[False]


def test_weight_decay_in_distillation() -> None:
    """Decayed: weights of the students' linear layers and convolutions, nothing else; W, M and V are not."""
    module = make_task("dense", "last", DistilConfig()).module
    optimizer = build_optimizer(module, TrainConfig(weight_decay=0.07, lr=3e-4), decays)
    decayed, others = split(optimizer, 0.07)
    assert sorted(decayed + others) == sorted(id(p) for p in module.parameters())
    assert set(decayed) == matrices([row.vit for row in module.rows])
    names = {id(p): name for name, p in module.named_parameters()}
    spared = " ".join(names[key] for key in others)
    assert all(word in spared for word in ("bank.inverse.2.weight", "cls_token", "pos_embed", "norm.weight", "bias"))
    assert all(group["lr"] == 3e-4 for group in optimizer.param_groups)


def test_weight_decay_of_a_pool_and_of_frozen_parameters() -> None:
    """In a pool stitch layers are decayed like any linear layer; parameters that are not trained are left out."""
    pool = LearngenePool.empty(SPACE, HEADS)
    decayed, others = split(build_optimizer(pool, TrainConfig(weight_decay=0.05), decays_matrix), 0.05)
    assert sorted(decayed + others) == sorted(id(p) for p in pool.parameters())
    assert set(decayed) == matrices([pool])
    pool.stitch(0).requires_grad_(False)
    kept = {id(p) for group in build_optimizer(pool, TrainConfig()).param_groups for p in group["params"]}
    assert kept == {id(p) for p in pool.parameters()} - {id(pool.stitch(0).weight), id(pool.stitch(0).bias)}
