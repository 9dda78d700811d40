"""Every row ends as an RGB picture or as one of the named reasons, and its pixels are those a trainer would see."""

import io
import math
import pickle
import subprocess
import sys
import time
import warnings
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from curate.pool import images
from curate.pool.images import DROP_REASONS, MAX_CAPTION_BYTES, Dropped, clean_caption, decode_image

FORMATS = {
    "jpeg": {"format": "JPEG", "quality": 90},
    "progressive": {"format": "JPEG", "quality": 90, "progressive": True},
    "png": {"format": "PNG"},
    "webp": {"format": "WEBP", "quality": 90},
    "webp-lossless": {"format": "WEBP", "lossless": True},
    "gif": {"format": "GIF"},
}


def encoded(image: Image.Image, **how: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, **how)
    return out.getvalue()


def noisy(height: int = 40, width: int = 60, channels: int = 3) -> np.ndarray:
    """Coarse blocks with a little noise: a picture that no two rows or columns of which are alike."""
    rng = np.random.default_rng(7)
    coarse = rng.integers(0, 240, (height // 4, width // 4, channels)).repeat(4, 0).repeat(4, 1)
    return (coarse + rng.integers(0, 9, coarse.shape)).astype(np.uint8)


def reason(data: bytes | None, **limits: Any) -> str:
    with pytest.raises(Dropped) as caught:
        decode_image(data, **limits)
    return caught.value.reason


def chunk(name: bytes, content: bytes) -> bytes:
    return len(content).to_bytes(4) + name + content + zlib.crc32(name + content).to_bytes(4)


def png_with(extra: bytes, *, before: bytes = b"IDAT") -> bytes:
    plain = encoded(Image.fromarray(noisy()), format="PNG")
    at = plain.index(before) - 4
    return plain[:at] + extra + plain[at:]


@pytest.mark.parametrize("how", FORMATS.values(), ids=FORMATS)
def test_pixels_are_those_of_image_open(how):
    data = encoded(Image.fromarray(noisy()), **how)
    ours, theirs = decode_image(data), Image.open(io.BytesIO(data)).convert("RGB")
    assert ours.mode == "RGB"
    assert ours.tobytes() == theirs.tobytes()


def test_open_clips_transform_sees_the_same_through_us():
    from open_clip.transform import image_transform

    transform = image_transform(32, is_train=False)
    for how in (FORMATS["jpeg"], FORMATS["png"]):
        data = encoded(Image.fromarray(noisy()), **how)
        assert transform(decode_image(data)).equal(transform(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize("how", FORMATS.values(), ids=FORMATS)
def test_a_file_cut_anywhere_is_dropped_or_whole_but_never_filled_in(how):
    data = encoded(Image.fromarray(noisy()), **how)
    whole = decode_image(data).tobytes()
    for cut in range(0, len(data), 7):
        try:
            assert decode_image(data[:cut]).tobytes() == whole
        except Dropped as dropped:
            late = cut > 0.9 * len(data)
            assert dropped.reason in ({"image_truncated"} if late else {*DROP_REASONS[:3]})  # noqa: PT017


def test_no_image_at_all():
    assert reason(None) == reason(b"") == "image_empty"


@pytest.mark.parametrize(
    "data",
    [
        b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        b'<svg xmlns="http://www.w3.org/2000/svg"/>',
        bytes(np.random.default_rng(0).integers(0, 256, 2000, dtype=np.uint8)),
        encoded(Image.fromarray(noisy()), format="JPEG")[:20],
        b"\xff\xd8\xff",
        b"\x89PNG\r\n\x1a\n",
        b"GIF89a",
        b"RIFF\x04\0\0\0WEBP",
        encoded(Image.fromarray(noisy()), format="BMP"),
        encoded(Image.fromarray(noisy()), format="TIFF"),
        encoded(Image.fromarray(noisy()), format="EPS"),
    ],
    ids=[
        "html",
        "svg",
        "noise",
        "jpeg head",
        "jpeg magic",
        "png magic",
        "gif magic",
        "webp magic",
        "bmp",
        "tiff",
        "eps",
    ],
)
def test_what_is_not_one_of_the_four_formats(data):
    assert reason(data) == "image_undecodable"


def test_too_many_pixels_are_refused_by_the_header_alone():
    header = chunk(b"IHDR", (60_000).to_bytes(4) + (60_000).to_bytes(4) + bytes([8, 2, 0, 0, 0]))
    started = time.monotonic()
    assert reason(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"")) == "image_too_large"
    just_over_pillows_warning = chunk(b"IHDR", (9_460).to_bytes(4) + (9_460).to_bytes(4) + bytes([8, 2, 0, 0, 0]))
    assert reason(b"\x89PNG\r\n\x1a\n" + just_over_pillows_warning + chunk(b"IDAT", b"")) == "image_too_large"
    vp8x = b"VP8X" + (10).to_bytes(4, "little") + bytes(4) + (16_000).to_bytes(3, "little") * 2
    riff = b"RIFF" + (4 + len(vp8x)).to_bytes(4, "little") + b"WEBP" + vp8x
    assert reason(riff) == "image_too_large"
    assert time.monotonic() - started < 5


def test_a_gif_whose_frame_outgrows_its_canvas_is_too_large():
    frame = b"," + b"\xff\xff" * 2 + b"\xff\xff" * 2 + b"\0" + b"\x02\x02\x44\x01\0;"
    assert reason(b"GIF89a\x08\0\x08\0\x80\0\0" + bytes(6) + frame) == "image_too_large"


def test_limits_are_inclusive():
    data = encoded(Image.fromarray(noisy(40, 60)), format="PNG")
    assert decode_image(data, max_pixels=2400, min_side=40, max_aspect=1.5).size == (60, 40)
    assert reason(data, max_pixels=2399) == "image_too_large"
    assert reason(data, min_side=41) == "image_too_small"
    assert reason(data, max_aspect=1.49) == "image_too_small"


def test_memory_is_limited_and_the_limit_is_inclusive():
    data = encoded(Image.fromarray(noisy(40, 60)), format="PNG")
    assert decode_image(data, max_bytes=4 * 2400).size == (60, 40)
    assert reason(data, max_bytes=4 * 2400 - 1) == "image_too_large"


DECODE = """
import re, sys
from curate.pool.images import Dropped, decode_image
def peak_mib():  # getrusage has what the parent held when it forked
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 2**10
smaller, larger = sys.stdin.buffer.read(int(sys.argv[1])), sys.stdin.buffer.read()
before = peak_mib()
try:
    decode_image(larger)
except Dropped as dropped:
    print(dropped.reason, dropped.error)
assert peak_mib() - before < 8 + 2 * len(larger) / 2**20  # no pixel was decoded
decode_image(smaller)
print(peak_mib() - before)
"""
HEAVY: dict[str, tuple[str, float, dict[str, Any]]] = {  # mode, bytes per pixel, how it is saved
    "jpeg": ("RGB", 4, {"format": "JPEG"}),
    "progressive": ("RGB", 7, {"format": "JPEG", "progressive": True}),
    "progressive, full colours": ("RGB", 10, {"format": "JPEG", "progressive": True, "subsampling": 0}),
    "cmyk": ("CMYK", 8, {"format": "JPEG"}),
    "progressive cmyk": ("CMYK", 12, {"format": "JPEG", "progressive": True}),
    "png": ("RGB", 4, {"format": "PNG", "compress_level": 1}),
    "alpha": ("RGBA", 9, {"format": "PNG", "compress_level": 1}),
    "colour key": ("RGB", 13, {"format": "PNG", "compress_level": 1, "transparency": (1, 2, 3)}),
    "16 bits": ("I;16", 7, {"format": "PNG", "compress_level": 1}),
    "gif": ("P", 10, {"format": "GIF", "transparency": 3}),
    "webp": ("RGBA", 18, {"format": "WEBP", "lossless": True, "quality": 0, "method": 0}),
}
QUICK = ("jpeg", "progressive, full colours", "alpha", "webp")


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in QUICK else pytest.mark.exhaustive) for kind in HEAVY]
)
def test_the_largest_pictures_that_are_accepted_take_what_we_say(kind: str):
    mode, pixel_bytes, how = HEAVY[kind]
    side = math.isqrt(int(images.MAX_DECODE_BYTES / pixel_bytes)) // 16 * 16  # JPEG's blocks
    files = [encoded(Image.linear_gradient("L").resize((s, s)).convert(mode), **how) for s in (side, side + 16)]
    ended = subprocess.run(
        [sys.executable, "-c", DECODE, str(len(files[0]))], input=b"".join(files), capture_output=True, check=True
    )
    dropped, peak_mib = ended.stdout.decode().splitlines()
    assert dropped.startswith(f"image_too_large {side + 16} x {side + 16}, ")
    assert ": decoding takes " in dropped
    limit_mib = images.MAX_DECODE_BYTES / 2**20
    assert 0.85 * limit_mib < float(peak_mib) < 1.02 * limit_mib, peak_mib


def test_a_jpeg_in_several_scans_is_as_heavy_as_a_progressive_one():
    data = encoded(Image.fromarray(noisy(48, 64)), format="JPEG", subsampling=0)
    at = data.index(b"\xff\xda\0\x0c\x03")
    apart = data[:at] + b"\xff\xda\0\x08\x01\x01\0\0\x3f\0" + data[at + 14 :]
    assert decode_image(data, max_bytes=4 * 48 * 64).size == (64, 48)
    assert reason(apart, max_bytes=10 * 48 * 64 - 1) == "image_too_large"
    assert reason(data.replace(b"\xff\xc0", b"\xff\xc2"), max_bytes=10 * 48 * 64 - 1) == "image_too_large"


def test_a_colour_key_at_the_end_of_the_file_counts():
    keyed = png_with(chunk(b"tRNS", bytes([0, 1, 0, 2, 0, 3])), before=b"IEND")
    assert reason(keyed, max_bytes=13 * 2400 - 1) == "image_too_large"
    assert decode_image(keyed, max_bytes=13 * 2400).size == (60, 40)


@pytest.mark.parametrize("size", [(1, 1), (7, 400), (8000, 1), (8, 129)])
def test_dots_and_rules_are_too_small(size):
    assert reason(encoded(Image.new("RGB", size), format="PNG")) == "image_too_small"


@pytest.mark.parametrize("name", [b"zTXt", b"iCCP"])
@pytest.mark.parametrize("before", [b"IDAT", b"IEND"])
def test_a_text_chunk_bomb_is_dropped(name, before):
    bomb = chunk(name, b"a\0\0" + zlib.compress(bytes(64 * 2**20)))
    started = time.monotonic()
    assert reason(png_with(bomb, before=before)) == "image_undecodable"
    assert time.monotonic() - started < 5


def test_damaged_pixels_are_dropped():
    data = bytearray(encoded(Image.fromarray(noisy()), format="PNG"))
    data[data.index(b"IDAT") + 200] ^= 0xFF
    assert reason(bytes(data)) == "image_undecodable"


def test_alpha_lies_on_white():
    rgba = np.zeros((16, 16, 4), np.uint8)
    rgba[:, :4], rgba[:, 4:8], rgba[:, 8:] = (200, 0, 0, 0), (200, 0, 0, 255), (0, 0, 0, 128)
    for how in ({"format": "PNG"}, {"format": "WEBP", "lossless": True, "exact": True}):
        row = np.asarray(decode_image(encoded(Image.fromarray(rgba), **how)))[0]
        assert [row[i].tolist() for i in (0, 5, 12)] == [[255, 255, 255], [200, 0, 0], [127, 127, 127]]


def test_colour_keys_and_palettes_lie_on_white():
    palette = Image.new("P", (16, 16), 1)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.paste(0, (0, 0, 8, 16))
    keyed = Image.new("RGB", (16, 16), (40, 50, 60))
    keyed.paste((10, 20, 30), (0, 0, 8, 16))
    grey = Image.new("L", (16, 16), 50)
    grey.paste(20, (0, 0, 8, 16))
    for data, right in [
        (encoded(palette, format="PNG", transparency=0), [40, 50, 60]),
        (encoded(palette, format="PNG", transparency=b"\0\xff"), [40, 50, 60]),
        (encoded(palette, format="GIF", transparency=0), [40, 50, 60]),
        (encoded(keyed, format="PNG", transparency=(10, 20, 30)), [40, 50, 60]),
        (encoded(grey, format="PNG", transparency=20), [50, 50, 50]),
        (encoded(Image.merge("LA", (grey, grey.point(lambda v: 255 * (v > 20)))), format="PNG"), [50, 50, 50]),
    ]:
        pixels = np.asarray(decode_image(data))
        assert pixels[0, 0].tolist() == [255, 255, 255]
        assert pixels[0, 15].tolist() == right


def test_sixteen_bits_keep_their_high_byte():
    ramp = np.arange(65_536, dtype=np.uint16).reshape(256, 256)
    grey = np.asarray(decode_image(encoded(Image.fromarray(ramp), format="PNG")))
    assert (grey == (ramp >> 8)[..., None]).all()
    # Pillow writes no 16-bit colour; three samples a pixel, big-endian, each line with filter 0
    lines = b"".join(b"\0" + np.repeat(line, 3).astype(">u2").tobytes() for line in ramp)
    header = chunk(b"IHDR", (256).to_bytes(4) * 2 + bytes([16, 2, 0, 0, 0]))
    body = chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    assert (np.asarray(decode_image(b"\x89PNG\r\n\x1a\n" + header + body)) == grey).all()


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK"])
def test_other_modes_become_rgb(mode):
    picture = Image.fromarray(noisy()).convert(mode)
    data = encoded(picture, format="JPEG" if mode == "CMYK" else "PNG")
    assert decode_image(data).tobytes() == Image.open(io.BytesIO(data)).convert("RGB").tobytes()


@pytest.mark.parametrize("how", [{"format": "GIF"}, {"format": "PNG"}, {"format": "WEBP", "lossless": True}])
def test_the_first_frame_of_an_animation_counts(how):
    red, blue = Image.new("RGB", (16, 16), (255, 0, 0)), Image.new("RGB", (16, 16), (0, 0, 255))
    data = encoded(red, save_all=True, append_images=[blue, red], duration=10, **how)
    assert decode_image(data).getcolors() == [(256, (255, 0, 0))]


def test_exif_orientation_is_ignored_as_open_clip_ignores_it():
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    assert decode_image(encoded(Image.fromarray(noisy(40, 60)), format="JPEG", exif=exif)).size == (60, 40)


ODD_EXIF = b"Exif\0\0II*\0\x08\0\0\0" + b"\xff\0" + bytes(range(200))
WARNS = {
    "exif": encoded(Image.fromarray(noisy()), format="JPEG", exif=ODD_EXIF).replace(b"JFIF\0\1\1", b"JUNK\0\1\1"),
    "animation header": png_with(chunk(b"acTL", bytes(8))),
    "transparent palette": encoded(Image.fromarray(noisy()).convert("P"), format="PNG", transparency=bytes(range(256))),
    "just over the limit": encoded(Image.new("1", (9_460, 9_460)), format="PNG"),
}


@pytest.mark.parametrize("data", WARNS.values(), ids=WARNS)
def test_pillows_warnings_do_not_come_out_and_do_not_change_the_outcome(data):
    with warnings.catch_warnings(record=True) as theirs:
        warnings.simplefilter("always")
        Image.open(io.BytesIO(data)).convert("RGB")
    assert theirs, "this picture was made to make Pillow warn"
    try:
        outcome = decode_image(data).size  # warnings are errors here
    except Dropped as dropped:
        outcome = dropped.reason
    assert outcome in {(60, 40), "image_too_large"}
    with warnings.catch_warnings(record=True) as ours:
        warnings.simplefilter("always")
        try:
            assert decode_image(data).size == outcome
        except Dropped as dropped:
            assert dropped.reason == outcome  # noqa: PT017
    assert not ours


def test_threads_agree_with_one_after_the_other():
    rng = np.random.default_rng(1)
    files = [
        encoded(Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)), **list(FORMATS.values())[i % 6])
        for i in range(120)
    ]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda data: decode_image(data).tobytes(), files))
    assert together == [decode_image(data).tobytes() for data in files]


def test_a_drop_says_what_was_found_and_survives_a_process_boundary():
    with pytest.raises(Dropped) as caught:
        decode_image(b"<html>" + bytes(9000))
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.reason, again.error) == (caught.value.reason, caught.value.error)
    assert "<html>" in again.error
    assert len(again.error) <= 200


@settings(deadline=None)
@given(st.sampled_from(sorted(FORMATS)), st.integers(0, 2000), st.binary(max_size=40), st.integers(0, 40))
def test_nothing_but_dropped_is_ever_raised(name, at, inserted, removed):
    data = encoded(Image.fromarray(noisy(16, 16)), **FORMATS[name])
    at %= len(data)
    try:
        image = decode_image(data[:at] + inserted + data[at + removed :], max_pixels=10**6)
    except Dropped as dropped:
        assert dropped.reason in DROP_REASONS  # noqa: PT017
    else:
        assert image.mode == "RGB"


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (None, "caption_missing"),
        ("", "caption_empty"),
        (b"", "caption_empty"),
        (" \t\n\u3000", "caption_empty"),
        (b"caf\xe9", "caption_encoding"),
        (b"\xed\xa0\x80", "caption_encoding"),
        ("lone \ud800 surrogate", "caption_encoding"),
    ],
)
def test_captions_that_cannot_be_used(raw, expected):
    with pytest.raises(Dropped) as caught:
        clean_caption(raw)
    assert caught.value.reason == expected
    assert caught.value.error


@pytest.mark.parametrize("text", ["a red circle", "kot \U0001f431", "nul \0 byte", "&amp; עברית", "\ufeffbom"])
def test_captions_that_can(text):
    assert clean_caption(text) == clean_caption(text.encode()) == clean_caption(f" {text}\n") == text


def test_long_captions_are_clipped_between_characters():
    assert clean_caption("word " * 100_000) == ("word " * 1000)[:MAX_CAPTION_BYTES]
    assert clean_caption("é" + "語" * 5000) == "é" + "語" * ((MAX_CAPTION_BYTES - 2) // 3)
    assert clean_caption(" " * 9000 + "far in") == "far in"


@settings(deadline=None)
@given(st.text())
def test_any_text_is_returned_or_dropped(text):
    try:
        cleaned = clean_caption(text)
    except Dropped as dropped:
        assert dropped.reason == "caption_empty"  # noqa: PT017
        assert not text.strip()
    else:
        assert text.strip().startswith(cleaned)
        assert 0 < len(cleaned.encode()) <= MAX_CAPTION_BYTES


@pytest.fixture(scope="module")
def shared_data() -> Path:
    folder = Path(__file__).parents[2] / "shared/data"
    if not folder.is_dir():
        pytest.skip("the shared test data is not here")
    return folder


# Pictures that Pillow opens and we drop, though the format is one of the four, and why.
APNG_OUT_OF_ORDER = {
    # The frames' numbers do not follow one another. Pillow finds out on reaching the second frame, which we never
    # show; but we read the file as one still picture to its end, and a damaged file is dropped.
    f"pillow/apng/sequence_{name}.png"
    for name in ("fdat_fctl", "gap", "repeat_chunk", "start")
}


@pytest.mark.timeout(60)
def test_odd_images_of_a_library_end_in_rgb_or_a_reason(shared_data):
    rows = pq.read_table(shared_data / "odd-images/00000.parquet").to_pylist()
    outcomes: Counter[tuple[str, bool, str]] = Counter()
    for row in rows:
        started = time.monotonic()
        try:
            image = decode_image(row["jpg"])
            outcome = "ok"
        except Dropped as dropped:
            outcome = dropped.reason
        assert time.monotonic() - started < 5, row["key"]
        # Pillow names a format for whatever it can open; MPO is a JPEG with more pictures behind the first.
        ours = row["format"] in {"JPEG", "MPO", "PNG", "WEBP", "GIF"}
        outcomes["ours" if ours else "other" if row["format"] else "unknown", row["opens"], outcome] += 1
        if outcome == "ok":
            assert row["opens"], row["key"]  # nothing that Pillow refuses gets in
            assert image.mode == "RGB"
            assert image.size == (row["width"], row["height"])
            with warnings.catch_warnings(action="ignore"):
                theirs = Image.open(io.BytesIO(row["jpg"]))
                if not theirs.has_transparency_data and theirs.mode != "I;16":
                    assert image.tobytes() == theirs.convert("RGB").tobytes(), row["key"]
        elif row["opens"] and ours:
            shorter, longer = sorted((row["width"], row["height"]))
            if shorter < images.MIN_SIDE or longer > images.MAX_ASPECT * shorter:
                assert outcome == "image_too_small", row["key"]
            else:
                assert row["key"] in APNG_OUT_OF_ORDER, (row["key"], outcome)
    assert outcomes == {
        ("ours", True, "ok"): 248,
        ("ours", True, "image_too_small"): 15,
        ("ours", True, "image_undecodable"): len(APNG_OUT_OF_ORDER),
        ("ours", False, "image_truncated"): 1,
        ("ours", False, "image_undecodable"): 1,
        ("other", True, "image_undecodable"): 167,  # TIFF, BMP, TGA, AVIF and 20 more that we do not let in
        ("other", False, "image_undecodable"): 43,
        ("unknown", False, "image_undecodable"): 59,
    }
