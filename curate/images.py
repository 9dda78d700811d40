"""From the bytes and caption of one row to a pair that an encoder can use, or to the reason there is none.

Pixels are those of `PIL.Image.open(...).convert("RGB")`, which open_clip's transforms and most trainers see,
except where that call would show a picture that nobody made:

* alpha and colour keys are laid on white; `convert` uncovers whatever colour happens to lie under them;
* 16-bit grey keeps its high byte, as Pillow does for 16-bit RGB; `convert` clips and leaves it all but white;
* a file cut off is dropped, never filled up with grey.

The EXIF orientation is ignored, as those transforms ignore it: a learner and its curator must see the same.
Of an animation the first frame counts. What cannot be noticed: damage within a JPEG that still decodes to the
end, as libjpeg then fills in or guesses and the format has no checksum.

Every function here may be called from many threads at once.
"""

import re
from io import BytesIO
from typing import Literal, get_args

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
    "image_too_large",  # more pixels than max_pixels; known from the header, before memory is spent
    "image_too_small",  # shorter side under min_side, or sides further apart than max_aspect
    "caption_missing",  # null
    "caption_empty",  # nothing but white space
    "caption_encoding",  # not UTF-8
]
DROP_REASONS: tuple[DropReason, ...] = get_args(DropReason)

MAX_PIXELS = 89_478_485  # where Pillow begins to warn of a bomb: 1 GiB / 4 / 3 bytes
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
    min_side: int = MIN_SIDE,
    max_aspect: float = MAX_ASPECT,
) -> Image.Image:
    """Decode one picture completely, to 8-bit RGB.

    Args:
        data: the file's bytes: JPEG, PNG, WebP or GIF, recognised by its first bytes, not by a name.
        max_pixels: width × height above which a picture is not even decoded.
        min_side: shorter side, in pixels, below which it is dropped.
        max_aspect: longer side / shorter side above which it is dropped.

    Raises:
        Dropped: with an `image_*` reason; nothing else is raised for any bytes.
    """
    if not data:
        raise Dropped("image_empty", "null" if data is None else "0 bytes")
    try:
        image = _open(data)
        _check_size(*image.size, max_pixels, min_side, max_aspect)
        image.load()
        return _to_rgb(image)
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


def _open(data: bytes) -> ImageFile:
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


def _check_size(width: int, height: int, max_pixels: int, min_side: int, max_aspect: float) -> None:
    if width * height > max_pixels:
        raise Dropped("image_too_large", f"{width} x {height} is more than {max_pixels} pixels")
    shorter, longer = sorted((width, height))
    if shorter < min_side:
        raise Dropped("image_too_small", f"{width} x {height}: shorter side under {min_side} pixels")
    if longer > max_aspect * shorter:
        raise Dropped("image_too_small", f"{width} x {height}: sides further apart than {max_aspect} to 1")


def _to_rgb(image: ImageFile) -> Image.Image:
    if image.mode == "I;16":  # little-endian: the high byte is every second one. A colour key is ignored
        return Image.frombytes("L", image.size, image.tobytes()[1::2]).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    rgb = Image.new("RGB", layer.size, WHITE)
    rgb.paste(layer, mask=layer.getchannel("A"))
    return rgb


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
