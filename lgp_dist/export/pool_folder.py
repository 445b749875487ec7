"""A pool with all of its paths as one folder: weights that are stored once, and what each path runs of them."""

import importlib
import json
import shutil
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lgp_dist.config.run_config import ExportConfig
from lgp_dist.export import modeling_descendant
from lgp_dist.export.card import pool_card
from lgp_dist.export.folder import checked
from lgp_dist.export.formats import CODE, FORMATS, Verification, export_graph, wanted
from lgp_dist.files import write_json
from lgp_dist.models.descendant import empty_descendant, pool_state, shape_of
from lgp_dist.models.pool import LearngenePool
from lgp_dist.paths.path import Space
from lgp_dist.protocols import Batch
from lgp_dist.run.path_rows import PathRow
from lgp_dist.run.tensors import save_tensors

WEIGHTS, ONNX_CODE = "model.safetensors", "onnx_paths.py"


def pool_table(
    space: Space, heads: tuple[int, ...], rows: list[PathRow], config: dict[str, Any], origin: dict[str, str]
) -> dict[str, Any]:
    """paths.json: what all paths share, rows and stitch layers, and each path's cost, accuracy, latency and parts.

    rows: of the paths to export, with latencies. config: config.json of any path. origin: as in `folder.Exported`.
    """
    with torch.device("meta"):
        shapes = [shape_of(empty_descendant(space, heads, path)) for path in space.paths if path.is_row]
    parts = {
        path.key: {
            "segments": [[part.row, part.start, part.stop] for part in path.segments],
            "stitches": list(path.stitches),
            "final_norm": space.has_norm(path),
        }
        for path in space.paths
    }
    return {
        "origin": origin,
        **{name: config[name] for name in ("pretrained_cfg", "label_names") if name in config},
        "shape": {name: value for name, value in shapes[0].items() if name not in ("segments", "final_norm")},
        "rows": [shape["segments"][0] for shape in shapes],
        "stitch_widths": [list(widths) for widths in space.stitch_widths],
        "paths": [{**row, **parts[row["key"]]} for row in rows],
    }


def write_pool_folder(
    folder: Path,
    pool: LearngenePool,
    table: dict[str, Any],
    settings: ExportConfig,
    batches: Callable[[int], Iterable[Batch]],
) -> Verification:
    """Writes a pool into an empty folder, compares its paths with the pool's, and returns what verify.json says.

    pool: on the CPU, in eval mode. table: of `pool_table`. batches, and UserError: as for `folder.write_folder`.
    """
    names, left_out = wanted(tuple(name for name in settings.formats if name == "onnx"))
    save_tensors(folder / WEIGHTS, pool_state(pool))
    write_json(folder / "paths.json", table)
    shutil.copyfile(modeling_descendant.__file__, folder / CODE)
    images = int(sum(batch.weight.sum() for batch in batches(settings.images)))
    verdict: Verification = {"images": images, "formats": {}, "left_out": left_out}
    verdict["formats"]["torch"] = {"file": CODE, "largest_difference": 0.0, "bound": 0.0}
    if "onnx" in names:
        shutil.copyfile(Path(__file__).with_name(ONNX_CODE), folder / ONNX_CODE)
        write_graphs(folder, next(iter(batches(1))).images[:1].repeat(2, 1, 1, 1))
        verdict["formats"]["onnx"] = {"file": "KEY.onnx", "largest_difference": 0.0, "bound": FORMATS["onnx"].bound}
    plain = modeling_descendant.load_pool(folder)
    for key in plain.paths:
        plain.select(key)
        for name, found in verdict["formats"].items():
            run = plain if name == "torch" else _open_onnx(folder, key)
            reference = partial(pool, path=pool.space.by_key(key))
            verdict["formats"][name] = checked(found, key, run, reference, batches(settings.images))
    write_json(folder / "verify.json", verdict)
    (folder / "README.md").write_text(pool_card(table))
    return verdict


class _FlatLinear(nn.Module):
    """A linear layer on [B, N, D] as on one matrix, which ONNX has as Gemm with the weight as torch stores it. Of the
    layer itself the exporter makes MatMul with the transposed weight, which would have to be stored too."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, tokens: Tensor) -> Tensor:
        """[..., source] to [..., target]."""
        flat = F.linear(tokens.flatten(0, -2), self.weight, self.bias)
        return flat if tokens.dim() == 2 else flat.reshape(-1, int(tokens.shape[1]), len(self.weight))


def write_graphs(folder: Path, pair: Tensor) -> None:
    """Writes KEY.onnx for each path of a folder: graphs whose weights are places in model.safetensors. pair: images."""
    onnx = importlib.import_module("onnx")
    pool, places = modeling_descendant.load_pool(folder), tensor_places(folder / WEIGHTS)
    for module in list(pool.modules()):
        for name, part in list(module.named_children()):
            if isinstance(part, nn.Linear):
                setattr(module, name, _FlatLinear(part))
    for key in pool.paths:
        pool.select(key)
        export_graph(pool, pair, folder / f"{key}.onnx", export_params=False, do_constant_folding=False)
        model = onnx.load(folder / f"{key}.onnx")
        used = {name for node in model.graph.node for name in node.input}
        weights = model.graph.input[1:]  # after the images
        del model.graph.input[1:]
        for given in (each for each in weights if each.name in used):
            tensor = model.graph.initializer.add(name=given.name, data_type=onnx.TensorProto.FLOAT)
            tensor.dims.extend(size.dim_value for size in given.type.tensor_type.shape.dim)
            tensor.data_location = onnx.TensorProto.EXTERNAL
            offset, length = places[given.name]
            for field, value in {"location": WEIGHTS, "offset": offset, "length": length}.items():
                tensor.external_data.add(key=field, value=str(value))
        onnx.save(model, folder / f"{key}.onnx")


def tensor_places(path: Path) -> dict[str, tuple[int, int]]:
    """Offset and length in bytes of each tensor in a safetensors file: length of the header, header, tensors."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    ranges = {name: about["data_offsets"] for name, about in header.items() if name != "__metadata__"}
    return {name: (8 + size + start, stop - start) for name, (start, stop) in ranges.items()}


def _open_onnx(folder: Path, key: str) -> Callable[[Tensor], Tensor]:
    session = importlib.import_module("lgp_dist.export.onnx_paths").open_path(folder, key, torch.get_num_threads())
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])
