"""Loss terms, counts of correct images and the fine-tuning task against NumPy."""

import numpy as np
import pytest
import torch
from numerics_cases import HEADS, TWO, array, images, label_loss, shake, soft_loss, stock_rows, stock_vit
from torch import Tensor, nn

from lgp_dist.config.run_config import EngineConfig, FinetuneConfig
from lgp_dist.engine.evaluate import accuracies, correct
from lgp_dist.engine.launch.environment import Launch
from lgp_dist.engine.workers import Workers
from lgp_dist.models.ancestry import Ancestry
from lgp_dist.models.pool import LearngenePool
from lgp_dist.paths.sampler import PathSampler
from lgp_dist.protocols import Batch, StepContext
from lgp_dist.tasks.classify import ClassifyTask
from lgp_dist.tasks.finetune import FinetuneTask
from lgp_dist.tasks.losses import cross_entropy, mean_squared_error, soft_cross_entropy

CONTEXTS = [StepContext(step, micro, rank, 3) for step in (0, 11) for micro in (0, 1) for rank in (0, 2)]


@pytest.mark.parametrize("soft", [False, True])
def test_cross_entropy(soft: bool) -> None:
    """Mean over the batch, for labels and for soft targets, also with logits far from zero."""
    logits = 30 * torch.randn(7, 10)
    targets = torch.randn(7, 10).softmax(-1) if soft else torch.randint(10, (7,))
    assert float(cross_entropy(logits, targets)) == pytest.approx(label_loss(array(logits), array(targets)), rel=1e-5)


@pytest.mark.parametrize("tau", [0.5, 1.0, 2.0])
def test_soft_cross_entropy(tau: float) -> None:
    """`sample` is the mean over the batch of the sum over classes; `paper` is smaller by the number of classes."""
    ancestry, logits = 5 * torch.randn(6, 10), 5 * torch.randn(6, 10)
    sample = float(soft_cross_entropy(ancestry, logits, tau, "sample"))
    assert sample == pytest.approx(soft_loss(array(ancestry), array(logits), tau, "sample"), rel=1e-5)
    assert float(soft_cross_entropy(ancestry, logits, tau, "paper")) == pytest.approx(sample / 10, rel=1e-5)


def test_soft_cross_entropy_is_least_at_the_ancestry() -> None:
    """At the ancestry's own logits the gradient vanishes, and any other logits cost more."""
    ancestry = torch.randn(6, 10)
    logits = ancestry.clone().requires_grad_()
    least = soft_cross_entropy(ancestry, logits, 2.0, "sample")
    least.backward()
    assert logits.grad.abs().max() < 1e-7
    assert soft_cross_entropy(ancestry, ancestry + 0.3 * torch.randn(6, 10), 2.0, "sample") > least


def test_half_precision_logits_are_summed_in_float32() -> None:
    """bf16 logits give the loss of their own values, not one rounded to bf16."""
    logits, ancestry, targets = torch.randn(64, 10), torch.randn(64, 10), torch.randint(10, (64,))
    short, teacher = logits.bfloat16(), ancestry.bfloat16()
    found = cross_entropy(short, targets), soft_cross_entropy(teacher, short, 1.0, "sample")
    assert [part.dtype for part in found] == [torch.float32, torch.float32]
    assert float(found[0]) == pytest.approx(label_loss(array(short), array(targets)), rel=1e-5)
    assert float(found[1]) == pytest.approx(soft_loss(array(teacher), array(short), 1.0, "sample"), rel=1e-5)
    pair = (torch.randn(2, 5, 8).bfloat16(), torch.randn(2, 5, 8).bfloat16())
    expected = np.square(array(pair[0]) - array(pair[1])).mean()
    assert float(mean_squared_error([pair])) == pytest.approx(expected, rel=1e-5)


def test_mean_squared_error_is_the_mean_over_levels() -> None:
    """Each level weighs the same; no levels cost nothing."""
    pairs = [(torch.randn(2, 5, 8), torch.randn(2, 5, 8)) for _ in range(3)]
    expected = np.mean([np.square(array(a) - array(b)).mean() for a, b in pairs])
    assert float(mean_squared_error(pairs)) == pytest.approx(expected, rel=1e-6)
    assert mean_squared_error([]) == 0.0


def counted(logits: np.ndarray, targets: np.ndarray, weight: np.ndarray) -> tuple[float, float]:
    """Weighted number of images whose label is first, and among the first five, by sorting."""
    order = np.argsort(-logits, axis=1)
    place = np.array([list(row).index(label) for row, label in zip(order, targets, strict=True)])
    return float(weight[place == 0].sum()), float(weight[place < 5].sum())


@pytest.mark.parametrize("classes", [2, 3, 5, 6, 10])
def test_correct_counts_first_and_first_five(classes: int) -> None:
    """Against sorting in NumPy; images of weight 0 do not count; with five classes or fewer all are in the first 5."""
    logits, targets = torch.randn(200, classes), torch.randint(classes, (200,))
    weight = (torch.rand(200) > 0.3).float()
    found = correct(logits, targets, weight)
    assert found.dtype == torch.float64
    assert tuple(found.tolist()) == counted(array(logits), targets.numpy(), array(weight))
    assert 0 < found[0] < weight.sum()
    assert (found[1] == weight.sum()) == (classes <= 5)


def test_accuracies_of_two_models_in_one_pass() -> None:
    """Per cent of the weighted images over uneven batches, for every model by its name."""
    first, second = nn.Linear(12, 10), nn.Linear(12, 10)
    sizes = (16, 16, 5)
    batches = [Batch(torch.randn(n, 12), torch.randint(10, (n,)), (torch.rand(n) > 0.2).float()) for n in sizes]
    workers = Workers(Launch.from_environment({}), EngineConfig(precision="fp32"), 0, 1, torch.device("cpu"))
    found = accuracies({"first": first, "second": second}, iter(batches), workers)
    total = sum(float(batch.weight.sum()) for batch in batches)
    assert list(found) == ["first", "second"]
    for name, model in (("first", first), ("second", second)):
        counts = [counted(array(model(b.images)), b.targets.numpy(), array(b.weight)) for b in batches]
        assert found[name] == pytest.approx([100 * sum(column) / total for column in zip(*counts, strict=True)])


def finetune_task(config: FinetuneConfig, *, teacher: bool = True) -> FinetuneTask:
    """A pool of two rows, with or without an ancestry."""
    pool = LearngenePool(TWO, stock_rows(TWO)).eval()
    shake(pool)
    ancestry = Ancestry(stock_vit(32, 12, 4)) if teacher else None
    return FinetuneTask(pool, ancestry, PathSampler(TWO.paths, config.policy, seed=5), config)


def path_logits(task: FinetuneTask, batch: Tensor, context: StepContext) -> np.ndarray:
    """Logits of the path whose key the task reports."""
    with torch.no_grad():
        return array(task.module(batch, TWO.by_key(task.labels(context)["path"])))


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        FinetuneConfig(),
        FinetuneConfig(policy="shared", tau=2.0, distil_weight=0.3),
        FinetuneConfig(loss_scale="paper", distil_weight=7.0),
        FinetuneConfig(distil="hard", distil_weight=0.5, label_weight=0.5),
        FinetuneConfig(label_weight=0.0),
    ],
)
def test_finetune_losses(config: FinetuneConfig, soft: bool) -> None:
    """label_weight * CE + distil_weight * soft CE on the drawn path, whose key is what the task logs; hard: CE to the
    ancestry's likeliest class."""
    task = finetune_task(config)
    targets = torch.randn(4, 10).softmax(-1) if soft else torch.tensor([3, 0, 9, 3])
    batch = Batch(images(4), targets, torch.ones(4))
    teacher = array(task.ancestry.vit(batch.images))
    for context in CONTEXTS:
        logits = path_logits(task, batch.images, context)
        cls, pred = label_loss(logits, array(targets)), soft_loss(teacher, logits, config.tau, config.loss_scale)
        if config.distil == "hard":
            pred = label_loss(logits, teacher.argmax(1))
        losses = task.losses(task.module, batch, context)
        assert [name for name, value in losses.items() if value.requires_grad] == ["loss"]
        found = {name: value.item() for name, value in losses.items()}
        loss = config.label_weight * cls + config.distil_weight * pred
        expected = {"loss": loss, "cls": cls, "pred": pred}
        assert found == pytest.approx(expected, rel=1e-5)
    assert len({task.labels(context)["path"] for context in CONTEXTS}) > 1


def test_finetune_without_ancestry() -> None:
    """Labels alone: the loss is the cross-entropy, and there is no soft part."""
    task, batch = finetune_task(FinetuneConfig(distil_weight=0.0), teacher=False), images(4)
    labels = torch.tensor([1, 2, 3, 4])
    found = task.losses(task.module, Batch(batch, labels, torch.ones(4)), CONTEXTS[0])
    expected = label_loss(path_logits(task, batch, CONTEXTS[0]), labels.numpy())
    assert {name: value.item() for name, value in found.items()} == pytest.approx({"loss": expected, "cls": expected})


def test_finetune_label_is_the_samplers_draw() -> None:
    """The logged key is the path of this rank, step and micro-step, and asking for it changes nothing."""
    task = finetune_task(FinetuneConfig())
    sampler = PathSampler(TWO.paths, "independent", seed=5)
    for context in CONTEXTS:
        drawn = sampler.draw(context.step, context.micro_step, context.rank, context.world)
        assert task.labels(context) == {"path": drawn.key} == task.labels(context)


def test_finetune_gradient_stays_on_the_drawn_path() -> None:
    """The module gets a gradient where the drawn path has parameters, the ancestry none."""
    task = finetune_task(FinetuneConfig())
    task.losses(task.module, Batch(images(2), torch.tensor([1, 2]), torch.ones(2)), CONTEXTS[0])["loss"].backward()
    reached = sum(p.numel() for p in task.module.parameters() if p.grad is not None)
    assert reached == TWO.cost(TWO.by_key(task.labels(CONTEXTS[0])["path"])).params
    assert all(p.grad is None for p in task.ancestry.parameters())


def test_feature_loss_compares_the_last_block_with_the_ancestrys() -> None:
    """A path of the ancestry's width learns its last block; the narrow row, of another width, has no such loss."""
    task = finetune_task(FinetuneConfig(feature_weight=0.7))
    batch = Batch(images(4), torch.tensor([3, 0, 9, 3]), torch.ones(4))
    tapped: list[Tensor] = []
    hook = task.ancestry.vit.blocks[-1].register_forward_hook(lambda block, given, out: tapped.append(out))
    teacher = array(task.ancestry.vit(batch.images))
    hook.remove()
    block = array(tapped[0])
    block = (block - block.mean(-1, keepdims=True)) / np.sqrt(block.var(-1, keepdims=True) + 1e-5)
    seen = set()
    for context in (StepContext(step, 0, rank, 3) for step in range(8) for rank in range(3)):
        path = TWO.by_key(task.labels(context)["path"])
        with torch.no_grad():
            logits, tokens = (array(out) for out in task.module(batch.images, path, True))
        cls, pred = label_loss(logits, array(batch.targets)), soft_loss(teacher, logits, 1.0, "sample")
        feature = np.square(tokens - block).mean() if path.last_row == 1 else 0.0
        found = {name: value.item() for name, value in task.losses(task.module, batch, context).items()}
        expected = {"loss": cls + pred + 0.7 * feature, "cls": cls, "pred": pred, "feature": feature}
        assert found == pytest.approx(expected, rel=1e-4)
        seen.add(path.last_row)
    assert seen == {0, 1}


@pytest.mark.parametrize("distil_weight", [0.0, 1.0])
def test_other_paths_learn_the_lead_paths_outputs(distil_weight: float) -> None:
    """The first of three micro-steps trains the widest row, with the ancestry where it runs; the others learn its
    logits and tokens, which have no gradient."""
    config = FinetuneConfig(paths_per_batch=3, lead_weight=0.8, feature_weight=0.5, distil_weight=distil_weight)
    pool = LearngenePool(TWO, stock_rows(TWO)).eval()
    shake(pool)
    ancestry = Ancestry(stock_vit(32, 12, 4)) if distil_weight else None
    task = FinetuneTask(pool, ancestry, PathSampler(TWO.paths, "independent", 5, 3, lead_every=3), config)
    batch = Batch(images(4), torch.tensor([3, 0, 9, 3]), torch.ones(4))
    lead = task.module.space.paths[1]
    with torch.no_grad():
        lead_logits, lead_tokens = (array(out) for out in pool(batch.images, lead, True))
    for micro in range(3):
        context = StepContext(2, micro, 1, 2)
        path = TWO.by_key(task.labels(context)["path"])
        assert (path == lead) == (micro == 0)
        found = task.losses(task.module, batch, context)
        with torch.no_grad():
            logits, tokens = (array(out) for out in pool(batch.images, path, True))
        cls = label_loss(logits, array(batch.targets))
        if micro == 0:
            taught = distil_weight * found["pred"].item() + 0.5 * found["feature"].item()
            assert (found["pred"].item() > 0) == bool(distil_weight)
        else:
            pred = soft_loss(lead_logits, logits, 1.0, "sample")
            feature = np.square(tokens - lead_tokens).mean() if path.last_row == 1 else 0.0
            assert (found["pred"].item(), found["feature"].item()) == pytest.approx((pred, feature), rel=1e-4)
            taught = 0.8 * pred + 0.5 * feature
        assert found["loss"].item() == pytest.approx(cls + taught, rel=1e-4)


def test_classify_task() -> None:
    """Plain training: the cross-entropy and nothing else."""
    model = stock_vit(16, 3, HEADS[TWO][0])
    batch = Batch(images(3), torch.tensor([1, 5, 9]), torch.ones(3))
    found = ClassifyTask(model).losses(model, batch, CONTEXTS[0])
    expected = label_loss(array(model(batch.images)), batch.targets.numpy())
    assert {name: value.item() for name, value in found.items()} == pytest.approx({"loss": expected, "cls": expected})
    assert ClassifyTask(model).labels(CONTEXTS[0]) == {}
