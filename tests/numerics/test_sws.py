"""SWS: the auxiliary net against an untied stock ViT, its expansion block by block, counts against built modules."""

import json
from pathlib import Path as File

import pytest
import timm
import torch
from numerics_cases import count, counted_flops, images, shake
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import Block, VisionTransformer

from lgp_dist.config.run_config import DataConfig, DistilConfig, RowConfig
from lgp_dist.errors import UserError
from lgp_dist.models.descendant import descendant_from_path, empty_descendant, load_descendant, timm_config
from lgp_dist.models.pool import LearngenePool
from lgp_dist.models.sws import Stage, auxiliary_net, expand, stage_vit
from lgp_dist.paths.depths import DepthSpace, layer_sources, layers_per_stage
from lgp_dist.paths.path import Path
from lgp_dist.paths.space import heads_of, space_of
from lgp_dist.recipes import sws_base, sws_small

PUBLISHED = (3, 3, 4, 3, 3)
SOURCES = {
    4: [0, 1, 2, 3],
    5: [0, 1, 1, 2, 3],
    6: [0, 1, 1, 2, 2, 3],
    7: [0, 0, 1, 1, 2, 2, 3],
    12: [0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3],
}
"""By hand, of stages 1-2-2-1."""
SPACE = DepthSpace(16, (1, 2, 2, 1), tuple(SOURCES), image_size=28, patch_size=7, channels=1, num_classes=10)
HEADS = (4,) * len(SPACE.depths)


def stock(depth: int) -> VisionTransformer:
    """timm's ViT of the toy shape without class token."""
    return VisionTransformer(
        img_size=28, patch_size=7, in_chans=1, num_classes=10, embed_dim=16, depth=depth, num_heads=4,
        class_token=False, global_pool="avg",
    ).eval()  # fmt: skip


@pytest.fixture
def auxiliary() -> VisionTransformer:
    """The toy auxiliary net, no parameter at a special value."""
    vit = stage_vit(SPACE, heads=4)
    shake(vit)
    return vit.eval()


@pytest.fixture
def pool(auxiliary: VisionTransformer) -> LearngenePool:
    return expand(SPACE, auxiliary, HEADS).eval()


def path_of(depth: int) -> Path:
    return SPACE.by_key(f"d{depth}")


def test_published_expansion() -> None:
    """Depth 12 as the released code lists it, 5 one layer of each stage, 16 the auxiliary net."""
    assert layer_sources(PUBLISHED, 12) == (0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 4, 4)
    assert layer_sources(PUBLISHED, 5) == (0, 1, 2, 3, 4)
    assert layers_per_stage(PUBLISHED, 16) == PUBLISHED


@pytest.mark.parametrize("depth", SOURCES)
def test_expansion_by_hand(depth: int) -> None:
    assert list(layer_sources(SPACE.stages, depth)) == SOURCES[depth]


@pytest.mark.parametrize("stages", [PUBLISHED, (2, 2, 2), (1, 2, 2, 1), (1,), (5, 1)])
def test_expansion_holds_for_any_depth(stages: tuple[int, ...]) -> None:
    """As many layers as asked for, every stage at least one, a depth more adds one layer to one stage, and whole
    auxiliary nets give its layers."""
    total = sum(stages)
    before = layers_per_stage(stages, len(stages))
    assert before == (1,) * len(stages)
    for depth in range(len(stages) + 1, 3 * total + 1):
        counts = layers_per_stage(stages, depth)
        assert sum(counts) == depth
        assert sorted(now - old for now, old in zip(counts, before, strict=True)) == [0] * (len(stages) - 1) + [1]
        before = counts
    for times in (1, 2, 3):
        assert layers_per_stage(stages, times * total) == tuple(times * layers for layers in stages)


def test_auxiliary_net_is_a_stock_vit_with_equal_blocks(auxiliary: VisionTransformer) -> None:
    """Bit for bit, and its gradients are the sums over the layers of a stage."""
    vit, sources = stock(6), SOURCES[6]
    state = {name: value for name, value in auxiliary.state_dict().items() if "blocks" not in name}
    for layer, stage in enumerate(sources):
        prefix = f"blocks.{stage}.block."
        mine = {name: value for name, value in auxiliary.state_dict().items() if name.startswith(prefix)}
        state |= {name.replace(prefix, f"blocks.{layer}."): value for name, value in mine.items()}
    vit.load_state_dict(state, strict=True)
    batch = images(3)
    found, expected = auxiliary(batch), vit(batch)
    assert torch.equal(found, expected)
    found.square().sum().backward()
    expected.square().sum().backward()
    for stage, block in enumerate(auxiliary.blocks):
        tied = [vit.blocks[layer] for layer, source in enumerate(sources) if source == stage]
        for name, parameter in block.block.named_parameters():
            total = sum(each.get_parameter(name).grad for each in tied)
            torch.testing.assert_close(parameter.grad, total, rtol=1e-5, atol=1e-6)


def test_gradients_of_shared_layers_add_up_in_fp32_under_autocast() -> None:
    """Without a cast for each layer, autocast's one cast would add them up in 8 bits."""
    block, batch = Block(16, 2), torch.randn(2, 5, 16)
    tied = Stage(block, 4)
    untied = [Block(16, 2) for _ in range(4)]
    for each in untied:
        each.load_state_dict(block.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        tied(batch).float().square().sum().backward()
        torch.nn.Sequential(*untied)(batch).float().square().sum().backward()
    for name, parameter in block.named_parameters():
        total = sum(each.get_parameter(name).grad for each in untied)
        torch.testing.assert_close(parameter.grad, total, rtol=1e-5, atol=1e-5)


def test_at_its_own_depth_a_model_is_the_auxiliary_net(auxiliary: VisionTransformer, pool: LearngenePool) -> None:
    batch = images(4)
    with torch.no_grad():
        assert torch.equal(pool(batch, path_of(6)), auxiliary(batch))
        assert not torch.equal(pool(batch, path_of(7)), auxiliary(batch))


@pytest.mark.parametrize("depth", SOURCES)
def test_expansion_block_by_block(auxiliary: VisionTransformer, pool: LearngenePool, depth: int) -> None:
    """Every block is its learngene layer; embeddings, norm and head are the auxiliary net's; and the pool's path is a
    stock ViT with these weights, bit for bit."""
    path, learnt = path_of(depth), auxiliary.state_dict()
    state = pool.row_state(path.first_row)
    vit = stock(depth)
    vit.load_state_dict(state, strict=True)
    for layer, stage in enumerate(SOURCES[depth]):
        for name, value in vit.blocks[layer].state_dict().items():
            assert torch.equal(value, learnt[f"blocks.{stage}.block.{name}"])
    around = {name for name in state if not name.startswith("blocks.")}
    expected = {"pos_embed"} | {f"{m}.{p}" for m in ("patch_embed.proj", "fc_norm", "head") for p in ("weight", "bias")}
    assert around == expected and all(torch.equal(state[name], learnt[name]) for name in around)
    batch = images(2)
    with torch.no_grad():
        assert torch.equal(pool(batch, path), vit(batch))


def test_models_share_no_weights(auxiliary: VisionTransformer, pool: LearngenePool) -> None:
    """Neither with each other nor, within one, layers of a stage."""
    places = [p.data_ptr() for p in (*pool.parameters(), *auxiliary.parameters())]
    assert len(set(places)) == len(places)
    pool(images(2), path_of(5)).sum().backward()
    touched = {name for name, parameter in pool.named_parameters() if parameter.grad is not None}
    parts = pool.modules_of(path_of(5))
    assert touched == {name for name, _ in pool.named_parameters() if any(name.startswith(f"{p}.") for p in parts)}


def test_other_heads_are_refused(auxiliary: VisionTransformer) -> None:
    """The published small auxiliary net has 12 heads, its descendants 6: copied weights load and mean nothing."""
    with pytest.raises(UserError, match=r"d4 has 2 attention heads, but the auxiliary net learnt its layers with 4"):
        expand(SPACE, auxiliary, (2,) * len(SPACE.depths))


def test_fused_operations_compute_the_same(pool: LearngenePool) -> None:
    """They know nothing of a class token."""
    batch = images(2)
    with torch.no_grad():
        expected = [pool(batch, path) for path in SPACE.paths]
        pool.set_ops("fused")
        for path, logits in zip(SPACE.paths, expected, strict=True):
            torch.testing.assert_close(pool(batch, path), logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("path", SPACE.paths, ids=lambda path: path.key)
def test_cost_is_that_of_the_built_model(pool: LearngenePool, path: Path) -> None:
    model, cost = descendant_from_path(pool, HEADS, path), SPACE.cost(path)
    assert cost.params == cost.params_paper == count(model)
    assert cost.flops == counted_flops(model, images(1))


def test_stored_parameters_are_the_auxiliary_nets(auxiliary: VisionTransformer) -> None:
    row = RowConfig(width=16, heads=4, levels="none")
    assert SPACE.stored_params == count(auxiliary) == count(auxiliary_net(SPACE, row, DistilConfig()))


@pytest.mark.parametrize(("recipe", "stored", "deepest"), [(sws_small, 9.63, 22.05), (sws_base, 36.95, 86.57)])
def test_published_sizes(recipe: object, stored: float, deepest: float) -> None:
    """Millions of parameters that are stored, and of the model of 12 layers; arithmetic equals modules at full size."""
    config = recipe()
    space, heads = space_of(config), heads_of(config)
    path = space.by_key("d12")
    with torch.device("meta"):
        learnt, model = stage_vit(space, heads[0]), empty_descendant(space, heads, path)
        batch = torch.empty(1, 3, 224, 224)
    assert round(space.stored_params / 1e6, 2) == stored and space.stored_params == count(learnt)
    assert round(space.cost(path).params / 1e6, 2) == deepest and space.cost(path).params == count(model)
    assert space.cost(path).flops == counted_flops(model, batch)
    assert [block.layers for block in learnt.blocks] == list(PUBLISHED)
    assert {block.block.attn.head_dim for block in learnt.blocks} == {block.attn.head_dim for block in model.blocks}


@pytest.mark.parametrize("depth", [4, 7])
def test_exported_model_loads_with_timm_alone(pool: LearngenePool, depth: int, tmp_path: File) -> None:
    path, batch = path_of(depth), images(3)
    data = DataConfig(image_size=28, channels=1, num_classes=10, mean=(0.2856,), std=(0.3527,))
    model = descendant_from_path(pool, HEADS, path)
    (tmp_path / "config.json").write_text(json.dumps(timm_config(SPACE, HEADS, path, data)))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    again = load_descendant(
        json.loads((tmp_path / "config.json").read_text()), load_file(tmp_path / "model.safetensors")
    )
    assert type(loaded) is VisionTransformer and loaded.cls_token is None and loaded.global_pool == "avg"
    assert len(loaded.blocks) == depth
    with torch.no_grad():
        expected = pool(batch, path)
        assert torch.equal(loaded(batch), expected) and torch.equal(again(batch), expected)
