"""A crop that does what a broken decoder does; a module of its own, for processes that import little else."""

import os
import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import PIL.Image

SIDE = 32


@dataclass(frozen=True)
class Hostile:
    """A crop whose pictures of odd sizes do what a broken decoder does, in whichever process decodes."""

    def __call__(self, image: PIL.Image.Image) -> npt.NDArray[np.uint8]:
        match image.size:
            case (99, 32):
                os.abort()
            case (98, 32):
                time.sleep(3600)
        return np.asarray(image.resize((SIDE, SIDE)))
