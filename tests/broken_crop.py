"""What stands for an encoder's crop where a decoder breaks; apart, for each child process imports this and no more."""

import io
import os
import time

import numpy as np
import PIL.Image

from curate.embed.decode import Row
from curate.jobs.drawn_pool import draw_pair


def crop(image: PIL.Image.Image) -> np.ndarray:
    """Two sizes do what a broken decoder does, in whichever process decodes."""
    match image.size:
        case (99, 32):
            os.abort()
        case (98, 32):
            time.sleep(3600)
    return np.asarray(image)


def row(number: int, size: tuple[int, int] = (32, 32)) -> Row:
    drawn = PIL.Image.open(io.BytesIO(draw_pair(number, 0, image_size=32)[0])).convert("RGB").resize(size)
    out = io.BytesIO()
    drawn.save(out, "PNG")
    return out.getvalue(), f"number {number}".encode()
