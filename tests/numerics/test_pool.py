"""The pool and its descendants against stock timm models."""

import copy
import json
from pathlib import Path as File

import pytest
import timm
import torch
import torch.nn.functional as F
from numerics_cases import EVERY_PATH, HEADS, SPACES, THREE, TWO, images, path_id, shake, stock_rows
from safetensors.torch import load, save, save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from lgp_dist.config.run_config import DataConfig
from lgp_dist.engine.gradients import skippable_module_of
from lgp_dist.models.descendant import descendant_from_path, load_descendant, timm_config
from lgp_dist.models.pool import LearngenePool, SharedForwards
from lgp_dist.paths.path import Path, block_flops
from lgp_dist.paths.stitched import PathSpace
from lgp_dist.recipes import RECIPES

DATA = DataConfig(
    image_size=28, channels=1, num_classes=10, mean=(0.2856,), std=(0.3527,), crop_pct=0.9, interpolation="bilinear"
)
ROWS = [(space, row) for space in SPACES for row in range(len(space.widths))]


def build(space: PathSpace) -> tuple[LearngenePool, list[VisionTransformer]]:
    """A pool in eval mode, and the stock timm models that its rows were made of."""
    rows = stock_rows(space)
    pool = LearngenePool(space, copy.deepcopy(rows))
    for index in range(len(space.stitch_widths)):
        shake(pool.stitch(index))
    return pool.eval(), rows


def recompute(pool: LearngenePool, rows: list[VisionTransformer], path: Path, batch: Tensor) -> Tensor:
    """Logits of a stitched path from timm's modules and the stitch's weight, written out."""
    first, last = rows[path.first_row], rows[path.last_row]
    tokens = first.patch_embed(batch)
    tokens = torch.cat([first.cls_token.expand(len(batch), -1, -1), tokens], dim=1) + first.pos_embed
    for number, part in enumerate(path.segments):
        if number:
            stitch = pool.stitch(path.stitches[number - 1])
            tokens = F.linear(tokens, stitch.weight, stitch.bias)
        for index in range(part.start, part.stop):
            tokens = rows[part.row].blocks[index](tokens)
    return last.head((last.norm(tokens) if pool.space.final_norm else tokens)[:, 0])


def own_prefixes(path: Path) -> tuple[str, ...]:
    """Where a path's parameters live in the pool."""
    blocks = [f"units.row{part.row}_block{i}." for part in path.segments for i in range(part.start, part.stop)]
    stitches = [f"units.stitch{index}." for index in path.stitches]
    return (f"stem.rows.{path.segments[0].row}.", *blocks, *stitches, f"head.rows.{path.segments[-1].row}.")


def idle_norm(space: PathSpace, path: Path) -> tuple[str, ...]:
    """Where the norm is that a path has and does not apply."""
    return () if space.final_norm or path.is_row else (f"head.rows.{path.segments[-1].row}.norm.",)


@pytest.mark.parametrize(("space", "path"), EVERY_PATH, ids=path_id)
def test_gradient_reaches_exactly_the_paths_parameters(space: PathSpace, path: Path) -> None:
    """Each parameter on the path has a gradient that is not zero, every other has none at all."""
    pool, _ = build(space)
    F.cross_entropy(pool(images(2), path), torch.tensor([1, 7])).backward()
    reached = {name: p for name, p in pool.named_parameters() if p.grad is not None}
    own = {name: p for name, p in pool.named_parameters() if name.startswith(own_prefixes(path))}
    assert reached.keys() == {name for name in own if not name.startswith(idle_norm(space, path))}
    assert reached.keys() == {
        name for name in own if skippable_module_of(name, pool.skippable_modules) in pool.modules_of(path)
    }
    assert sum(p.numel() for p in own.values()) == space.cost(path).params
    assert all(p.grad.abs().sum() > 0 for p in reached.values())


@pytest.mark.parametrize("space", SPACES, ids=path_id)
def test_all_paths_together_reach_every_parameter(space: PathSpace) -> None:
    """No parameter of a pool is dead."""
    pool, _ = build(space)
    sum(pool(images(1), path).square().sum() for path in space.paths).backward()
    assert [name for name, p in pool.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@pytest.mark.parametrize(("space", "row"), ROWS, ids=path_id)
def test_row_alone_is_a_stock_vit(space: PathSpace, row: int) -> None:
    """A row gives its timm model's logits bit for bit, and its state loads strictly into a fresh one."""
    pool, rows = build(space)
    batch, path = images(3), space.paths[row]
    assert (path.first_row, path.last_row, path.stitches) == (row, row, ())
    fresh = stock_rows(space)[row]
    fresh.load_state_dict(pool.row_state(row), strict=True)
    with torch.no_grad():
        logits = pool(batch, path)
        assert torch.equal(logits, rows[row](batch))
        assert torch.equal(logits, fresh(batch))


@pytest.mark.parametrize(("space", "path"), [case for case in EVERY_PATH if len(case[1].segments) > 1], ids=path_id)
def test_stitched_path_is_timms_modules_in_a_row(space: PathSpace, path: Path) -> None:
    """Stem and blocks of one model, a linear layer, blocks, norm and head of the next: the same logits bit for bit."""
    pool, rows = build(space)
    batch = images(3)
    with torch.no_grad():
        assert torch.equal(pool(batch, path), recompute(pool, rows, path, batch))


@pytest.mark.parametrize("space", SPACES, ids=path_id)
def test_all_paths_give_different_logits(space: PathSpace) -> None:
    """No two paths are the same function, so that the comparisons of this file can fail."""
    pool, _ = build(space)
    batch = images(1)
    with torch.no_grad():
        logits = torch.cat([pool(batch, path) for path in space.paths])
    distances = torch.cdist(logits, logits) + torch.eye(len(logits))
    assert distances.min() > 1e-3


@pytest.mark.parametrize(("space", "path"), EVERY_PATH, ids=path_id)
@pytest.mark.slow
def test_descendant_equals_its_path_and_owns_its_weights(space: PathSpace, path: Path) -> None:
    """Same logits bit for bit; later changes of the pool do not reach the descendant, nor the other way round."""
    pool, _ = build(space)
    model, batch = descendant_from_path(pool, HEADS[space], path), images(3)
    assert not model.training
    with torch.no_grad():
        before = pool(batch, path)
        assert torch.equal(model(batch), before)
        shake(model)
        assert torch.equal(pool(batch, path), before)
        model = descendant_from_path(pool, HEADS[space], path)
        shake(pool)
        assert torch.equal(model(batch), before)
        assert not torch.equal(pool(batch, path), before)


@pytest.mark.slow
@pytest.mark.parametrize(("space", "path"), EVERY_PATH, ids=path_id)
def test_descendant_survives_json_and_safetensors(space: PathSpace, path: Path) -> None:
    """What is written out and read back gives the path's logits bit for bit, for every path."""
    pool, _ = build(space)
    model, batch = descendant_from_path(pool, HEADS[space], path), images(2)
    config = json.loads(json.dumps(timm_config(space, HEADS[space], path, DATA)))
    again = load_descendant(config, load(save(model.state_dict())))
    assert type(again) is type(model) and not again.training
    with torch.no_grad():
        assert torch.equal(again(batch), pool(batch, path))


@pytest.mark.parametrize(("space", "row"), ROWS, ids=path_id)
def test_exported_row_loads_with_timm_alone(space: PathSpace, row: int, tmp_path: File) -> None:
    """timm.create_model reads the folder without this package: same logits, and its data configuration is the run's."""
    pool, _ = build(space)
    path, batch = space.paths[row], images(2)
    model = descendant_from_path(pool, HEADS[space], path)
    (tmp_path / "config.json").write_text(json.dumps(timm_config(space, HEADS[space], path, DATA)))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(loaded(batch), pool(batch, path))
    resolved = timm.data.resolve_model_data_config(loaded)
    assert tuple(resolved["mean"]) == DATA.mean and tuple(resolved["std"]) == DATA.std
    assert resolved["input_size"] == (1, 28, 28)
    assert (resolved["interpolation"], resolved["crop_pct"]) == (DATA.interpolation, DATA.crop_pct)


def test_pool_remembers_no_path() -> None:
    """Two paths that take turns, before either's backward, give what each gives alone: logits and gradients."""
    pool, _ = build(THREE)
    batch = images(2)
    first, second = THREE.by_key("r0.0-1+r1.1-2"), THREE.by_key("r1.0-1+r2.2-2")

    def alone(path: Path) -> tuple[Tensor, dict[str, Tensor]]:
        pool.zero_grad()
        logits = pool(batch, path)
        logits.square().sum().backward()
        return logits, {name: p.grad.clone() for name, p in pool.named_parameters() if p.grad is not None}

    expected = alone(first), alone(second)
    pool.zero_grad()
    ours, others = pool(batch, first), pool(batch, second)
    assert torch.equal(ours, expected[0][0]) and torch.equal(others, expected[1][0])
    assert torch.equal(pool(batch, first), ours)
    ours.square().sum().backward()
    found = {name: p.grad for name, p in pool.named_parameters() if p.grad is not None}
    assert found.keys() == expected[0][1].keys() != expected[1][1].keys()
    assert all(torch.equal(found[name], expected[0][1][name]) for name in found)


def test_rows_start_as_timm_starts_them() -> None:
    """A pool with random weights has timm's: position embedding of std 0.02, zero biases, unit norms."""
    pool = LearngenePool.empty(TWO, HEADS[TWO])
    for row in range(len(TWO.widths)):
        state = pool.row_state(row)
        assert 0.015 < state["pos_embed"].std() < 0.025 and 0.015 < state["blocks.3.mlp.fc1.weight"].std() < 0.025
        assert state["blocks.0.attn.qkv.bias"].abs().max() == 0 and (state["norm.weight"] == 1).all()


def steps(space: PathSpace, path: Path) -> list[tuple[tuple[str, int, int], int]]:
    """What a path runs before its head, one after the other, with the multiply-adds of each."""
    width, stem = space.widths[path.first_row], space.channels * space.patch_size**2
    found = [(("stem", path.first_row, 0), (space.tokens - 1) * stem * width)]
    for number, part in enumerate(path.segments):
        if number:
            source, target = space.stitch_widths[path.stitches[number - 1]]
            found.append((("stitch", path.stitches[number - 1], 0), space.tokens * source * target))
        cost = block_flops(space.widths[part.row], space.tokens)
        found += [(("block", part.row, index), cost) for index in range(part.start, part.stop)]
    return found


def distinct(space: PathSpace) -> dict[tuple[object, ...], int]:
    """The beginnings of all paths, each once, with the multiply-adds of its last step."""
    found = {}
    for path in space.paths:
        names, costs = zip(*steps(space, path), strict=True)
        found |= {names[: end + 1]: cost for end, cost in enumerate(costs)}
    return found


@pytest.mark.parametrize("space", SPACES, ids=path_id)
def test_shared_forwards_are_those_of_each_path(space: PathSpace) -> None:
    """Bit for bit, in their own order and in another, for one batch after the other. In their own order each beginning
    of a path runs once."""
    pool, _ = build(space)
    shared, calls = SharedForwards(pool), []
    in_order = sorted(space.paths, key=shared.route)
    hooks = [unit.register_forward_hook(lambda *_: calls.append(1)) for unit in (pool.stem, *pool.units.values())]
    batch = torch.randn(2, 1, 28, 28)
    with torch.no_grad():
        for path in in_order:
            shared(batch, path)
        assert len(calls) == len(distinct(space))
        for hook in hooks:
            hook.remove()
        for paths in (in_order, space.paths, in_order[::-1]):
            batch = torch.randn(2, 1, 28, 28)
            for path in paths:
                assert torch.equal(shared(batch, path), pool(batch, path)), path.key


@pytest.mark.parametrize(
    ("recipe", "saved"), [("tiny", 10.0), ("pool12", 6.5), ("pool18", 6.6), ("pool36", 20.4), ("snnet_v2_s_l", 63.0)]
)
def test_what_sharing_saves(recipe: str, saved: float) -> None:
    """In per cent of the multiply-adds of all paths (docs/descendants.md)."""
    space = PathSpace.from_config(RECIPES[recipe]())
    apart = sum(space.cost(path).flops for path in space.paths)
    each = sum(cost for path in space.paths for _, cost in steps(space, path))
    assert 0.99 * apart < each <= apart, "all but norms and heads"
    assert 100 * (each - sum(distinct(space).values())) / apart == pytest.approx(saved, abs=0.05)
