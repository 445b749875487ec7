"""Benchmarks time the modules that stages train: same types, operations, compilation, recomputation and precisions.

A stage and eight benchmarks run for each case, at the smallest sizes, which takes up to half a minute.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from run_helpers import SMALL, Lgp
from torch import nn

from lgp_dist.bench import distil, engine, paths, step
from lgp_dist.models.ancestry import Ancestry
from lgp_dist.models.auxiliary import AuxiliaryRows
from lgp_dist.models.pool import LearngenePool

SETTINGS = {
    "plain": (),
    "compiled": ("--engine.compile=inductor", "--finetune.ancestry-precision=bf16", "--distil.ancestry-precision=bf16"),
    "fused": ("--engine.ops=fused", "--engine.activation-checkpointing=on", "--engine.precision=bf16"),
}
"""Settings that change what a module computes with."""
BENCHES = {
    "paths": ("--repeats=1", "--batch=2", "--out=paths.json"),
    "step": ("--repeats=1", "--batch=2"),
    "engine": ("--rounds=1", "--steps=1", "--out=engine.json"),
    "checkpoint": ("--rounds=1", "--steps=1", "--out=checkpoint.json"),
    "train": ("--rounds=1", "--steps=1", "--out=train.json"),
    "peers": ("--rounds=1", "--steps=1", "--peers=bare", "--out=peers.json"),
}
"""Benchmarks of fine-tuning and options that make them small."""


def flags(module: nn.Module) -> tuple[Any, ...]:
    """What a module computes with, beyond its parameters: compilation, recomputation, operations."""
    names = ("compiled_with", "checkpointed", "grad_checkpointing", "autocast", "training")
    found = {name: vars(module)[name] for name in names if name in vars(module)}
    for name in ("forward", "fused"):
        function = vars(module).get(name)
        if isinstance(function, partial):  # the trainer's own `forward` is a function, compared by `wrapped`
            options = [value for value in (*function.args, *function.keywords.values()) if isinstance(value, str)]
            found[name] = (function.func.__qualname__, *options)
    return tuple((name, repr(value)) for name, value in found.items())


def description(module: nn.Module) -> tuple[Any, ...]:
    """The tree of a module, and whether its forward is wrapped in autocast."""
    tree = [(name, type(each).__name__, flags(each)) for name, each in module.named_modules()]
    tensors = [(name, tensor.dtype, tensor.requires_grad) for name, tensor in module.named_parameters()]
    return ("forward" in vars(module), *tree, *tensors)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, set[tuple[Any, ...]]]]:
    """Descriptions of the models whose forward is called with gradients, by class; nothing is compiled, only noted."""
    found: dict[str, set[tuple[Any, ...]]] = {}

    def noted(kind: type[nn.Module]) -> None:
        original = kind.forward

        def forward(self: nn.Module, *arguments: Any, **options: Any) -> Any:
            if self.training or isinstance(self, Ancestry):
                found.setdefault(kind.__name__, set()).add(description(self))
            return original(self, *arguments, **options)

        monkeypatch.setattr(kind, "forward", forward)

    for kind in (LearngenePool, AuxiliaryRows, Ancestry):
        noted(kind)
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: setattr(self, "compiled_with", options))
    for bench in (paths, step, distil):
        monkeypatch.setattr(bench, "interleaved", called_once)
    monkeypatch.setattr(step, "SHARED", (1,))
    monkeypatch.setattr(step, "ceilings", lambda device, dtype: (1.0, 1.0))
    monkeypatch.setattr(engine, "COUNTED", 1)
    yield found


def called_once(calls: dict[str, Callable[[], Any]], *arguments: Any, **options: Any) -> dict[str, list[float]]:
    """In place of `interleaved`."""
    for call in calls.values():
        call()
    return dict.fromkeys(calls, [1.0])


def taken(seen: dict[str, set[tuple[Any, ...]]]) -> dict[str, set[tuple[Any, ...]]]:
    """What has been seen since the last call."""
    found = dict(seen)
    seen.clear()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("settings", SETTINGS)
def test_benches_time_what_stages_train(
    settings: str,
    seen: dict[str, set[tuple[Any, ...]]],
    finished_place: Path,
    lgp: Lgp,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = (*SMALL, *SETTINGS[settings])
    monkeypatch.setattr(step, "PRECISIONS", ("bf16" if "--engine.precision=bf16" in options else "fp32",))
    stages = {}
    for stage in ("ancestry", "distil", "pool", "finetune"):
        assert lgp(stage, *options, "--force").status == 0
        stages[stage] = taken(seen)
    assert [len(each) for each in stages["finetune"].values()] == [1, 1]
    name, *rest = options
    for bench, more in BENCHES.items():
        compiled = ("--no-compiled",) if bench == "step" and settings != "compiled" else ()
        result = lgp("bench", bench, name, *rest, *more, *compiled)
        assert result.status == 0, result.err
        found = taken(seen)
        for kind, wanted in stages["finetune"].items():
            assert wanted <= found[kind] if bench == "step" else wanted == found[kind], (bench, kind)
    assert lgp("bench", "distil", name, *rest, "--repeats=1", "--batch=2").status == 0
    distilled = taken(seen)
    assert stages["distil"]["Ancestry"] == distilled["Ancestry"]
    assert stages["distil"]["AuxiliaryRows"] <= distilled["AuxiliaryRows"], "all rows together, and each alone"
