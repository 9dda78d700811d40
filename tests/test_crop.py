"""The fast way to a model's pixels against the slow one: the same rows dropped, the same pixels but for rounding."""

import io
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torchvision.transforms import Compose

from curate.embed.decode import decode_row
from curate.jobs.drawn_pool import draw_pool
from curate.models.crop import Crop, decode_for, pixels_of
from curate.models.encoder import load_encoder
from curate.models.spec import EncoderSpec
from curate.pool.images import Dropped, decode_image, decode_pixels
from curate.recipe import Recipe
from curate.rounds.plan import Plan, pin_plan
from curate.storage import Store
from tests.helpers import tiny_config
from tests.test_images import encoded, noisy

JPEGS: dict[str, dict[str, Any]] = {
    "baseline": {},
    "progressive": {"progressive": True},
    "full colours": {"subsampling": 0},
    "restarts": {"restart_marker_blocks": 2},
    "progressive, restarts": {"progressive": True, "restart_marker_rows": 1},
    "odd segments": {"exif": b"Exif\0\0II*\0\x08\0\0\0" + bytes(9), "comment": b"c", "icc_profile": bytes(300)},
}


def jpeg(kind: str, picture: Image.Image | None = None) -> bytes:
    return encoded(picture or Image.fromarray(noisy()), format="JPEG", quality=90, **JPEGS[kind])


def outcome(decode: Any, data: bytes) -> tuple[str, Any]:
    try:
        return "ok", np.asarray(decode(data, max_pixels=10**6)).tolist()
    except Dropped as dropped:
        return dropped.reason, dropped.error


def crops(**how: Any) -> tuple[Crop, Crop]:
    """Exact and fast."""
    steps = image_transform_v2(PreprocessCfg(**how), is_train=False).transforms[:-3]
    return Crop(Compose(steps)), Crop(Compose(steps), exact=False)


def levels(exact: Crop, fast: Crop, data: bytes) -> int:
    """By which pixels differ at most."""
    ours, theirs = fast(decode_for(data, [fast])), exact(decode_for(data, [exact]))
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype == np.uint8
    return int(np.abs(ours.astype(int) - theirs).max())


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("kind", JPEGS)
def test_both_decoders_see_the_same_pixels(kind: str, mode: str) -> None:
    data = jpeg(kind, Image.fromarray(noisy()).convert(mode))
    assert outcome(decode_pixels, data) == outcome(decode_image, data)
    assert outcome(decode_pixels, data)[0] == "ok"


@settings(deadline=None, max_examples=300)
@given(
    st.sampled_from(sorted(JPEGS)),
    st.sampled_from(["flip", "cut", "insert", "remove"]),
    st.integers(2, 10**6),
    st.binary(min_size=1, max_size=6),
)
def test_both_decoders_agree_on_damaged_files(kind: str, what: str, at: int, how: bytes) -> None:
    data = bytearray(jpeg(kind))
    at = 2 + at % (len(data) - 2)
    match what:
        case "flip":
            data[at] ^= 1 << how[0] % 8
        case "cut":
            del data[at:]
        case "insert":
            data[at:at] = b"\xff" + how
        case "remove":
            del data[at : at + len(how)]
    assert outcome(decode_pixels, bytes(data)) == outcome(decode_image, bytes(data))


def test_nothing_is_said_of_damage(capfd: pytest.CaptureFixture[str]) -> None:
    data = bytearray(jpeg("baseline"))
    scan = data.index(b"\xff\xda") + 40
    data[scan : scan + 30] = bytes(30)  # libjpeg warns, and goes on
    assert outcome(decode_pixels, bytes(data)) == outcome(decode_image, bytes(data))
    assert capfd.readouterr() == ("", "")


def test_limits_hold_before_anything_is_decoded() -> None:
    data = jpeg("progressive")
    for limits in ({"max_pixels": 2399}, {"min_side": 41}, {"max_aspect": 1.49}, {"max_bytes": 2400}):
        with pytest.raises(Dropped) as theirs:
            decode_image(data, **limits)
        with pytest.raises(Dropped) as ours:
            decode_pixels(data, **limits)
        assert (ours.value.reason, ours.value.error) == (theirs.value.reason, theirs.value.error)


@settings(deadline=None, max_examples=60)
@given(
    st.tuples(st.integers(20, 300), st.integers(20, 300)),
    st.sampled_from(["shortest", "squash", "longest"]),
    st.sampled_from(["bicubic", "bilinear", "random"]),
    st.sampled_from([32, 224, (48, 96)]),
)
def test_pixels_are_open_clips_but_for_two_levels(size: Any, mode: str, interpolation: str, side: Any) -> None:
    picture = Image.fromarray(noisy(80, 120)).resize(size)
    exact, fast = crops(size=side, resize_mode=mode, interpolation=interpolation, fill_color=127)
    assert fast.fast == (mode == "squash" or (mode == "shortest" and side != (48, 96)))
    assert levels(exact, fast, jpeg("baseline", picture)) <= (2 if fast.fast else 0)


@pytest.mark.parametrize(("size", "side"), [((50, 700), 224), ((278, 374), 224), ((333, 390), 384), ((61, 128), 32)])
def test_the_order_of_passes_is_pillows(size: tuple[int, int], side: int) -> None:
    # Black and white at every pixel, where bicubic weights overshoot most
    picture = Image.fromarray(np.random.default_rng(0).choice(np.array([0, 255], np.uint8), (*size[::-1], 3)))
    for mode in ("shortest", "squash"):
        assert levels(*crops(size=side, resize_mode=mode), encoded(picture, format="PNG")) <= 2


def shared(name: str) -> Iterator[bytes]:
    path = Path(__file__).parents[2] / "shared/data" / name / "00000.parquet"
    if not path.exists():
        pytest.skip("the shared test data is not here")
    yield from pq.read_table(path)["jpg"].to_pylist()


@pytest.mark.parametrize(
    ("name", "every"),
    [
        ("openstax-dev", 20),
        ("emoji-en", 20),
        ("odd-images", 4),
        pytest.param("odd-images", 1, marks=pytest.mark.exhaustive),
    ],
)
def test_real_pictures(name: str, every: int) -> None:
    both = [crops(resize_mode=mode) for mode in ("shortest", "squash")]
    seen = 0
    for data in list(shared(name))[::every]:
        assert outcome(decode_pixels, data) == outcome(decode_image, data)
        if outcome(decode_pixels, data)[0] == "ok":
            seen += 1
            assert all(levels(exact, fast, data) <= 2 for exact, fast in both)
    assert seen >= 50


def test_a_crop_is_the_same_in_whichever_form_the_picture_comes() -> None:
    data = jpeg("baseline")
    for crop in crops():
        (again,) = pickle.loads(pickle.dumps([crop]))
        assert np.array_equal(crop(decode_image(data)), again(decode_pixels(data)))
        assert pixels_of(decode_for(data, [crop]), crop).equal(torch.from_numpy(crop(decode_image(data))))


def test_pixels_that_wait_for_their_batch_hold_no_more_than_themselves() -> None:
    """Of a panorama the whole of what was resized would be many times as large."""
    out = io.BytesIO()
    Image.new("RGB", (960, 64), (9, 99, 200)).save(out, "JPEG")
    for crop in crops(size=32):
        pixels = pixels_of(decode_for(out.getvalue(), [crop]), crop)
        assert pixels.shape == (32, 32, 3)
        assert pixels.untyped_storage().nbytes() == 32 * 32 * 3


def test_a_row_for_both_kinds_of_crops() -> None:
    data = jpeg("baseline")
    exact, fast = crops(size=32)
    both = decode_row((data, b"c"), {"exact": exact, "fast": fast})
    alone = decode_row((data, b"c"), {"fast": fast})
    assert both.size == alone.size == (60, 40)
    assert np.array_equal(both.pixels["fast"], alone.pixels["fast"])
    assert np.array_equal(both.pixels["exact"], exact(Image.open(io.BytesIO(data)).convert("RGB")))


# --- exact_pixels is part of what names embeddings and rounds --------------------------------------------------------


def test_embeddings_of_other_pixels_have_other_names() -> None:
    fields = {"model": "m", "source": "s", "weights_sha256": "w", "embed_dim": 4, "logit_scale": 1.0, "logit_bias": 0.0}
    names = set()
    for precision in ("fp32", "bf16"):
        for exact in (True, False):
            spec = EncoderSpec(**fields, precision=precision, exact_pixels=exact)
            assert EncoderSpec(**spec.to_json()) == spec
            assert ("exact_pixels" in spec.to_json()) == (not exact)  # records of before there was a choice
            names.add(spec.sha)
    assert names == {"m", "m-fast", "m-bf16", "m-bf16-fast"}


def test_rounds_that_were_begun_before_there_was_a_choice_were_exact() -> None:
    def recipe(**embed: bool) -> Recipe:
        sections = {"pool": {"path": "p"}, "learner": {"model": "l"}, "selection": {"sub_batch_size": 16}}
        return Recipe.model_validate({"root": "r", "embed": embed, **sections})

    assert recipe(exact_pixels=True).of_round()["embed"] == {"batch_size": 256, "chunk_rows": 1024}
    assert recipe().fingerprint() == recipe(exact_pixels=False).fingerprint() != recipe(exact_pixels=True).fingerprint()


def test_a_plan_says_on_which_pixels_both_models_score(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "root"))
    (tmp_path / "tiny.json").write_text(json.dumps(tiny_config()))
    draw_pool(tmp_path / "pool", rows=40, shards=1, seed=0, image_size=32)
    for number, exact in enumerate((False, True)):
        recipe = Recipe.model_validate(
            {
                "root": store.url,
                "pool": {"path": str(tmp_path / "pool"), "uid": "key"},
                "reference": {"model": "tiny.json"},
                "learner": {"model": "tiny.json"},
                "selection": {"sub_batch_size": 8, "n_chunks": 2, "criterion": "learnability"},
                "embed": {"exact_pixels": exact},
            }
        )
        plan = pin_plan(store, recipe, base=tmp_path, number=number)
        assert plan.learner is not None
        assert (plan.reference.exact_pixels, plan.learner.exact_pixels) == (exact, exact)
        assert Plan.from_bytes(plan.to_bytes(), "plan") == plan
        view = load_encoder(store, plan.reference, torch.device("cpu")).view
        assert view.endswith("'fast')") == (not exact)
