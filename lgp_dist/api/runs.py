"""A finished run in Python: its paths, its pool, and models made from it."""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from lgp_dist.commands.descendants import choose_of_run, export_of_run
from lgp_dist.commands.finished import FinishedRun, exporting
from lgp_dist.config.budget import Budget, parse_amount
from lgp_dist.config.run_config import ExportConfig, Format
from lgp_dist.errors import UserError
from lgp_dist.export.choice import choose
from lgp_dist.files import beside, locked
from lgp_dist.models.build import build_pool
from lgp_dist.models.descendant import descendant_from_path
from lgp_dist.models.pool import LearngenePool
from lgp_dist.paths.space import heads_of
from lgp_dist.run.checks import check_config
from lgp_dist.run.path_rows import PathRow, read_rows
from lgp_dist.run.tensors import load_tensors


def open_run(folder: str | Path) -> "Run":
    """A run directory in which `lgp evaluate` is complete; UserError for any other."""
    return Run(FinishedRun.open(Path(folder)))


@dataclass(frozen=True)
class Run:
    """A finished run, as `open_run` opens it. Nothing here changes it, except that latencies are kept in it."""

    finished: FinishedRun

    def paths(self) -> list[PathRow]:
        """A dict for each evaluated path: key, params, flops (multiply-adds of an image), top1, top5 and more."""
        return read_rows(self.finished.evaluated.folder / "paths.json")

    def frame(self) -> Any:
        """The same as a pandas DataFrame; UserError where pandas is not installed."""
        try:
            pandas = importlib.import_module("pandas")
        except ModuleNotFoundError:
            raise UserError(
                "frame() needs pandas, which is not installed: `pip install pandas`, or use paths()."
            ) from None
        return pandas.DataFrame(self.paths())

    def best(
        self,
        max_params: float | str = 0,
        max_flops: float | str = 0,
        max_latency_ms: float = 0.0,
        device: Literal["cpu", "cuda"] = "cpu",
    ) -> PathRow:
        """The row of the most accurate path within all limits, as `lgp descend` chooses it; UserError if none fits.

        Limits of parameters and FLOPs are numbers, or texts such as "10M"; 0 for none. device: where latency is
        measured, if it is limited.
        """
        params, flops = (parse_amount(str(limit)) for limit in (max_params, max_flops))
        budget = Budget(params, flops, max_latency_ms, device)
        check_config(replace(self.finished.config, budget=budget))
        if max_latency_ms:
            return choose_of_run(self.finished, self.paths(), budget, plot=False)
        return choose(self.paths(), budget, "")

    def pool(self, device: str | torch.device = "cpu") -> LearngenePool:
        """The trained pool in eval mode: `pool(images, key)` gives a path's logits."""
        tuned = self.finished.directory.require("finetune")
        return build_pool(self.finished.config, torch.device(device), load_tensors(tuned.folder / "pool.safetensors"))

    def descendant(self, key: str) -> nn.Module:
        """A path as a model that owns its weights, in eval mode: timm's plain ViT, or a stitched one."""
        pool = self.pool()
        return descendant_from_path(pool, heads_of(self.finished.config), pool.space.by_key(key))

    def export(self, key: str, out: str | Path, formats: Sequence[Format] = (), images: int = 64) -> Path:
        """Writes a path as `lgp export` does, compared with the pool on validation images; the folder.

        formats: of pt2, onnx and int8, in addition to safetensors and plain torch.
        """
        out = Path(out)
        run = exporting(self.finished.root, out, ExportConfig(path=key, formats=tuple(formats), images=images))
        with locked(beside(out), "out"):
            export_of_run(run, out, [])
        return out
