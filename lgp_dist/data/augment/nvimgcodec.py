"""The optional decoder nvidia-nvimgcodec, on the CPU: it decodes only the part of a JPEG that a crop needs."""

import importlib
import importlib.util
import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lgp_dist.data.augment.crops import Crop, random_box
from lgp_dist.data.shards.decode import MAX_PIXELS
from lgp_dist.errors import UserError

_MODULE = "nvidia.nvimgcodec"


class RegionDecoder:
    """Decodes crops of RGB JPEGs to the same pixels as libjpeg-turbo, one decoder per thread.

    Damage outside the part that a crop needs goes unnoticed. UserError when made if the package is not installed.
    """

    def __init__(self) -> None:
        try:
            self._codec: Any = importlib.import_module(_MODULE)
        except ImportError as error:
            raise UserError(
                "data.decoder is nvimgcodec, which is not installed: run `pip install lgp_dist[nvimgcodec]`, or set"
                " data.decoder to simplejpeg."
            ) from error
        self._local = threading.local()

    def crop(self, content: bytes, crop: Crop, draws: list[float]) -> NDArray[np.uint8] | None:
        """Pixels [h, w, 3] of a JPEG's random crop, before it is resized; None where it is not for this decoder."""
        if content[:2] != b"\xff\xd8":
            return None
        try:
            stream = self._codec.CodeStream(content)
        except RuntimeError:
            return None
        if not 0 < stream.width * stream.height <= MAX_PIXELS or stream.num_channels != 3:
            return None
        left, top, width, height = random_box(stream.width, stream.height, crop.data.augment.crop_scale, draws)
        region = self._codec.Region(start=(top, left), end=(top + height, left + width))
        image = self._decoder().decode(stream.get_sub_code_stream(region=region))
        if image is None:
            return None
        pixels = np.asarray(image.cpu())
        return pixels if pixels.shape == (height, width, 3) and pixels.dtype == np.uint8 else None

    def _decoder(self) -> Any:
        """This thread's decoder."""
        if not hasattr(self._local, "decoder"):
            codec = self._codec
            self._local.decoder = codec.Decoder(
                device_id=codec.NVIMGCODEC_DEVICE_CPU_ONLY,
                max_num_cpu_threads=1,
                backends=[codec.Backend(codec.CPU_ONLY)],
            )
        return self._local.decoder
