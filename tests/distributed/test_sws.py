"""SWS on two processes against one that knows no shared weights: a block that runs several times in a forward has the
gradient of all its layers under every engine, and models of several depths train as each does alone."""

from pathlib import Path

import pytest
from exact_cells import ENGINES
from exact_launch import TOLERANCE, groups, start
from safetensors.torch import load_file
from sws_cells import SwsCell, reference

CELLS = [SwsCell(kind, engine) for engine in ENGINES for kind in ("distil", "finetune")]
for _engine in ("zero1", "zero3", "ddp"):
    CELLS.append(SwsCell("distil", _engine, checkpointed=True, clip=0.05, accumulate=2))
    CELLS.append(SwsCell("distil", _engine, precision="bf16", checkpointed=True))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[SwsCell, Path]:
    """The weights of every cell's run."""
    root, found = tmp_path_factory.mktemp("sws"), {}
    for (world, deepspeed), cells in groups(CELLS).items():
        folder = root / f"{world}-{deepspeed}"
        done = start(cells, folder, script="sws_worker.py")
        assert done.returncode == 0, done.stderr[-6000:]
        found |= {cell: folder / f"{index}.safetensors" for index, cell in enumerate(cells)}
    return found


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_ranks_equal_one_process(results: dict[SwsCell, Path], cell: SwsCell) -> None:
    found, expected = load_file(results[cell]), reference(cell.meaning)
    assert found.keys() == expected.keys()
    assert max(float((found[name] - expected[name]).abs().max()) for name in expected) <= TOLERANCE


def test_the_comparison_is_not_empty() -> None:
    """Every weight moves far more than is allowed, and every setting matters."""
    for cell in {cell.meaning for cell in CELLS}:
        before, after = reference(SwsCell(**{**cell.as_dict(), "steps": 0})), reference(cell)
        assert all(float((after[name] - value).abs().max()) > 50 * TOLERANCE for name, value in before.items())
    one = reference(SwsCell("distil", "ddp"))
    others = [reference(SwsCell("distil", "ddp", precision="bf16")), reference(SwsCell("distil", "ddp", clip=0.05))]
    for other in (*others, reference(SwsCell("distil", "ddp"), last_layer_alone=True)):
        assert max(float((one[name] - value).abs().max()) for name, value in other.items()) > 10 * TOLERANCE
