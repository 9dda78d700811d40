"""From the bytes and caption of one row to a pair that an encoder can use, or to the reason there is none.

Pixels are those of `PIL.Image.open(...).convert("RGB")`, which open_clip's transforms and most trainers see,
except where that call would show a picture that nobody made:

* alpha and colour keys are laid on white; `convert` uncovers whatever colour happens to lie under them;
* 16-bit grey keeps its high byte, as Pillow does for 16-bit RGB; `convert` clips and leaves it all but white;
* a file cut off is dropped, never filled up with grey.

The EXIF orientation is ignored, as those transforms ignore it: a learner and its curator must see the same.
Of an animation the first frame counts. What cannot be noticed: damage within a JPEG that still decodes to the
end, as libjpeg then fills in or guesses and the format has no checksum.

JPEGs are nine pictures in ten, and `decode_pixels` decodes the plain ones with libjpeg-turbo itself: the same pixels
in less time. Pillow has the last word on every other file, and on each that libjpeg-turbo complains of.

Every function here may be called from many threads at once.
"""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

DropReason = Literal[
    "image_empty",  # no bytes, or none at all
    "image_undecodable",  # not one of the four formats, or damaged
    "image_truncated",  # begins well and ends too early
    "image_too_large",  # more pixels than max_pixels, or more memory than max_bytes; known before any of it is spent
    "image_too_small",  # shorter side under min_side, or sides further apart than max_aspect
    "caption_missing",  # null
    "caption_empty",  # nothing but white space
    "caption_encoding",  # not UTF-8
]
DROP_REASONS: tuple[DropReason, ...] = get_args(DropReason)

MAX_PIXELS = 89_478_485  # where Pillow begins to warn of a bomb: 1 GiB / 4 / 3 bytes
MAX_DECODE_BYTES = 2**28
"""Of memory that a decode takes at its peak, per thread: 67 megapixels of a plain JPEG or RGB PNG, 38 of a progressive
JPEG with colours halved, 33 of CMYK, 29 with alpha, 14 of a WebP. Without a limit 88 megapixels with alpha took 1.1 GB.
What the largest pictures take that are accepted is measured in tests/test_images.py: 233 to 257 MiB."""
MIN_SIDE = 8  # pixels; guards against spacers and tracking dots, not against low quality
MAX_ASPECT = 16  # longer side / shorter side; likewise guards against rules and banners only
MAX_CAPTION_BYTES = 4096  # 53 bytes for each of CLIP's 77 tokens; 100,000 words cost 0.4 s to tokenize
WHITE = (255, 255, 255)

# A PNG is cut back to its still picture: Pillow warns of malformed animation headers, and a warning filter is
# neither ours to change nor thread-safe. Length and name of the chunk, its 8 bytes of data, its checksum.
_ANIMATION_CHUNK = re.compile(rb"\0\0\0\x08acTL.{12}", re.DOTALL)


class Dropped(Exception):  # noqa: N818 an outcome that is counted, not a failure
    """A row that cannot be used.

    Attributes:
        reason: one of `DROP_REASONS`, for the tally.
        error: what was found, for whoever looks the row up; holds nothing that differs from run to run.
    """

    def __init__(self, reason: DropReason, error: str) -> None:
        super().__init__(reason, error)
        self.reason: DropReason = reason
        self.error = error


class _Jpeg(JpegImageFile):
    def getexif(self) -> Image.Exif:
        """Nothing: Pillow would look up the resolution, of no use here, and warn of every odd EXIF block."""
        return Image.Exif()


def decode_image(
    data: bytes | None,
    *,
    max_pixels: int = MAX_PIXELS,
    max_bytes: int = MAX_DECODE_BYTES,
    min_side: int = MIN_SIDE,
    max_aspect: float = MAX_ASPECT,
) -> Image.Image:
    """Decode one picture completely, to 8-bit RGB.

    Args:
        data: the file's bytes: JPEG, PNG, WebP or GIF, recognised by its first bytes, not by a name.
        max_pixels: width × height above which a picture is not even decoded.
        max_bytes: memory that decoding would take above which it is not even begun.
        min_side: shorter side, in pixels, below which it is dropped.
        max_aspect: longer side / shorter side above which it is dropped.

    Raises:
        Dropped: with an `image_*` reason; nothing else is raised for any bytes.
    """
    with _dropping(data):
        image = _open(data or b"", max_pixels, max_bytes, min_side, max_aspect)
        return _loaded(image, max_bytes)


def decode_pixels(
    data: bytes | None,
    *,
    max_pixels: int = MAX_PIXELS,
    max_bytes: int = MAX_DECODE_BYTES,
    min_side: int = MIN_SIDE,
    max_aspect: float = MAX_ASPECT,
) -> npt.NDArray[np.uint8]:
    """The pixels of `decode_image`, uint8 [H, W, 3], sooner; same arguments, same reasons to drop a picture.

    Raises:
        Dropped: as `decode_image`.
    """
    with _dropping(data):
        image = _open(data or b"", max_pixels, max_bytes, min_side, max_aspect)
        if isinstance(image, JpegImageFile) and image.mode in ("RGB", "L"):
            # Strict, that is with an error for what is but a warning of libjpeg: of data that end too soon or make no
            # sense. Pillow knows which of these pictures to drop. Other errors are of kinds of JPEG that it may read.
            with suppress(ValueError):
                if simplejpeg.decode_jpeg_header(data)[:2] == (image.height, image.width):  # which the limits allow
                    pixels: npt.NDArray[np.uint8] = simplejpeg.decode_jpeg(data, "RGB", strict=True)
                    return pixels
        return np.array(_loaded(image, max_bytes))


@contextmanager
def _dropping(data: bytes | None) -> Iterator[None]:
    """Turns whatever a decoder raises into `Dropped`."""
    if not data:
        raise Dropped("image_empty", "null" if data is None else "0 bytes")
    try:
        yield
    except Dropped:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise Dropped("image_too_large", _said(error)) from error
    except Exception as error:  # ValueError, SyntaxError, struct.error, MemoryError: hostile bytes
        truncated = isinstance(error, OSError) and "truncated" in str(error).lower()
        raise Dropped("image_truncated" if truncated else "image_undecodable", _said(error)) from error


def clean_caption(raw: bytes | str | None) -> str:
    """Return the caption without surrounding white space, clipped to `MAX_CAPTION_BYTES` for the tokenizer.

    >>> clean_caption(b"  a red circle ")
    'a red circle'

    Raises:
        Dropped: with a `caption_*` reason; nothing else is raised.
    """
    if raw is None:
        raise Dropped("caption_missing", "null")
    try:
        text = (raw.decode() if isinstance(raw, bytes) else raw).strip()
        encoded = text.encode()  # a str can hold lone surrogates, which no file of ours could
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise Dropped("caption_encoding", f"{error.reason} at {error.start}") from error
    if not text:
        raise Dropped("caption_empty", "nothing but white space" if raw else "no text")
    return encoded[:MAX_CAPTION_BYTES].decode(errors="ignore")  # ignores half a character at the cut, no more


def _recognised(data: bytes) -> ImageFile:
    """Read the header with the one decoder that its first bytes name.

    Four formats, which are what downloaders store and trainers read. The other forty are parsers that nobody
    would miss and a hostile file could reach: EPS goes to Ghostscript, TIFF is a world of its own.
    `Image.open` would choose the same classes, but warn of large pictures, which we drop ourselves.
    """
    if data.startswith(b"\xff\xd8\xff"):
        return _Jpeg(BytesIO(data))
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return PngImageFile(BytesIO(_ANIMATION_CHUNK.sub(b"", data)))
    if data.startswith((b"GIF87a", b"GIF89a")):
        return GifImageFile(BytesIO(data))
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        if len(data) < (announced := 8 + int.from_bytes(data[4:8], "little")):
            raise OSError(f"truncated: {len(data)} of {announced} bytes")  # libwebp would not say why
        return WebPImageFile(BytesIO(data))
    raise ValueError(f"not JPEG, PNG, WebP or GIF: begins with {data[:16]!r}")


def _open(data: bytes, max_pixels: int, max_bytes: int, min_side: int, max_aspect: float) -> ImageFile:
    """The picture by its header, of which nothing is decoded unless it is within all limits."""
    image = _recognised(data)
    _check_size(*image.size, max_pixels, min_side, max_aspect)
    _check_memory(image, _core_bytes(image) + _decoder_bytes(image, data), max_bytes)
    _check_memory(image, _rgb_bytes(image), max_bytes)
    return image


def _loaded(image: ImageFile, max_bytes: int) -> Image.Image:
    """The decoded picture, and nothing of its decoder."""
    image.load()
    # Shares the pixels; libwebp's decoder holds two pictures more for as long as it lives.
    return _to_rgb(image._new(image.im), max_bytes)


def _check_size(width: int, height: int, max_pixels: int, min_side: int, max_aspect: float) -> None:
    if width * height > max_pixels:
        raise Dropped("image_too_large", f"{width} x {height} is more than {max_pixels} pixels")
    shorter, longer = sorted((width, height))
    if shorter < min_side:
        raise Dropped("image_too_small", f"{width} x {height}: shorter side under {min_side} pixels")
    if longer > max_aspect * shorter:
        raise Dropped("image_too_small", f"{width} x {height}: sides further apart than {max_aspect} to 1")


def _check_memory(image: Image.Image, pixel_bytes: float, max_bytes: int) -> None:
    width, height = image.size
    if (taken := math.ceil(width * height * pixel_bytes)) > max_bytes:
        raise Dropped(
            "image_too_large", f"{width} x {height}, {image.mode}: decoding takes {taken} bytes, more than {max_bytes}"
        )


def _core_bytes(image: Image.Image) -> int:
    """Bytes that Pillow keeps per pixel: of every mode but these four."""
    return {"1": 1, "L": 1, "P": 1, "I;16": 2}.get(image.mode, 4)


def _decoder_bytes(image: ImageFile, data: bytes) -> float:
    """Bytes per pixel that a decoder holds beside Pillow's pixels; only two of the four hold more than a few lines."""
    if isinstance(image, WebPImageFile):
        return 14  # two canvases and what becomes of the second one, 4 each; at most 1.3 more, measured, if lossless
    if isinstance(image, JpegImageFile) and not (image.layers and _has_one_scan(image, data)):
        # libjpeg keeps all coefficients, 2 bytes each, until the last scan has refined them.
        most_across, most_down = (max([1, *(layer[i] for layer in image.layer)]) for i in (1, 2))
        return sum(2 * layer[1] * layer[2] / (most_across * most_down) for layer in image.layer)
    return 0


def _has_one_scan(image: JpegImageFile, data: bytes) -> bool:
    """Whether the first scan, before which Pillow has stopped to read, has all components whole."""
    assert image.fp is not None
    length = 6 + 2 * image.layers
    marker = b"\xff\xda" + length.to_bytes(2) + bytes([image.layers])
    return "progressive" not in image.info and data[: image.fp.tell()][-2 - length :].startswith(marker)


def _rgb_bytes(image: Image.Image) -> int:
    """Bytes per pixel that `_to_rgb` holds at its peak."""
    if image.mode == "I;16":
        return 7  # the picture, its bytes, the higher ones, those as a picture; or that one and RGB
    if image.has_transparency_data:
        return (4 if image.mode == "RGBA" else _core_bytes(image) + 4) + 4 + 1  # RGBA, RGB, alpha
    return 4 if image.mode == "RGB" else _core_bytes(image) + 4


def _to_rgb(image: Image.Image, max_bytes: int) -> Image.Image:
    _check_memory(image, _rgb_bytes(image), max_bytes)  # again: a colour key may stand at the end of the file
    if image.mode == "I;16":  # little-endian: the high byte is every second one. A colour key is ignored
        return Image.frombytes("L", image.size, image.tobytes()[1::2]).convert("RGB")
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")  # convert copies
    layer = image if image.mode == "RGBA" else image.convert("RGBA")
    rgb = Image.new("RGB", layer.size, WHITE)
    rgb.paste(layer, mask=layer.getchannel("A"))
    return rgb


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
