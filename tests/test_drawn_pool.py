"""A drawn pool is worth having only if its captions are true and its truth columns are right."""

import io
import re
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from curate.jobs.drawn_pool import BACKGROUNDS, COLOURS, DAMAGES, SCHEMA, SHAPES, draw_pair, draw_pool
from curate.pool.images import Dropped, clean_caption, decode_image

THING = re.compile(rf"a (small|large) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})")
SHARES = {"swapped_share": 0.2, "broken_share": 0.1, "duplicate_share": 0.15}


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn") / "pool"
    truth = draw_pool(folder, rows=1003, shards=3, seed=5, key_prefix="p-", **SHARES)
    return folder, truth, [row for path in sorted(folder.iterdir()) for row in pq.read_table(path).to_pylist()]


def spots(jpg: bytes, ground: str) -> list[tuple[str, float, float, float]]:
    """Look at a picture without its caption: colour, x, y and area of each spot, found by flooding.

    Area and centre are in shares of the picture; the colour is the nearest of `COLOURS` at the spot's middle tone.
    """
    pixels = np.asarray(Image.open(io.BytesIO(jpg))).astype(int)
    todo = np.abs(pixels - BACKGROUNDS[ground]).max(-1) > 60
    found = []
    while todo.any():
        spot, front = np.zeros_like(todo), np.zeros_like(todo)
        front[tuple(np.argwhere(todo)[0])] = True
        while front.any():
            spot |= front
            grown = front.copy()
            for axis in (0, 1):
                for step in (-1, 1):
                    grown |= np.roll(front, step, axis)
            front = grown & todo & ~spot
        todo &= ~spot
        y, x = np.argwhere(spot).mean(0) / len(spot)
        tone = np.median(pixels[spot], axis=0)
        colour = min(COLOURS, key=lambda name: float(np.abs(tone - COLOURS[name]).sum()))
        if spot.sum() > 5:
            found.append((colour, float(x), float(y), spot.mean()))
    return found


def is_true(caption: str, jpg: bytes) -> bool:
    """Judge a caption by the picture's pixels: things, their colours, their background, where each one lies."""
    things = THING.findall(caption)
    ground = next(name for name in BACKGROUNDS if re.search(rf"\b(on|on a|against) {name}\b", caption))
    corner = np.asarray(Image.open(io.BytesIO(jpg)))[:, [0, -1]].reshape(-1, 3)
    if np.abs(np.median(corner, axis=0) - BACKGROUNDS[ground]).max() > 6:
        return False
    seen = spots(jpg, ground)
    if Counter(colour for _, colour, _ in things) != Counter(colour for colour, *_ in seen):
        return False
    if len({colour for colour, *_ in seen}) < len(seen):
        return True  # which is which cannot be told by colour
    at = {colour: (x, y) for colour, x, y, _ in seen}
    where = [at[colour] for _, colour, _ in things]
    said = THING.sub("#", caption)
    margin = 0.1

    def rises(axis: int, *order: int) -> bool:
        values = [where[i][axis] for i in order]
        return all(first + margin < second for first, second in pairwise(values))

    rules = {
        "# to the left of #, and # below both": lambda: rises(0, 0, 1) and rises(1, 0, 2) and rises(1, 1, 2),
        "# to the left of #, and # above both": lambda: rises(0, 0, 1) and rises(1, 2, 0) and rises(1, 2, 1),
        "# below # on the left and # on the right": lambda: rises(0, 1, 2) and rises(1, 1, 0) and rises(1, 2, 0),
        "# above # on the left and # on the right": lambda: rises(0, 1, 2) and rises(1, 0, 1) and rises(1, 0, 2),
        "from left to right, #, # and #": lambda: rises(0, 0, 1, 2),
        "from top to bottom, #, # and #": lambda: rises(1, 0, 1, 2),
        "# between # on the left and # on the right": lambda: rises(0, 1, 0, 2),
        "# with # above it and # below it": lambda: rises(1, 1, 0, 2),
        "# to the left of #": lambda: rises(0, 0, 1),
        "# to the right of #": lambda: rises(0, 1, 0),
        "# on the left and # on the right": lambda: rises(0, 0, 1),
        "# above #": lambda: rises(1, 0, 1),
        "# below #": lambda: rises(1, 1, 0),
        "# at the top and # at the bottom": lambda: rises(1, 0, 1),
    }
    for sentence, holds in rules.items():
        if sentence in said:
            return holds()
    (x, y), third = where[0], {"left": 0, "top": 0, "right": 2, "bottom": 2}
    across = [third[word] for word in ("left", "right") if word in said]
    down = [third[word] for word in ("top", "bottom") if word in said]
    return [int(3 * x), int(3 * y)] == [*(across or [1]), *(down or [1])]


def test_every_true_caption_holds_for_its_picture_and_no_swapped_one(pool):
    judged = Counter((row["swapped"], is_true(row["caption"], row["jpg"])) for row in pool[2] if not row["broken"])
    assert judged == {(False, True): 552 + 150, (True, False): 201}


def test_sizes_can_be_told_apart():
    area: dict[tuple[str, str], list[float]] = {}
    for row in range(400):
        jpg, caption = draw_pair(9, row)
        ground = next(name for name in BACKGROUNDS if re.search(rf"\b(on|on a|against) {name}\b", caption))
        if len(things := THING.findall(caption)) == 2 and things[0][1] != things[1][1]:
            seen = {colour: share for colour, _, _, share in spots(jpg, ground)}
            for size, colour, shape in things:
                area.setdefault((size, shape), []).append(seen[colour])
    for shape in SHAPES:
        assert max(area["small", shape]) < min(area["large", shape])


def test_shares_are_exact_and_the_counts_add_up(pool):
    _, truth, rows = pool
    assert (truth.rows, truth.swapped, truth.duplicates) == (1003, 201, 150)
    assert truth.broken == {"image_truncated": 25, "image_undecodable": 25, "image_empty": 25, "caption_empty": 25}
    assert truth.clean == 1003 - 201 - 150 - 100
    assert sum(row["swapped"] for row in rows) == truth.swapped
    assert sum(row["duplicate_of"] is not None for row in rows) == truth.duplicates
    assert Counter(row["broken"] for row in rows if row["broken"]) == truth.broken
    assert not any(bool(row["swapped"]) + bool(row["broken"]) + bool(row["duplicate_of"]) > 1 for row in rows)


def outcome(jpg: bytes, caption: str) -> str | None:
    try:
        assert decode_image(jpg).size == (64, 64)
        assert clean_caption(caption) == caption
    except Dropped as dropped:
        return dropped.reason
    return None


def test_rows_end_as_their_truth_says(pool):
    for row in pool[2]:
        assert outcome(row["jpg"], row["caption"]) == row["broken"], row["key"]
        assert (row["width"], row["height"]) == (64, 64)


@pytest.mark.parametrize("damage", DAMAGES)
def test_no_picture_is_so_small_that_damage_does_something_else(damage):
    for row in range(300):
        jpg, caption = DAMAGES[damage](*draw_pair(1, row))
        assert outcome(jpg, caption) == damage


def test_a_duplicate_repeats_an_earlier_clean_row(pool):
    rows = {row["key"]: row for row in pool[2]}
    shards_apart = 0
    for row in rows.values():
        if row["duplicate_of"]:
            first = rows[row["duplicate_of"]]
            assert (row["jpg"], row["caption"]) == (first["jpg"], first["caption"])
            assert first["key"] < row["key"]
            assert (first["swapped"], first["broken"], first["duplicate_of"]) == (False, None, None)
            shards_apart += first["key"][:7] != row["key"][:7]
    assert shards_apart > 20


def test_pictures_and_captions_are_not_alike_by_chance(pool):
    own = [row for row in pool[2] if not row["duplicate_of"] and not row["broken"]]
    assert len({row["jpg"] for row in own}) == len(own)
    assert len({row["caption"] for row in own}) >= len(own) - 3


def test_the_files_are_what_img2dataset_writes(pool):
    folder, _, rows = pool
    assert sorted(path.name for path in folder.iterdir()) == [f"{i:05d}.parquet" for i in range(3)]
    for path in folder.iterdir():
        file = pq.ParquetFile(path)
        assert file.schema_arrow.equals(SCHEMA)
        groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        assert groups in ([256, 78], [256, 79])
        assert {file.metadata.row_group(0).column(i).compression for i in range(len(SCHEMA))} == {"ZSTD"}
    assert [rows[i]["key"] for i in (0, 1, 334, 1002)] == ["p-000000000", "p-000000001", "p-000010000", "p-000020334"]
    assert len({row["key"] for row in rows}) == len(rows)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_same_arguments_give_the_same_bytes_and_another_seed_none_of_them(pool, tmp_path):
    folder, truth, rows = pool
    again = {"rows": 1003, "shards": 3, "key_prefix": "p-", **SHARES}
    assert draw_pool(tmp_path / "again", seed=5, **again) == truth
    before = contents(tmp_path / "again")
    assert before == contents(folder)
    draw_pool(tmp_path / "again", seed=5, **again)
    assert contents(tmp_path / "again") == before
    draw_pool(tmp_path / "other", rows=300, shards=1, seed=6)
    other = pq.read_table(tmp_path / "other").to_pylist()
    assert not {row["jpg"] for row in other} & {row["jpg"] for row in rows if row["broken"] is None}


def test_a_clean_pool_is_all_clean(tmp_path):
    truth = draw_pool(tmp_path, rows=5, shards=2, seed=0, image_size=32)
    assert truth.clean == truth.rows == 5
    table = pq.read_table(tmp_path)
    assert table["broken"].null_count == table["duplicate_of"].null_count == 5
    assert table["width"].to_pylist() == [32] * 5


def test_the_seed_decides_which_rows_are_what_and_row_0_is_clean(tmp_path):
    strewn = set()
    for seed in range(12):
        truth = draw_pool(tmp_path, rows=8, shards=1, seed=seed, duplicate_share=0.5, swapped_share=0.375)
        assert (truth.clean, truth.duplicates, truth.swapped) == (1, 4, 3)
        rows = pq.read_table(tmp_path).to_pylist()
        assert {row["duplicate_of"] for row in rows} == {None, rows[0]["key"]}
        strewn.add(tuple(row["swapped"] for row in rows))
    assert len(strewn) > 6


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rows": 0}, "1 to 10,000 rows"),
        ({"shards": 0}, "1 to 10,000 rows"),
        ({"rows": 30_001, "shards": 3}, "1 to 10,000 rows"),
        ({"rows": 3, "shards": 4}, "1 to 10,000 rows"),
        ({"swapped_share": 0.5, "broken_share": 0.3, "duplicate_share": 0.2}, "one row must stay clean"),
        ({"broken_share": -0.5}, "at least 0"),
    ],
)
def test_arguments_that_make_no_pool(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        draw_pool(tmp_path / "pool", **{"rows": 10, "shards": 1, "seed": 0, **wrong})
    assert not (tmp_path / "pool").exists()


def test_a_folder_with_other_shards_is_refused(tmp_path):
    draw_pool(tmp_path, rows=4, shards=2, seed=0)
    with pytest.raises(FileExistsError, match=r"00001\.parquet is no part of this pool"):
        draw_pool(tmp_path, rows=4, shards=1, seed=0)


def test_the_command(tmp_path):
    command = [sys.executable, "-m", "curate.jobs.drawn_pool", str(tmp_path / "out"), "--rows", "20", "--shards", "2"]
    done = subprocess.run([*command, "--duplicate-share", "0.5"], capture_output=True, text=True, check=True)
    assert "duplicates=10" in done.stdout
    assert done.stderr == ""  # progress is for terminals
    assert pq.read_table(tmp_path / "out").num_rows == 20
