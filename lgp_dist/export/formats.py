"""The files that a descendant is written as, and how each is run again."""

import importlib
import importlib.util
import logging
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import timm
import torch
from torch import Tensor, nn

import lgp_dist.timm_models  # noqa: F401  makes stitched paths known to timm
from lgp_dist.config.run_config import Format
from lgp_dist.errors import UserError
from lgp_dist.export import modeling_descendant

Runner = Callable[[Tensor], Tensor]
"""[B, C, H, W] images to [B, classes] logits."""

CODE = "modeling_descendant.py"
"""The plain-torch model's file."""


@dataclass(frozen=True)
class FileFormat:
    """One way to load an exported folder."""

    file: str
    """Its name in the folder."""
    bound: float | None
    """Largest difference of a logit from the model in memory that an export may have; None where only its accuracy is
    compared."""
    write: Callable[[nn.Module, Tensor, Path], None]
    """(model on the CPU in eval mode, two images, folder) writes the file."""
    open: Callable[[Path], Runner]
    """The folder's model."""


def _write_code(model: nn.Module, images: Tensor, folder: Path) -> None:
    shutil.copyfile(modeling_descendant.__file__, folder / CODE)


def _write_pt2(model: nn.Module, images: Tensor, folder: Path) -> None:
    program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    torch.export.save(program, folder / "model.pt2")


def _write_onnx(model: nn.Module, images: Tensor, folder: Path) -> None:
    """Through TorchScript: onnxruntime's quantisation refuses what the newer exporter writes (its shape inference)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter's age, and of constants that the tracer finds
        torch.onnx.export(
            model,
            (images,),
            folder / "model.onnx",
            dynamo=False,
            input_names=["images"],
            output_names=["logits"],
            dynamic_axes={"images": {0: "batch"}, "logits": {0: "batch"}},
        )


def _write_int8(model: nn.Module, images: Tensor, folder: Path) -> None:
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # it advises a preparation that only convolutions need
    try:
        quantise = _extra("onnxruntime.quantization").quantize_dynamic
        quantise(folder / "model.onnx", folder / "model.int8.onnx", op_types_to_quantize=["MatMul", "Gemm"])
    finally:
        root.setLevel(level)


def _open_timm(folder: Path) -> Runner:
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


def _open_pt2(folder: Path) -> Runner:
    return torch.export.load(folder / "model.pt2").module()


def _open_onnx(path: Path) -> Runner:
    runtime = _extra("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def _nothing(*_: Any) -> None:
    """model.safetensors is there already."""


FORMATS = {
    "timm": FileFormat("model.safetensors", 0.0, _nothing, _open_timm),
    "torch": FileFormat(CODE, 1e-5, _write_code, modeling_descendant.load),
    "pt2": FileFormat("model.pt2", 1e-5, _write_pt2, _open_pt2),
    "onnx": FileFormat("model.onnx", 1e-4, _write_onnx, lambda folder: _open_onnx(folder / "model.onnx")),
    "int8": FileFormat("model.int8.onnx", None, _write_int8, lambda folder: _open_onnx(folder / "model.int8.onnx")),
}
"""By name; the first two are always written."""


def _extra(module: str) -> ModuleType:
    """A module of the extra `onnx`, which `wanted` has found."""
    return importlib.import_module(module)


def wanted(formats: tuple[Format, ...]) -> tuple[list[str], str]:
    """Names of the formats to write, and a sentence on those that are left out, empty where none is.

    They are those that always are and those asked for, less what is not installed. UserError for int8 without onnx.
    """
    if "int8" in formats and "onnx" not in formats:
        raise UserError("The formats have int8 without onnx, which it is made from: add onnx, or leave out int8.")
    asked = ["timm", "torch", *(name for name in FORMATS if name in formats)]
    missing = [name for name in ("onnx", "onnxruntime") if importlib.util.find_spec(name) is None]
    if not missing or "onnx" not in asked:
        return asked, ""
    left_out = " and ".join(FORMATS[name].file for name in asked if name in ("onnx", "int8"))
    advice = "`pip install 'lgp_dist[onnx]'` and export again"
    sentence = f"{left_out} left out, since {' and '.join(missing)} is not installed: {advice}."
    return [name for name in asked if name not in ("onnx", "int8")], sentence
