"""README.md of an exported folder: a model card."""

from typing import Any

LOADING = {
    "timm": (
        "timm",
        """\
import timm
{import_line}
model = timm.create_model("local-dir:{folder}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))""",
    ),
    "transformers": (
        "transformers",
        """\
from transformers import AutoModelForImageClassification

model = AutoModelForImageClassification.from_pretrained("{folder}")""",
    ),
    "torch": (
        "torch and safetensors alone",
        """\
import sys

sys.path.insert(0, "{folder}")
from modeling_descendant import load

model = load("{folder}")""",
    ),
    "pt2": (
        "torch.export",
        """\
import torch

model = torch.export.load("{folder}/model.pt2").module()""",
    ),
    "onnx": (
        "onnxruntime",
        """\
import onnxruntime

session = onnxruntime.InferenceSession("{folder}/model.onnx")
(logits,) = session.run(["logits"], {{"images": images}})  # numpy, float32, any batch""",
    ),
}
"""Format -> heading and code."""


def model_card(config: dict[str, Any], facts: dict[str, Any], origin: dict[str, str], verdict: dict[str, Any]) -> str:
    """The card as Markdown.

    config: of config.json. facts, origin: of `folder.Exported`. verdict: of verify.json.
    """
    shape, data = config["lgp"]["shape"], config["pretrained_cfg"]
    size = f"{shape['channels']} x {shape['image_size']} x {shape['image_size']}"
    rows = {
        "path": f"`{facts['key']}`",
        "blocks": " then ".join(
            f"{part['depth']} of width {part['width']} with {part['heads']} head(s)" for part in shape["segments"]
        ),
        "parameters": f"{facts['params']:,}",
        "FLOPs (multiply-adds of an image)": f"{facts['flops']:,}",
        "top-1, top-5": f"{facts['top1']:.2f} %, {facts['top5']:.2f} %",
        "latency": f"{facts['latency_ms']:.3f} ms (median; a tenth of the measurements below "
        f"{facts['latency_low_ms']:.3f}, a tenth above {facts['latency_high_ms']:.3f})",
        "measured on": facts["latency_on"],
        "input": f"{size}, mean {list(data['mean'])}, std {list(data['std'])}, {data['interpolation']}, "
        f"crop_pct {data['crop_pct']}",
        "classes": str(shape["num_classes"]),
        **{name: f"`{value}`" for name, value in origin.items()},
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"""\
# Descendant {facts["key"]}

Cut out of a learngene pool by `lgp_dist`.

| | |
|---|---|
{table}

## Loading

All of these work without a network. Images are normalised with the mean and std above.

{_loading(config, verdict)}
## Checked

Largest difference of a logit from the path in its pool, on {verdict["images"]} real images (`verify.json`):

| file | largest difference | bound |
|---|---|---|
{_checked(verdict)}
"""


def _loading(config: dict[str, Any], verdict: dict[str, Any]) -> str:
    """A piece of code for every way in that the folder has."""
    plain = config["architecture"] != "lgp_descendant"
    there = {name for name in LOADING if name in verdict["formats"]} | ({"transformers"} if plain else set())
    line = "" if plain else "import lgp_dist.timm_models  # makes stitched paths known to timm\n"
    parts = []
    for name, (heading, code) in LOADING.items():
        if name in there:
            parts.append(f"### {heading}\n\n```python\n{code.format(folder='FOLDER', import_line=line)}\n```\n")
    return "\n".join(parts)


def _checked(verdict: dict[str, Any]) -> str:
    lines = []
    for found in verdict["formats"].values():
        bound = "accuracy is compared" if found["bound"] is None else f"{found['bound']:g}"
        lines.append(f"| `{found['file']}` | {found['largest_difference']:.3g} | {bound} |")
    if "int8" in verdict:
        int8 = verdict["int8"]
        lines.append(
            f"\nint8: top-1 {int8['top1']:.2f} % where the path has {int8['top1_path']:.2f} %, "
            f"{int8['loss']:.2f} points lost, on {int8['images']} images."
        )
    return "\n".join(lines)
