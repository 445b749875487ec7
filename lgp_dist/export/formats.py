"""The file formats of an exported descendant: how each is written, and how it is loaded again."""

import importlib
import importlib.util
import logging
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict

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
"""The file of the model in plain torch."""


class CheckedFile(TypedDict):
    """How far a file's logits are from the path's."""

    file: str
    largest_difference: float
    bound: float | None


class Int8Accuracy(TypedDict):
    """Top-1 in percent of the int8 model and the path on the same images."""

    images: int
    top1_path: float
    top1: float
    loss: float
    """Points; negative if int8 is better."""


class Verification(TypedDict):
    """verify.json."""

    images: int
    formats: dict[str, CheckedFile]
    left_out: str
    """A sentence on formats that were not written; empty if all were."""
    int8: NotRequired[Int8Accuracy]


@dataclass(frozen=True)
class FileFormat:
    """One way to load an exported folder."""

    file: str
    """Its name in the folder."""
    bound: float | None
    """Largest difference of a logit from the path that is allowed; None if only the accuracy is compared."""
    write: Callable[[nn.Module, Tensor, Path], None]
    """Writes the file: (model on the CPU in eval mode, two images, folder)."""
    open: Callable[[Path], Runner]
    """Loads the folder's model."""


def _write_code(model: nn.Module, images: Tensor, folder: Path) -> None:
    shutil.copyfile(modeling_descendant.__file__, folder / CODE)


def _write_pt2(model: nn.Module, images: Tensor, folder: Path) -> None:
    program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    torch.export.save(program, folder / "model.pt2")


def export_graph(model: nn.Module, images: Tensor, file: Path, **options: Any) -> None:
    """Writes a model as ONNX, for any batch size. options: of `torch.onnx.export`.

    Through TorchScript: onnxruntime cannot quantise the newer exporter's file (its shape inference fails).
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on the exporter's age and on traced constants
        torch.onnx.export(
            model,
            (images,),
            file,
            dynamo=False,
            input_names=["images"],
            output_names=["logits"],
            dynamic_axes={"images": {0: "batch"}, "logits": {0: "batch"}},
            **options,
        )


def _write_onnx(model: nn.Module, images: Tensor, folder: Path) -> None:
    export_graph(model, images, folder / "model.onnx")


def _write_int8(model: nn.Module, images: Tensor, folder: Path) -> None:
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # it recommends a preparation that only convolutions need
    try:
        quantise = importlib.import_module("onnxruntime.quantization").quantize_dynamic
        quantise(folder / "model.onnx", folder / "model.int8.onnx", op_types_to_quantize=["MatMul", "Gemm"])
    finally:
        root.setLevel(level)


def _open_timm(folder: Path) -> Runner:
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


def _open_pt2(folder: Path) -> Runner:
    return torch.export.load(folder / "model.pt2").module()


def _open_onnx(path: Path) -> Runner:
    runtime = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def _nothing(*_: Any) -> None:
    """`write_folder` has written model.safetensors."""


FORMATS = {
    "timm": FileFormat("model.safetensors", 0.0, _nothing, _open_timm),
    "torch": FileFormat(CODE, 1e-5, _write_code, modeling_descendant.load),
    "pt2": FileFormat("model.pt2", 1e-5, _write_pt2, _open_pt2),
    "onnx": FileFormat("model.onnx", 1e-4, _write_onnx, lambda folder: _open_onnx(folder / "model.onnx")),
    "int8": FileFormat("model.int8.onnx", None, _write_int8, lambda folder: _open_onnx(folder / "model.int8.onnx")),
}
"""Formats by name; the first two are always written."""


def wanted(formats: tuple[Format, ...]) -> tuple[list[str], str]:
    """Names of the formats to write, and a sentence on those that are left out, empty if none is.

    timm, torch and the formats asked for, without those that need packages that are not installed. UserError for int8
    without onnx.
    """
    if "int8" in formats and "onnx" not in formats:
        raise UserError("The formats have int8 without onnx, which it is made from: add onnx, or leave out int8.")
    asked = ["timm", "torch", *(name for name in FORMATS if name in formats)]
    missing = [name for name in ("onnx", "onnxruntime") if importlib.util.find_spec(name) is None]
    if not missing or "onnx" not in asked:
        return asked, ""
    left_out = " and ".join(FORMATS[name].file for name in asked if name in ("onnx", "int8"))
    advice = "`pip install 'lgp_dist[onnx]'` and export again"
    sentence = f"{left_out} left out because {' and '.join(missing)} is not installed: {advice}."
    return [name for name in asked if name not in ("onnx", "int8")], sentence
