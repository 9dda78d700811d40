"""From a picture to the 8-bit pixels that a model sees of it.

Decoding a JPEG takes open_clip's transform half of its time or less; the rest goes into Pillow's resize, and into
floats that a whole batch can be given at once. torchvision resizes 8-bit tensors with the same weights, antialiased as
Pillow does, in a fifth of Pillow's time: `benchmarks/decode.py` has the times and how far the pixels are apart.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import PIL.Image
import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms import CenterCrop, Compose, Resize
from torchvision.transforms.v2 import functional

from curate.pool.images import decode_image, decode_pixels

Picture = PIL.Image.Image | npt.NDArray[np.uint8]
"""Decoded, RGB; as Pillow has it, or [H, W, 3]."""


@dataclass(frozen=True)
class Crop:
    """The pixels that a model sees of a picture, [H, W, 3]; goes to other processes, where the model need not."""

    transform: Compose
    """open_clip's own, as far as it ends in an RGB picture of Pillow's."""
    exact: bool = True
    """Whether the pixels are those of `transform` to the last bit; else they may be 2 levels off, and are sooner there.
    On a CPU without AVX2 torch resizes in a slower way, which is as close."""

    @cached_property
    def fast(self) -> bool:
        """Whether `transform` is left aside: only where all that it does is to resize and to cut out the middle."""
        return not self.exact and all(type(step) in (Resize, CenterCrop) for step in self.transform.transforms)

    def __call__(self, picture: Picture) -> npt.NDArray[np.uint8]:
        """Crop one picture; the pixels are the same in whichever form it comes.

        They may be a view of a larger array: whoever keeps them copies them.
        """
        if not self.fast:
            whole = picture if isinstance(picture, PIL.Image.Image) else PIL.Image.fromarray(picture)
            return np.array(self.transform(whole))
        pixels = np.array(picture) if isinstance(picture, PIL.Image.Image) else picture
        # [1, 3, H, W] with the channels last in memory: in that order torch resizes without a copy.
        image = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)
        for step in self.transform.transforms:
            if isinstance(step, Resize):
                image = _resize(image, step)
            elif image.shape[2:] != step.size:
                image = functional.center_crop(image, list(step.size))
        return image[0].permute(1, 2, 0).numpy()


def _resize(image: Tensor, step: Resize) -> Tensor:
    """Resize uint8 [1, 3, H, W] as torchvision resizes one of Pillow's pictures.

    Between the pass over lines and that over columns pixels are cut to 8 bits, so that their order matters where
    bicubic weights overshoot: up to 18 levels. torch takes lines first; Pillow takes columns first where the height
    loses more than twice as many pixels as the width (since 13.0; its pull request 9549).
    torchvision's own function for tensors calls the same one of torch, and takes 20 µs more about it.
    """
    height, width = image.shape[2:]
    if isinstance(step.size, int):  # of the shorter side
        new_height, new_width = (max(step.size, int(step.size * side / min(height, width))) for side in (height, width))
    else:
        new_height, new_width = step.size
    way = {"mode": step.interpolation.value, "antialias": True}
    if new_height < height and height - new_height > 2 * (width - new_width):
        image = interpolate(image, [new_height, width], **way)
    return image if image.shape[2:] == (new_height, new_width) else interpolate(image, [new_height, new_width], **way)


Preprocess = Callable[[PIL.Image.Image], Tensor] | Crop
"""What trainers are given: open_clip's transform, or another function of a picture; or a crop, whose pixels a whole
batch is normalised from."""


def decode_for(data: bytes | None, functions: Iterable[object]) -> Picture:
    """Decode a picture in the form that all of some functions of pictures take soonest: Pillow's, unless all are fast.

    Raises:
        Dropped: as `decode_image`.
    """
    fast = all(isinstance(function, Crop) and function.fast for function in functions)
    return decode_pixels(data) if fast else decode_image(data)


def pixels_of(picture: Picture, preprocess: Preprocess) -> Tensor:
    """What `preprocess` makes of a picture that was decoded for it; of a crop uint8 [H, W, 3]."""
    if isinstance(preprocess, Crop):
        return torch.from_numpy(np.ascontiguousarray(preprocess(picture)))  # many wait for their batch
    assert isinstance(picture, PIL.Image.Image), "decode_for(data, [preprocess])"
    return preprocess(picture)
