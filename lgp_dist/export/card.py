"""README.md of an exported folder: a model card."""

from typing import Any

from lgp_dist.export.formats import Int8Accuracy, Verification
from lgp_dist.run.path_rows import PathRow

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
        "torch and safetensors",
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
(logits,) = session.run(["logits"], {{"images": images}})  # NumPy float32, any batch size""",
    ),
}
"""Format to heading and code."""


def model_card(config: dict[str, Any], facts: PathRow, origin: dict[str, str], verdict: Verification) -> str:
    """The card as Markdown.

    config: of config.json. facts, origin: as in `folder.Exported`. verdict: of verify.json.
    """
    shape, data = config["lgp"]["shape"], config["pretrained_cfg"]
    size = f"{shape['channels']} x {shape['image_size']} x {shape['image_size']}"
    rows = {
        "path": f"`{facts['key']}`",
        "blocks": " then ".join(
            f"{part['depth']} of width {part['width']} with {part['heads']} head(s)" for part in shape["segments"]
        ),
        "parameters": f"{facts['params']:,}",
        "FLOPs (multiply-adds per image)": f"{facts['flops']:,}",
        "top-1, top-5": f"{facts['top1']:.2f} %, {facts['top5']:.2f} %",
        "latency": f"{facts['latency_ms']:.3f} ms (median; 10 % of the measurements are below "
        f"{facts['latency_low_ms']:.3f}, 10 % above {facts['latency_high_ms']:.3f})",
        "measured on": facts["latency_on"],
        "input": f"{size}, mean {list(data['mean'])}, std {list(data['std'])}, {data['interpolation']}, "
        f"crop_pct {data['crop_pct']}",
        "classes": str(shape["num_classes"]),
        **{name: f"`{value}`" for name, value in origin.items()},
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"""\
# Descendant {facts["key"]}

One path of a learngene pool, extracted by `lgp_dist`.

| | |
|---|---|
{table}

## Loading

No network is needed. Images are normalised with the mean and std above.

{_loading(config, verdict)}
## Checks

Largest difference between a logit of the file and of the path in its pool, on {verdict["images"]} real images
(`verify.json`):

| file | largest difference | bound |
|---|---|---|
{_checked(verdict)}
"""


def _loading(config: dict[str, Any], verdict: Verification) -> str:
    """Code for every format of the folder."""
    plain = config["architecture"] != "lgp_descendant"
    there = {name for name in LOADING if name in verdict["formats"]} | ({"transformers"} if plain else set())
    line = "" if plain else "import lgp_dist.timm_models  # makes stitched paths known to timm\n"
    parts = []
    for name, (heading, code) in LOADING.items():
        if name in there:
            parts.append(f"### {heading}\n\n```python\n{code.format(folder='FOLDER', import_line=line)}\n```\n")
    return "\n".join(parts)


def _checked(verdict: Verification) -> str:
    lines = []
    for found in verdict["formats"].values():
        bound = "none; see accuracy" if found["bound"] is None else f"{found['bound']:g}"
        lines.append(f"| `{found['file']}` | {found['largest_difference']:.3g} | {bound} |")
    if "int8" in verdict:
        lines.append(f"\n{int8_words(verdict['int8'])}.")
    return "\n".join(lines)


def int8_words(int8: Int8Accuracy) -> str:
    """The accuracy of the int8 model and of the path."""
    change = "lost" if int8["loss"] >= 0 else "gained"
    return (
        f"int8: top-1 {int8['top1']:.2f} %, the path {int8['top1_path']:.2f} %: {abs(int8['loss']):.2f} points "
        f"{change} on {int8['images']} images"
    )


POOL = """\
# A pool of {count} models

All paths of a learngene pool, extracted by `lgp_dist`. They share the weights in `model.safetensors`; `paths.json` says
what each path runs of them, and how images are normalised. Latency: {on}.

| path | parameters | FLOPs (multiply-adds per image) | top-1 % | top-5 % | latency ms |
|---|---|---|---|---|---|
{rows}

{origin}

## Loading

```python
import sys

sys.path.insert(0, "FOLDER")
from modeling_descendant import load_pool  # needs torch and safetensors

pool = load_pool("FOLDER")
pool.select(max_latency_ms=8)  # also max_params, max_flops, or a key; loads nothing
logits = pool(images)
```

Graphs (`KEY.onnx`) need onnxruntime and share these weights: `onnx_paths.open_path("FOLDER", KEY)`.

`verify.json` has the largest difference between a logit of any path and of the same path in the pool, on real images.
"""


def pool_card(table: dict[str, Any]) -> str:
    """The card of a folder with all paths. table: of paths.json."""
    paths = table["paths"]
    return POOL.format(
        count=len(paths),
        rows="\n".join(
            f"| `{path['key']}` | {path['params']:,} | {path['flops']:,} | {path['top1']:.2f} | {path['top5']:.2f} | "
            f"{path['latency_ms']:.3f} |"
            for path in paths
        ),
        on=paths[0]["latency_on"],
        origin="\n".join(f"* {name}: `{value}`" for name, value in table["origin"].items()),
    )
