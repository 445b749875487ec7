"""`lgp bench train`, `peers` and `distil`: what is trained, counted, advised and refused."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from run_helpers import SAMPLE, Lgp, has
from torch._dynamo.utils import counters

from lgp_dist.bench.distil import by_arithmetic
from lgp_dist.bench.loop.interleave import Finetuning, InterleavedBatches
from lgp_dist.bench.loop.phases import PHASES, advice
from lgp_dist.bench.loop.train import peak_of
from lgp_dist.bench.loop.train_loops import bare, independent_sampler
from lgp_dist.config.run_config import EngineConfig, GradientConfig
from lgp_dist.engine.launch.environment import Launch
from lgp_dist.engine.optim import build_optimizer
from lgp_dist.engine.trainer import Trainer
from lgp_dist.engine.watch.watchdog import Watchdog
from lgp_dist.engine.workers import Workers
from lgp_dist.models.pool import LearngenePool
from lgp_dist.paths.sampler import PathSampler
from lgp_dist.paths.stitched import PathSpace
from lgp_dist.protocols import Batch
from lgp_dist.recipes import pool12, tiny_paper
from lgp_dist.tasks.finetune import FinetuneTask

SMALL = (
    "tiny_paper",
    f"--data.root={SAMPLE}",
    "--finetune.train.batch-size=4",
    "--engine.device=cpu",
    "--engine.threads=1",
)


def finetuning(**changes: Any) -> Finetuning:
    """Four images in a step, at a rate that stays the same; eps keeps gradients of rounding alone small."""
    config = tiny_paper()
    fixed = {"warmup_epochs": 0.0, "min_lr": config.finetune.train.lr, "eps": 1e-3}
    train = replace(config.finetune.train, batch_size=4, **fixed)
    finetune = replace(config.finetune, train=train, **changes)
    engine = EngineConfig(precision="fp32", device="cpu", threads=1)
    data = replace(config.data, root=str(SAMPLE))
    return Finetuning(replace(config, data=data, finetune=finetune, engine=engine), Workers.start(engine))


def test_interleaved_batches_gives_every_batch_once_and_reports_blocks() -> None:
    stored = [Batch(torch.tensor([number]), torch.zeros(1), torch.ones(1)) for number in range(40)]
    said: list[Any] = []

    def source(first: int, count: int) -> Iterator[Batch]:
        return iter(stored[2 * first : 2 * (first + count)])

    batches = InterleavedBatches(
        source, 2, ("a", "b"), (1, 3, 1), lambda: None, said.append, lambda kind, steps, _: said.append((kind, steps))
    )
    assert batches.steps == 17
    given = [int(batch.images) for batch in batches(0, batches.steps)]
    assert given == list(range(34))
    ranges = [range(1, 4), range(5, 8), range(9, 12), range(13, 16)]
    assert said == [part for kind, steps in zip("abab", ranges, strict=True) for part in (kind, (kind, steps))]


def test_the_bare_loop_trains_what_the_loop_trains() -> None:
    """The same weights after the same steps: what is compared does the same work."""
    bench = finetuning()
    kept = [next(bench.batches(number, 1)) for number in range(3)]
    batches = InterleavedBatches(
        lambda first, count: (kept[step % 3] for step in range(first, first + count)),
        1,
        ("lgp",),
        (1, 2, 0),
        bench.wait,
        lambda kind: None,
        lambda kind, steps, seconds: None,
    )
    task = bench.task()
    start = {name: value.clone() for name, value in task.module.state_dict().items()}
    bench.run(task, batches, Watchdog.off())
    loop = bare(bench, 0, kept)
    module = loop.module
    loop.run(range(batches.steps), 0)
    for name, value in module.state_dict().items():
        assert torch.allclose(value, task.module.state_dict()[name], atol=2e-6), name
    assert any(not torch.equal(value, start[name]) for name, value in module.state_dict().items())


def test_what_ranks_draw_alone_is_the_policy_independent() -> None:
    bench = finetuning(policy="balanced")
    plain = finetuning(policy="independent").sampler
    own = independent_sampler(bench)
    assert [own.draw(step, 0, rank, 2) for step in range(9) for rank in range(2)] == [
        plain.draw(step, 0, rank, 2) for step in range(9) for rank in range(2)
    ]


@pytest.mark.slow
def test_train_writes_one_object(lgp: Lgp, tmp_path: Path) -> None:
    out = tmp_path / "train.json"
    result = lgp("bench", "train", *SMALL, "--rounds=1", "--steps=2", "--out", out)
    assert result.status == 0, result.err
    (row,) = json.loads(out.read_text())
    assert row["images_per_s"] == pytest.approx(4 / row["step_ms"] * 1e3, rel=1e-2)
    assert all(row[f"{name}_ms"] >= 0 for name in (*PHASES, "transfer", "skew"))
    assert all(row[f"{name}_ms"] > 0 for name in ("data", "forward", "backward", "optimizer", "loop"))
    assert row["exchange_ms"] == 0 and row["mfu"] is None and row["peak_mb"] > 0
    assert row["tflops_per_rank"] > 0 and row["advice"] in result.out
    again = lgp("bench", "train", *SMALL, "--rounds=1", "--steps=2", "--out", out, "--compare", out)
    has(again.out, "now over before", "images_per_s", "tiny_paper one all independent")


@pytest.mark.slow
def test_peers_compares_in_one_run(lgp: Lgp, tmp_path: Path) -> None:
    """Both draw the same paths where the policy is `independent`; timm's loop has the widest row alone."""
    out = tmp_path / "peers.json"
    result = lgp("bench", "peers", *SMALL, "--rounds=1", "--steps=2", "--workers=0", "--out", out)
    assert result.status == 0, result.err
    rows = {row["peer"]: row for row in json.loads(out.read_text())}
    assert list(rows) == ["bare", "snnet", "timm"]
    for row in rows.values():
        ratio = row["images_per_s"] / row["peer_images_per_s"]
        assert row["ratio"] == pytest.approx(ratio, rel=1e-2) and row["gmacs"] == row["peer_gmacs"]
    space = PathSpace.from_config(tiny_paper())
    assert rows["timm"]["only"] == ["r1.0-5"] and not rows["timm"]["ancestry"]
    assert rows["timm"]["gmacs"] == pytest.approx(3 * space.cost(space.by_key("r1.0-5")).flops / 1e9, abs=1e-6)


def row(**changes: Any) -> dict[str, Any]:
    """A step of 100 ms without waste."""
    parts = {"data": 0, "forward": 40, "backward": 60, "exchange": 0, "optimizer": 0, "loop": 0, "transfer": 0}
    about = {"policy": "independent", "engine": "ddp", "ranks": 2, "compile": "", "threads": 3, "mfu": None}
    return {f"{name}_ms": value for name, value in parts.items()} | about | {"skew_ms": 0, "of_product": 0.5} | changes


@pytest.mark.parametrize(
    ("changes", "pieces"),
    [
        ({"data_ms": 50}, ["images", "data.threads (now 3)"]),
        ({"skew_ms": 20, "exchange_ms": 25, "transfer_ms": 5}, ["slower", "balanced (now independent)"]),
        ({"skew_ms": 20, "exchange_ms": 20, "policy": "balanced"}, ["slower", "finetune.costs"]),
        ({"exchange_ms": 30, "transfer_ms": 30}, ["exchange", "engine.reduction union"]),
        ({"exchange_ms": 30, "transfer_ms": 30, "engine": "zero3"}, ["ZeRO stage 1 or 2"]),
        ({"optimizer_ms": 20}, ["optimizer", "ZeRO stage 1"]),
        ({"optimizer_ms": 20, "ranks": 1}, ["optimizer", "batch_size"]),
        ({"loop_ms": 20}, ["loop", "batch_size"]),
        ({"of_product": 0.1}, ["77.78 of 100.00 ms", "engine.compile inductor"]),
        ({"mfu": 0.1, "compile": "inductor"}, ["77.78 of 100.00 ms", "batch_size"]),
        ({"of_product": None, "data_ms": 1}, ["images"]),
    ],
)
def test_advice_names_the_largest_waste(changes: dict[str, Any], pieces: list[str]) -> None:
    has(advice(row(**changes)), *pieces)


def test_peaks_are_of_known_gpus_alone() -> None:
    assert peak_of("NVIDIA H100 80GB HBM3", "bf16") == 989e12
    assert peak_of("NVIDIA H100 PCIe", "bf16") == 756e12
    assert peak_of("NVIDIA A100-SXM4-80GB", "fp16") == 312e12
    assert peak_of("NVIDIA H100 80GB HBM3", "fp32") is peak_of("cpu", "bf16") is None


def test_distil_by_arithmetic_and_measured(lgp: Lgp) -> None:
    """0.72 for the paper's pool."""
    config = pool12()
    assert by_arithmetic(config) == pytest.approx(0.72, abs=0.005)
    call = (
        "bench",
        "distil",
        "tiny",
        "--batch=2",
        "--repeats=1",
        "--engine.device=cpu",
        "--engine.threads=1",
        "--json",
    )
    (found,) = json.loads(lgp(*call).out)
    assert found["ratio"] == pytest.approx(found["together_ms"] / found["apart_ms"], rel=1e-2)
    assert found["batch"] == 2 and found["by_arithmetic"] == by_arithmetic(tiny_paper())


@pytest.mark.slow
@pytest.mark.parametrize(("ops", "graphs"), [("reference", 2), ("fused", 3)])
def test_a_graph_for_each_width_serves_all_blocks_and_paths(ops: Any, graphs: int) -> None:
    """As the trainer compiles them; fused, the block that a stitch enters has a graph of its own.

    No path makes another; measuring on the way has as many of its own, once.
    """
    torch.compiler.reset()
    counters.clear()
    config = tiny_paper()
    space, train = PathSpace.from_config(config), config.finetune.train
    pool = LearngenePool.empty(space, (1, 3)).train()
    pool.set_ops(ops)
    workers = Workers(
        Launch.from_environment({}), EngineConfig(precision="fp32", compile="eager"), 0, 1, torch.device("cpu")
    )
    task = FinetuneTask(pool, None, PathSampler(space.paths, "independent", 0), config.finetune)
    trainer = Trainer(
        workers, task, build_optimizer(pool, train, skippable=task.structure.skippable_modules), train, GradientConfig()
    )
    images = torch.randn(2, 1, 28, 28)
    for count in (graphs, 2 * graphs):
        for path in space.paths:
            trainer.module(images, path).sum().backward()
        assert counters["stats"]["unique_graphs"] == count and not counters["graph_break"]
        with torch.no_grad():
            trainer.measure(lambda module: {path.key: float(module(images, path).sum()) for path in space.paths})
        assert counters["stats"]["unique_graphs"] == 2 * graphs and not counters["graph_break"]
    trainer.close()


@pytest.mark.parametrize(
    ("arguments", "pieces"),
    [
        (["train", "tiny", "--out=x.json", "--rounds=0"], ["--rounds", "0", "1 or more"]),
        (["train", "tiny", "--out=x.json", "--steps=0"], ["--steps", "0", "1 or more"]),
        (["peers", "tiny", "--out=x.json", "--peers=bare,other"], ["--peers", "'other'", "snnet"]),
        (["peers", "tiny", "--out=x.json", "--workers=-1"], ["--workers", "-1"]),
        (["distil", "tiny", "--repeats=0"], ["--repeats", "0"]),
    ],
)
def test_arguments_that_cannot_be(
    lgp: Lgp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], pieces: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    has(lgp("bench", *arguments).sentence, *pieces)
    assert not list(tmp_path.iterdir())
