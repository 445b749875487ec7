"""The ancestry made ready for training gives what it gave, and one of its forwards serves several paths."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from numerics_cases import TWO, images, shake, stock_rows, stock_vit
from run_helpers import has
from torch import Tensor, nn

from lgp_dist.cli import COMMANDS, GROUPS
from lgp_dist.cli.parse import parse
from lgp_dist.config.run_config import DistilConfig, EngineConfig, FinetuneConfig, Precision, RowConfig, RunConfig
from lgp_dist.data.shards.manifest import ShardManifest
from lgp_dist.engine.launch.environment import Launch
from lgp_dist.engine.loop import TrainingPlan
from lgp_dist.engine.workers import Workers
from lgp_dist.errors import UserError
from lgp_dist.models.ancestry import Ancestry
from lgp_dist.models.auxiliary import AuxiliaryRows, build_rows
from lgp_dist.models.pool import LearngenePool
from lgp_dist.models.pretrained import check_images
from lgp_dist.paths.sampler import PathSampler
from lgp_dist.protocols import Batch, StepContext, Task
from lgp_dist.recipes import tiny, tiny_paper
from lgp_dist.run.artifacts import RunDirectory
from lgp_dist.run.checks import check_config
from lgp_dist.run.provenance import environment
from lgp_dist.stages import context
from lgp_dist.tasks.distil import DistilTask
from lgp_dist.tasks.finetune import FinetuneTask

ROOT = Path(__file__).parents[2]
DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def outputs(ancestry: Ancestry, batch: Tensor, precision: Precision) -> list[Tensor]:
    """Logits without taps, and logits, block and attention outputs with them, under autocast."""
    dtype = DTYPES[precision]
    with torch.autocast("cpu", dtype, enabled=dtype is not None, cache_enabled=False):
        alone, (logits, blocks, attentions) = ancestry(batch)[0], ancestry(batch, {1, 3})
    return [alone, logits, *blocks.values(), *attentions.values()]


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("backend", ["", "aot_eager"])
def test_prepared_ancestry_gives_the_same_bits(precision: Precision, backend: str) -> None:
    """Weights cast once are the weights that autocast casts each time; compiled, the same to rounding."""
    vit = stock_vit(32, 4, 4)
    plain, ready = Ancestry(copy.deepcopy(vit)), Ancestry(copy.deepcopy(vit)).prepare(precision, backend)
    batch = images(3)
    for found, wanted in zip(outputs(ready, batch, precision), outputs(plain, batch, precision), strict=True):
        assert found.dtype == wanted.dtype and not found.is_inference()
        if backend:
            torch.testing.assert_close(found, wanted, rtol=2e-2 if DTYPES[precision] else 1e-5, atol=1e-2)
        else:
            assert torch.equal(found, wanted)
    kinds = {module.weight.dtype for module in ready.vit.modules() if isinstance(module, (nn.Linear, nn.Conv2d))}
    assert kinds == {DTYPES[precision] or torch.float32}
    assert ready.vit.blocks[0].norm1.weight.dtype == ready.vit.pos_embed.dtype == torch.float32


@pytest.mark.parametrize("surrounding", DTYPES)
@pytest.mark.parametrize("precision", DTYPES)
def test_a_precision_of_its_own(precision: Precision, surrounding: Precision) -> None:
    """Whatever autocast surrounds it, the numbers are those of its own; without one they are float32."""
    vit, batch = stock_vit(32, 4, 4), images(3)
    plain, ready = Ancestry(copy.deepcopy(vit)), Ancestry(copy.deepcopy(vit)).prepare(precision)
    wanted, found = outputs(plain, batch, precision), outputs(ready, batch, surrounding)
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other.to(one.dtype))
        assert one.dtype == (other.dtype if DTYPES[surrounding] else torch.float32)
    if precision != "fp32":
        assert not torch.equal(found[0], vit(batch))


@pytest.mark.parametrize("stage", ["distil", "finetune"])
def test_training_with_an_ancestry_in_bf16(stage: str) -> None:
    """In fp32: losses and gradients are those of one in fp32 to what bf16 rounds."""
    torch.manual_seed(0)
    vit, losses, gradients = stock_vit(32, 12, 4), [], []
    pool = LearngenePool(TWO, stock_rows(TWO))
    shapes = RowConfig(16, 2, "dense"), RowConfig(32, 4, "last")
    rows = AuxiliaryRows(build_rows(TWO, shapes, DistilConfig(), ancestry_depth=12, ancestry_width=32))
    batch = Batch(images(4), torch.tensor([1, 7, 0, 3]), torch.ones(4))
    for precision in ("fp32", "bf16"):
        ancestry = Ancestry(copy.deepcopy(vit)).prepare(precision)
        if stage == "distil":
            task: Task = DistilTask(rows, ancestry, DistilConfig())
        else:
            task = FinetuneTask(pool, ancestry, PathSampler(TWO.paths, "shared", seed=0), FinetuneConfig())
        loss = task.losses(task.module, batch, StepContext(0, 0, 0, 1))["loss"]
        task.module.zero_grad()
        loss.backward()
        losses.append(loss.detach())
        found = [part.grad for part in task.module.parameters() if part.grad is not None]
        assert {part.dtype for part in found} == {torch.float32}
        gradients.append(torch.cat([part.flatten() for part in found]))
    torch.testing.assert_close(*losses, rtol=2e-2, atol=0)
    assert losses[0] != losses[1]
    assert (gradients[1] - gradients[0]).norm() < 5e-2 * gradients[0].norm()


@pytest.mark.parametrize("precision", DTYPES)
def test_a_teacher_that_is_no_vit_gives_the_same_bits(precision: Precision) -> None:
    """timm's smallest ResNet, whose batch norms stay in float32; `aot_eager` leaves it as it is."""
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", in_chans=1, num_classes=10).eval()
    ready, dtype = Ancestry(copy.deepcopy(model)).prepare(precision, "aot_eager"), DTYPES[precision]
    batch = images(3)
    with torch.autocast("cpu", dtype, enabled=dtype is not None, cache_enabled=False), torch.no_grad():
        assert torch.equal(ready(batch)[0], model(batch))
    assert {m.weight.dtype for m in ready.vit.modules() if isinstance(m, nn.BatchNorm2d)} == {torch.float32}


@pytest.mark.parametrize("policy", ["independent", "spread", "shared"])
def test_several_paths_share_one_forward(policy: str) -> None:
    """The same losses and paths as with a forward of the ancestry in every micro-step, for a quarter of them."""
    pool = LearngenePool(TWO, stock_rows(TWO)).eval()
    shake(pool)
    sampler = PathSampler(TWO.paths, policy, seed=5, accumulate=8)
    losses, calls, keys, vit = {}, {}, {}, stock_vit(32, 4, 4)
    for paths in (1, 4):
        ancestry = Ancestry(copy.deepcopy(vit))
        counted: list[int] = []
        ancestry.vit.register_forward_hook(lambda *_, counted=counted: counted.append(1))
        task = FinetuneTask(pool, ancestry, sampler, FinetuneConfig(paths_per_batch=paths))
        losses[paths], keys[paths] = [], []
        for step in range(2):
            torch.manual_seed(step)
            drawn = [Batch(images(2) + turn, torch.tensor([1, 7]), torch.ones(2)) for turn in range(2)]
            for micro, batch in enumerate(again for each in drawn for again in each.repeated(4)):
                place = StepContext(step, micro, 0, 1)
                losses[paths].append(float(task.losses(pool, batch, place)["loss"].detach()))
                keys[paths].append(task.labels(place)["path"])
        calls[paths] = len(counted)
    assert losses[1] == losses[4] and keys[1] == keys[4]
    assert calls == {1: 16, 4: 4}
    assert len(set(losses[1])) > 10 and len(set(keys[1])) > 4


def test_backward_keeps_what_the_ancestry_gave() -> None:
    """The ancestry's logits are no tensors of inference mode, which backward could not keep, and want no gradient."""
    task = FinetuneTask(
        LearngenePool(TWO, stock_rows(TWO)),
        Ancestry(stock_vit(32, 4, 4)),
        PathSampler(TWO.paths, "shared", seed=0, accumulate=2),
        FinetuneConfig(paths_per_batch=2),
    )
    batch = Batch(images(2), torch.tensor([1, 7]), torch.ones(2))
    for micro in range(2):
        task.losses(task.module, batch, StepContext(0, micro, 0, 1))["loss"].backward()
    assert all(parameter.grad is None for parameter in task.ancestry.parameters())
    assert any(parameter.grad is not None for parameter in task.module.parameters())


def test_a_batch_repeated_counts_once() -> None:
    batch = Batch(images(2), torch.tensor([1, 7]), torch.ones(2), {"bad_samples": 3})
    found = list(batch.repeated(3))
    assert [again.facts["bad_samples"] for again in found] == [3, 0, 0]
    assert all(again.images is batch.images for again in found)


def test_an_optimizer_step_sees_the_same_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four micro-steps of 4 images, or two batches of 8 for two micro-steps each: the same 16 under the same names."""
    config = tiny()
    config = replace(config, data=replace(config.data, root=str(ROOT / "shards" / "sample"), threads=0))
    manifest = ShardManifest.load(ROOT / "shards" / "sample")
    workers = Workers(Launch.from_environment({}), EngineConfig(precision="fp32"), 0, 1, torch.device("cpu"))
    made: list[Any] = []
    monkeypatch.setattr(context, "train", lambda plan, setup, workers: made.append((setup.batches, setup.step_filter)))
    found, named = {}, {}
    for uses in (1, 2):
        settings = replace(config.finetune.train, batch_size=16, accumulate=4, mixup=0.0, cutmix=0.0)
        place = context.Context(config, {}, RunDirectory(tmp_path), workers, manifest, environment())
        place.train("finetune", TrainingPlan(FinetuneTask(*parts(), FinetuneConfig()), settings), uses=uses)
        batches, step_filter = made[-1]
        found[uses] = list(batches(3, 1))
        named[uses] = [step_filter.describe(3, micro, 0) for micro in range(4)]
    assert [len(batch.images) for batch in found[1]] == [4] * 4
    assert [len(batch.images) for batch in found[2]] == [8] * 4
    assert found[2][0].images is found[2][1].images and found[2][2].images is found[2][3].images
    assert torch.equal(torch.cat([b.images for b in found[1]]), torch.cat([b.images for b in found[2][::2]]))
    first = [names[0].rsplit(";", 1)[0] for names in named.values()]
    assert named[2][0] == named[2][1] != named[2][2] and first[0] == first[1]


def parts() -> tuple[LearngenePool, None, PathSampler]:
    """What a task of fine-tuning is made of, without an ancestry."""
    return LearngenePool(TWO, stock_rows(TWO)), None, PathSampler(TWO.paths, "shared", seed=0)


def settings(*words: str) -> RunConfig:
    """Recipe tiny with settings as a person writes them."""
    found = parse(["distil", "tiny", *words], COMMANDS, GROUPS).arguments
    assert isinstance(found, RunConfig)
    return found


def weights_with(folder: Path, record: str, images: dict[str, Any], stage: str = "") -> Path:
    """A file of weights next to what says on which images they were trained: a stage's record, or timm's config."""
    weights = folder / record.partition(".")[0] / "model.safetensors"
    weights.parent.mkdir()
    weights.touch()
    if record == "config.json":
        size = [images["channels"], images["image_size"], images["image_size"]]
        described: dict[str, Any] = {"pretrained_cfg": {**images, "input_size": size}}
    else:
        source = {"ancestry.source": "train", "ancestry.model": "vit"} if stage == "ancestry" else {}
        config = source | {f"data.{name}": value for name, value in images.items()}
        described = {"stage": stage, "files": {weights.name: ""}, "config": config}
    (weights.parent / record).write_text(json.dumps(described))
    return weights


IMAGES = {"mean": [0.25] * 3, "std": [0.5] * 3, "channels": 3, "image_size": 56, "crop_pct": 0.9}


@pytest.mark.parametrize("key", ["ancestry", "model.rows.1"])
@pytest.mark.parametrize("record", ["artifact.json", "config.json"])
def test_images_of_weights_from_a_file_are_compared(key: str, record: str, tmp_path: Path) -> None:
    """Another mean or std is refused, other differences are said; what the sentence says to set leaves none."""
    weights = weights_with(tmp_path, record, {**IMAGES, "interpolation": "bilinear"}, key)
    words = [f"--{key}.source=file", f"--{key}.weights={weights}"]
    words += ["--data.channels=3", "--data.mean", *"111", "--data.std", *"222"]
    with pytest.raises(UserError) as caught:
        check_images(settings(*words), key)
    sentence, part = str(caught.value), key if key == "ancestry" else "data"
    has(sentence, f"{weights} ({key}) expect {part}.mean 0.25 0.25 0.25, {part}.std 0.5 0.5 0.5", "bilinear")
    told = settings(*words, *sentence.rpartition("set ")[2].removesuffix(".").split())
    assert not check_images(told, key)
    assert (told.data.interpolation, told.data.crop_pct) == ("bilinear", 0.9)
    images = told.ancestry if key == "ancestry" else told.data
    assert (images.mean, images.std, images.image_size) == ((0.25,) * 3, (0.5,) * 3, 56)
    said = check_images(replace(told, data=replace(told.data, crop_pct=0.875)), key)
    assert said.endswith(f"({key}) expect data.crop_pct 0.9, but get 0.875: set --data.crop-pct 0.9.")


def test_images_of_timms_weights_are_compared() -> None:
    """Rows get the run's images. The ancestry's are adapted to timm's mean and std unless a setting says otherwise."""
    row = ["--model.rows.0.source=hub", "--model.rows.0.model=test_vit", "--data.channels=3"]
    with pytest.raises(UserError, match=r"set --data.mean 0.5 0.5 0.5 --data.std 0.5 0.5 0.5 --data.image-size 160 "):
        check_images(settings(*row), "model.rows.0")
    one = ["--ancestry.model=test_vit", "--ancestry.source=hub"]
    has(check_images(settings(*one), "ancestry"), "data.crop_pct 0.95", "set --ancestry.image-size 160 --data.crop-pct")
    other = check_images(settings(*one, "--ancestry.mean", "1", "1", "1"), "ancestry")
    has(other, "ancestry.mean 0.5 0.5 0.5, ancestry.image_size 160", "but get 1.0 1.0 1.0, 28, ")
    perhaps = check_images(settings(one[0], "--ancestry.weights=own.safetensors"), "ancestry")
    has(
        perhaps,
        "timm's weights of test_vit (ancestry) expect",
        "if those in own.safetensors do too, set --ancestry.image",
    )


def test_images_of_other_weights_are_not_compared(tmp_path: Path) -> None:
    """An ancestry that is trained, unknown models, a file of which nothing is known."""
    weights = weights_with(tmp_path, "artifact.json", IMAGES)
    for words in (
        [f"--ancestry.weights={weights.with_name('other.safetensors')}"],
        ["--ancestry.source=train", "--ancestry.model=test_vit"],
        ["--ancestry.source=hub", "--ancestry.model=none"],
    ):
        assert check_images(settings(*words), "ancestry") == check_images(settings(*words), "model.rows.0") == ""


def test_weights_that_timm_does_not_have_are_refused() -> None:
    with pytest.raises(UserError, match=r"timm does not have test_vit.none .*: choose another model\.$"):
        check_images(settings("--ancestry.source=hub", "--ancestry.model=test_vit.none"), "ancestry")


def test_paths_that_do_not_divide_the_micro_steps_are_refused() -> None:
    config = tiny_paper()
    config = replace(config, finetune=replace(config.finetune, paths_per_batch=3))
    with pytest.raises(UserError, match=r"finetune.paths_per_batch is 3, .*accumulate \d+: set accumulate to 3,"):
        check_config(config)
