"""The judgement of one process on losses and gradients: what is bad, what is a spike, what is remembered."""

import json
import math
import random
from collections.abc import Iterable

import pytest
import torch
from torch import nn

from lgp_dist.config.run_config import EngineConfig, FaultConfig
from lgp_dist.engine.launch.environment import Launch
from lgp_dist.engine.step_filter import FEWEST, NotFinite, StepFilter, StepVerdict
from lgp_dist.engine.workers import Workers
from lgp_dist.tasks.classify import ClassifyTask

GOOD = StepVerdict()


def guard(**faults: float) -> StepFilter:
    workers = Workers(Launch.from_environment({}), EngineConfig(precision="fp32"), 0, 1, torch.device("cpu"))
    task = ClassifyTask(nn.Linear(2, 2))
    return StepFilter(
        task, workers, 2, FaultConfig(**faults), "ancestry", lambda step, micro, rank: f"keys {step}/{micro}"
    )


def judge(
    judging: StepFilter, losses: Iterable[float], gradient: float = 1.0, scaled: bool = False
) -> list[StepVerdict]:
    """Steps of two micro-steps each, whose mean is the loss given."""
    found = []
    for step, loss in enumerate(losses):
        pair = [torch.tensor(loss * 0.5), torch.tensor(loss * 1.5)]
        found.append(judging.judge(step, pair, [("", torch.ones(3)), ("", torch.tensor([0.0, gradient]))], scaled))
        if found[-1].stop:
            raise found[-1].stop
    return found


def series(seed: int, steps: int = 2000) -> list[float]:
    """A falling loss that is noisy and higher on some paths than on others."""
    draw = random.Random(seed)
    levels = [1.0 + 0.5 * draw.random() for _ in range(18)]
    return [
        (0.3 + 2 * math.exp(-step / 300)) * draw.choice(levels) * draw.lognormvariate(0, 0.15) for step in range(steps)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_no_false_alarm(seed: int) -> None:
    assert judge(guard(spike=3.0), series(seed)) == [GOOD] * 2000


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_no_false_alarm_while_a_model_trains(seed: int) -> None:
    """Softmax regression on small random batches, with the guard on its gradients."""
    draw = torch.Generator().manual_seed(seed)
    module, truth, judging = nn.Linear(8, 4), torch.randn(8, 4, generator=draw), guard(spike=3.0)
    for step in range(300):
        losses = []
        for _ in range(2):
            images = torch.randn(16, 8, generator=draw)
            targets = (images @ truth + torch.randn(16, 4, generator=draw)).argmax(1)
            losses.append(nn.functional.cross_entropy(module(images), targets))
        gradients = torch.autograd.grad(sum(losses), list(module.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(module.parameters(), gradients, strict=True):
                parameter -= 0.1 * gradient
        assert judging.judge(step, [loss.detach() for loss in losses], [("", g) for g in gradients], False) == GOOD


def test_a_spike_is_found_and_not_remembered() -> None:
    """Against the median of good steps, so that neither the spikes before it nor the slow fall hide one."""
    losses = series(0, 500)
    for step in (100, 101, 102, 400):
        losses[step] *= 20
    found = judge(guard(spike=3.0, skip_steps=3), losses)
    assert [step for step, verdict in enumerate(found) if verdict == StepVerdict("spike")] == [100, 101, 102, 400]
    assert sum(verdict.skipped for verdict in found) == 4
    assert judge(guard(), losses) == [GOOD] * 500


def test_no_spike_before_there_is_a_median() -> None:
    losses = [1.0] * (FEWEST - 1) + [100.0]
    assert judge(guard(spike=3.0), losses) == [GOOD] * FEWEST
    with pytest.raises(NotFinite, match="loss 100 is more than 3 times the median 1 of 20 good steps, with 150 on"):
        judge(guard(spike=3.0), [1.0, *losses])


def test_the_limit_counts_steps_on_end() -> None:
    """Two may be left out; the third consecutive one stops the run and is named."""
    nan = math.nan
    losses = [1.0, nan, nan, 1.0, nan, math.inf, 1.0]
    reasons = [verdict.reason for verdict in judge(guard(skip_steps=2), losses)]
    assert reasons == ["", "loss", "loss", "", "loss", "loss", ""]
    with pytest.raises(NotFinite) as caught:
        judge(guard(skip_steps=2), [1.0, nan, nan, nan])
    assert caught.value.step == 3
    assert str(caught.value) == (
        "Nothing of step 3 of stage ancestry was applied, nor of the 2 before it: the loss is nan on rank 0, "
        "micro-step 0 (keys 3/0) and rank 0, micro-step 1 (keys 3/1): lower ancestry.train.lr, look at these samples, "
        "or raise --faults.skip-steps from 2."
    )


@pytest.mark.parametrize("gradient", [math.nan, math.inf, -math.inf, 1e30])
def test_gradients(gradient: float) -> None:
    """1e30 is finite, but its square is not, and so no norm."""
    assert judge(guard(skip_steps=1), [1.0], gradient) == [StepVerdict("gradient", overflow=True)]
    with pytest.raises(NotFinite, match="gradient of what every forward uses is not finite"):
        judge(guard(), [1.0], gradient)


def test_an_overflow_of_fp16_is_no_fault() -> None:
    """Its loss scale halves until no step overflows, however often; a loss that is not finite is one."""
    judging = guard()
    assert judge(judging, [1.0] * 50, math.inf, scaled=True) == [StepVerdict("overflow", overflow=True)] * 50
    assert not judging.good and not judging.skipped
    with pytest.raises(NotFinite, match="the loss is inf"):
        judge(judging, [math.inf], math.inf, scaled=True)


def test_it_goes_on_from_its_state() -> None:
    """Through JSON: what is left out after it, and where the run stops."""
    losses = [*series(1, 150), 1e3, 1.0, 1e3, 1e3, 1e3]
    whole = guard(spike=3.0, skip_steps=2)
    for cut in (10, 149, 151, 154):
        first, second = guard(spike=3.0, skip_steps=2), guard(spike=3.0, skip_steps=2)
        judge(first, losses[:cut])
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        with pytest.raises(NotFinite) as caught:
            judge(second, losses[cut:])
        assert caught.value.step == len(losses) - 1 - cut
    with pytest.raises(NotFinite, match="step 154"):
        judge(whole, losses)
