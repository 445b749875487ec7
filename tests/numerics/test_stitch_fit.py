"""R^2 of stitch layers against NumPy, from what hooks on stock timm models saw."""

import numpy as np
import pytest
import torch
from numerics_cases import SPACES, array, capture, images, path_id, shake, stock_rows

from lgp_dist.models.pool import LearngenePool
from lgp_dist.models.stitch_fit import stitch_fits
from lgp_dist.paths.stitched import PathSpace


@pytest.mark.parametrize("space", SPACES, ids=path_id)
def test_r2_is_that_of_numpy(space: PathSpace) -> None:
    """1 - SSE / SST over all tokens, whatever the batches; about each channel's own mean."""
    torch.manual_seed(3)
    stock, batch = stock_rows(space), images(11)
    seen = [capture(vit, batch) for vit in stock]
    pool = LearngenePool(space, stock).eval()
    for index in range(len(space.stitch_widths)):
        shake(pool.stitch(index))
    found = stitch_fits(pool, batch.split(4))
    once = [path for path in space.paths if len(path.stitches) == 1]
    assert found.keys() == {path.key for path in once}
    for path in once:
        low, high = path.segments
        layer = pool.stitch(path.stitches[0])
        given = seen[low.row].blocks[low.stop - 1] @ array(layer.weight).T + array(layer.bias)
        wanted = seen[high.row].inputs[high.start]
        spread = ((wanted - wanted.mean((0, 1))) ** 2).sum()
        assert found[path.key] == pytest.approx(1 - ((given - wanted) ** 2).sum() / spread, rel=1e-4, abs=1e-5)


def test_a_stitch_that_gives_the_mean_alone_has_zero() -> None:
    space = SPACES[0]
    torch.manual_seed(4)
    stock, batch = stock_rows(space), images(6)
    wide = capture(stock[1], batch)
    pool = LearngenePool(space, stock).eval()
    path = next(path for path in space.paths if path.stitches == (1,))
    mean = wide.inputs[path.segments[1].start].mean((0, 1))
    pool.stitch(1).start_from((torch.zeros(space.stitch_widths[1]), torch.tensor(mean)))
    assert np.isclose(stitch_fits(pool, [batch])[path.key], 0.0, atol=1e-6)
