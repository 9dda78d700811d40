"""Dedup: what leaves is what comparing every row with every other one says, however shards lie, grow, or die."""

import base64
import dataclasses
import hashlib
import io
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from markupsafe import escape
from PIL import Image
from rich.console import Console

from curate.dedup import neighbours
from curate.dedup.files import Dedup, dedup_folder, read_cells, read_dropped, write_cells
from curate.dedup.grouping import NODE, decide
from curate.dedup.neighbours import Assignment, Threshold
from curate.embed.files import embedding_name
from curate.errors import DamagedError, UserError
from curate.jobs.dedup_sheet import write_sheet
from curate.jobs.drawn_pool import draw_pair, draw_pool
from curate.jobs.tables import dedup_tables
from curate.models.spec import EncoderSpec
from curate.pipelines import grouping
from curate.pipelines import neighbours as pipeline
from curate.pipelines.dedup import dedup_pool, dedup_recipe
from curate.pool.columns import Columns
from curate.pool.shards import Pool, Shard
from curate.recipe import DedupSection, EvaluationSet, Recipe
from curate.storage import Store
from tests.helpers import embedded_pool, write_pool, write_tiny
from tests.stand_in import without_ray

__all__ = ["without_ray"]

D = 24
SPEC = EncoderSpec(model="m", source="s", weights_sha256="w", embed_dim=D, logit_scale=10.0, logit_bias=0.0)
Row = dict[str, Any]
Floats = npt.NDArray[np.float32]


def unit(x: npt.NDArray[np.floating]) -> Floats:
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def planted(rows: int, *, seed: int = 0, copies: float = 0.2, clusters: int = 30) -> list[Row]:
    """Rows in clusters about a shared mean; some are near copies of others, some the same file, some the same pair."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(clusters, D)) + rng.normal(size=D)
    n = round(rows * (1 - copies))
    z = centres[rng.integers(clusters, size=n)] + 0.7 * rng.normal(size=(n, D))
    of = rng.integers(n, size=rows - n)
    near = unit(z[of]) + rng.uniform(0.02, 0.5, (len(of), 1)) * unit(rng.normal(size=(len(of), D)))
    zimg = unit(np.concatenate([z, near]))
    ztxt = unit(zimg + 0.5 * rng.normal(size=zimg.shape))
    made = [
        {"zimg": z, "ztxt": t, "size": (int(side), 32), "image": b"%d/%d" % (seed, i), "caption": b"%d" % i}
        for i, (z, t, side) in enumerate(zip(zimg, ztxt, rng.integers(16, 64, rows), strict=True))
    ]
    for i, j in zip(rng.integers(rows, size=rows // 20), rng.integers(rows, size=rows // 20), strict=True):
        made[i] = made[j] | ({"caption": b"another"} if i % 2 else {})  # the same file; every other time the same pair
    return [made[i] | {"uid": f"{seed}-{i}"} for i in rng.permutation(rows)]


def cut(rows: Sequence[Row], shards: int, first: int = 0) -> dict[str, list[Row]]:
    return {f"{first + i:03d}": list(rows[i::shards]) for i in range(shards)}


def dropped_of(store: Store, pool: Pool, dedup: Dedup) -> dict[tuple[str, int], Row]:
    """What was dropped, by name of shard and row."""
    names = [shard.name for shard in pool.shards]
    found = {}
    for shard in pool.shards:
        for row in read_dropped(store, dedup.folder, shard).to_pylist():
            row |= {
                end: (names + ["evaluation"] * 9)[row[end]] for end in ("duplicate_of_shard", "representative_shard")
            }
            found[shard.name, row["row"]] = row
    return found


def literal(
    shards: Mapping[str, Sequence[Row]], *, threshold: float, caption: float | None = None, rule: str = "components"
) -> set[tuple[str, int]]:
    """The rows that leave, from all cosines, one rank and a plain search."""
    places = [(name, i) for name in sorted(shards) for i in range(len(shards[name]))]
    rows = [shards[name][i] for name, i in places]
    z, t = (unit(np.array([row[tower] for row in rows], np.float16).astype(np.float32)) for tower in ("zimg", "ztxt"))
    near = (z.astype(float) @ z.T.astype(float)).astype(np.float32) >= threshold
    if caption is not None:
        near &= (t.astype(float) @ t.T.astype(float)).astype(np.float32) >= caption
        for i, j in np.argwhere(~near):
            near[i, j] = near[j, i] = rows[i]["image"] == rows[j]["image"] and rows[i]["caption"] == rows[j]["caption"]
    score = (z * t).sum(axis=1)
    pixels = [row["size"][0] * row["size"][1] for row in rows]
    uids = [hashlib.blake2b(row["uid"].encode(), digest_size=8).digest()[::-1] for row in rows]
    order = sorted(range(len(rows)), key=lambda i: (-score[i], -pixels[i], uids[i]))
    left, seen = set(), set[int]()
    for i in order:
        if i in seen:
            left.add(places[i])
            if rule == "greedy":
                seen |= set(np.flatnonzero(near[i]).tolist())
        elif rule == "greedy":
            seen |= set(np.flatnonzero(near[i]).tolist())
        else:
            todo = [i]
            seen.add(i)
            while todo:
                more = set(np.flatnonzero(near[todo.pop()]).tolist()) - seen
                seen |= more
                todo += more
    return left


RULES = [("components", None), ("greedy", 0.9), ("components", 0.9), ("greedy", None)]


def one_quickly(rule: tuple[str, float | None]) -> list[Any]:
    """All rules, of which all but one are exhaustive."""
    return [rule, *(pytest.param(*other, marks=pytest.mark.exhaustive) for other in RULES if other != rule)]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small pools have cells and several tasks."""
    monkeypatch.setattr(neighbours, "FEW_ROWS", 500)
    monkeypatch.setattr(pipeline, "ROWS_PER_TASK", 1000)
    monkeypatch.setattr(grouping, "TASK_PAIRS", 200)


def run(store: Store, shards: Mapping[str, Sequence[Row]], section: DedupSection) -> dict[tuple[str, int], Row]:
    pool = embedded_pool(store, SPEC, shards)
    return dropped_of(store, pool, dedup_pool(store, pool, SPEC, section))


def pairs_left(shards: Mapping[str, Sequence[Row]], dropped: Collection[tuple[str, int]]) -> set[str]:
    return {row["uid"] for name, rows in shards.items() for i, row in enumerate(rows) if (name, i) not in dropped}


@pytest.mark.parametrize(("rule", "caption"), one_quickly(("components", None)))
def test_what_leaves_is_what_all_cosines_say(
    ray_local: None, small: None, store: Store, rule: Any, caption: float | None
) -> None:
    shards = cut(planted(3000), 4)
    pool = embedded_pool(store, SPEC, shards)
    dedup = dedup_pool(store, pool, SPEC, DedupSection(threshold=0.97, groups=rule, caption_threshold=caption))
    dropped = dropped_of(store, pool, dedup)
    assert set(dropped) == literal(shards, threshold=0.97, rule=rule, caption=caption)
    assert dedup.cells > 20
    assert len([name for name in store.list(dedup.folder) if "pairs-" in name]) == 3
    assert sum(dedup.dropped.values()) == len(dropped)
    assert min(dedup.dropped.values()) > 50, dedup.dropped
    for (name, row), why in dropped.items():
        other = shards[why["duplicate_of_shard"]][why["duplicate_of_row"]]
        assert why["similarity"] == pytest.approx(float(shards[name][row]["zimg"] @ other["zimg"]), abs=1e-3)
        assert (why["representative_shard"], why["representative_row"]) not in dropped


@pytest.mark.parametrize("rule", [pytest.param("components", marks=pytest.mark.exhaustive), "greedy"])
def test_no_order_of_shards_matters(ray_local: None, small: None, tmp_path: Path, rule: Any) -> None:
    rows, section = planted(3000), DedupSection(threshold=0.97, groups=rule)
    shards = cut(rows, 4)
    backwards = cut(rows[::-1], 3)
    left = [
        pairs_left(some, run(Store(str(tmp_path / str(i))), some, section))
        for i, some in enumerate((shards, backwards))
    ]
    assert left[0] == left[1]
    assert 2000 < len(left[0]) < 2700


@pytest.mark.parametrize("rule", ["components", pytest.param("greedy", marks=pytest.mark.exhaustive)])
def test_two_halves_decided_anew_are_the_whole(ray_local: None, small: None, tmp_path: Path, rule: Any) -> None:
    section = DedupSection(threshold=0.97, groups=rule, earlier="anew")
    rows = planted(4000)
    # The new shards stand before, between and behind the old ones.
    first, second = cut(rows[:1700], 2, 10), cut(rows[1700:], 3, 9) | cut(rows[1700:1900], 1, 40)
    second = {f"{name}-new": rows for name, rows in second.items()}
    halves, whole = Store(str(tmp_path / "halves")), Store(str(tmp_path / "whole"))
    run(halves, first, section)
    grown, once = run(halves, first | second, section), run(whole, first | second, section)
    assert grown.keys() == once.keys()
    if rule == "components":  # by which pair a row is tied to its group depends on who was compared with whom
        ends = ("representative_shard", "representative_row")
        assert all(grown[place][end] == once[place][end] for place in grown for end in ends)


def test_earlier_decisions_stand_and_new_rows_yield_to_them(ray_local: None, small: None, store: Store) -> None:
    section = DedupSection(threshold=0.97)
    rows = planted(3000)
    first = cut(rows[:1700], 2, 10)
    shards = first | {"009": rows[1700:2300], "012": rows[2300:]}
    then, now = run(store, first, section), run(store, shards, section)
    same = ("reason", "duplicate_of_shard", "duplicate_of_row", "similarity", "representative_shard")
    old = {place: why for place, why in now.items() if place[0] in first}
    assert {place: [why[name] for name in same] for place, why in old.items()} == {
        place: [why[name] for name in same] for place, why in then.items()
    }
    # Documented: of a group that has an earlier row, no new one stays, better-ranked or not.
    anew = literal(shards, threshold=0.97)
    kept_then = {(name, i) for name in first for i in range(len(first[name]))} - set(then)
    assert {place for place in now if place[0] not in first} >= {place for place in anew if place[0] not in first}
    stays_wrongly = anew - set(now)
    assert stays_wrongly
    assert stays_wrongly <= kept_then


def test_a_third_pool_starts_from_the_largest_that_it_holds(ray_local: None, small: None, store: Store) -> None:
    section = DedupSection(threshold=0.97, earlier="anew")
    rows = planted(2400)
    shards = cut(rows, 4)
    pools = [
        embedded_pool(store, SPEC, {name: shards[name] for name in names})
        for names in (["000"], ["000", "001"], ["002"], list(shards))
    ]
    done = [dedup_pool(store, pool, SPEC, section) for pool in pools]
    assert done[-1].chain == (done[0].folder, done[1].folder, done[3].folder)
    assert done[-1].generations == (0, 1, 2, 2)
    assert set(dropped_of(store, pools[-1], done[-1])) == literal(shards, threshold=0.97)
    assert dedup_pool(store, pools[-1], SPEC, section) == done[-1]


@pytest.mark.parametrize("gone", ["dedup.json", "counts.json", "pairs-000000.parquet", "nodes-000001.parquet"])
def test_what_an_earlier_deduplication_found_is_missed(ray_local: None, small: None, store: Store, gone: str) -> None:
    section = DedupSection(threshold=0.97)
    rows = planted(3000)
    first = dedup_pool(store, embedded_pool(store, SPEC, cut(rows[:2000], 2)), SPEC, section)
    grown = embedded_pool(store, SPEC, cut(rows[:2000], 2) | cut(rows[2000:], 1, 5))
    later = dedup_pool(store, grown, SPEC, section)
    assert later.chain[0] == first.folder
    for name in ("dedup.json", "pairs-000001.parquet"):
        store.delete(f"{later.folder}/{name}")
    store.delete(f"{first.folder}/{gone}")
    with pytest.raises(UserError, match=rf"{gone}: expected the earlier deduplication .*; restore it, or delete "):
        dedup_pool(store, grown, SPEC, section)


@pytest.mark.parametrize(("rule", "caption"), one_quickly(("greedy", 0.9)))
def test_decisions_stand_through_three_pools(
    ray_local: None, small: None, store: Store, rule: Any, caption: float | None
) -> None:
    section = DedupSection(threshold=0.97, groups=rule, caption_threshold=caption)
    rows = planted(2400)
    shards: dict[str, list[Row]] = {}
    before: set[tuple[str, int]] = set()
    for name, some in (("5", rows[:900]), ("3", rows[900:1800]), ("7", rows[1800:])):
        earlier = set(shards)
        shards[name] = some
        dropped = set(run(store, shards, section))
        assert {place for place in dropped if place[0] in earlier} == before
        before = dropped
        # What stays has no near-duplicate among what stayed before it.
        z = unit(np.array([row["zimg"] for rows in shards.values() for row in rows], np.float16).astype(np.float32))
        t = unit(np.array([row["ztxt"] for rows in shards.values() for row in rows], np.float16).astype(np.float32))
        places = [(name, i) for name, rows in shards.items() for i in range(len(rows))]
        stays = np.array([place not in dropped for place in places])
        near = (z @ z.T >= 0.97) & (t @ t.T >= (-2 if caption is None else caption))
        new = np.array([place[0] == name for place in places])
        assert not (near & np.outer(stays & new, stays & ~new)).any()


def test_what_is_left_undone_is_done_to_the_same_bytes(ray_local: None, small: None, store: Store) -> None:
    section = DedupSection(threshold=0.97)
    pool = embedded_pool(store, SPEC, cut(planted(3000), 4))
    folder = dedup_pool(store, pool, SPEC, section).folder
    files = {name: store.read_bytes(name) for name in store.list(folder)}
    assert len(files) == 2 * 3 + 5
    for gone in (
        ["dedup.json"],
        ["dedup.json", "dropped-000000.parquet"],
        ["dedup.json", "pairs-000001.parquet"],
        list(files),
    ):
        for name in gone:
            store.delete(name if name.startswith(folder) else f"{folder}/{name}")
        dedup_pool(store, pool, SPEC, section)
        assert {name: store.read_bytes(name) for name in store.list(folder)} == files


def test_rows_without_a_sound_vector_are_counted_and_group_with_nothing(
    ray_local: None, small: None, store: Store
) -> None:
    rows = planted(1500)
    bad = [
        {"zimg": np.full(D, np.nan), "ztxt": rows[0]["zimg"]},
        {"zimg": np.zeros(D)},
        {"zimg": rows[0]["zimg"], "ztxt": np.full(D, np.inf)},
        {"zimg": None, "status": "image_truncated"},
        {"zimg": None, "status": "embedding_nonfinite"},
    ]
    bad = [
        {"uid": f"bad-{i}", "image": b"one", "caption": b"file", "size": (8, 8)} | row for i, row in enumerate(bad * 2)
    ]
    shards = cut(rows, 2) | {"000": [*bad[:5], *rows], "only": bad[5:]}
    pool = embedded_pool(store, SPEC, shards)
    dedup = dedup_pool(store, pool, SPEC, DedupSection(threshold=0.97))
    assert dedup.unsound == 6
    assert dedup.evaluation_statuses == {}
    assert dedup.statuses == {"ok": pool.rows - 4, "image_truncated": 2, "embedding_nonfinite": 2}
    dropped = dropped_of(store, pool, dedup)
    assert not [place for place in dropped if place[0] == "only" or (place[0] == "000" and place[1] < 5)]
    assert len(dropped) > 100


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_a_tiny_pool(ray_local: None, store: Store, rows: int) -> None:
    shards = {"a": planted(30)[:rows], "empty": []}
    pool = embedded_pool(store, SPEC, shards)
    dedup = dedup_pool(store, pool, SPEC, DedupSection())
    assert (dedup.cells, dedup.beyond, dedup.largest) == (1, 0, ())
    assert not dropped_of(store, pool, dedup)


def test_near_copies_of_evaluation_images_leave(ray_local: None, small: None, store: Store) -> None:
    rows = planted(2400)
    shards = cut(rows, 3)
    rng = np.random.default_rng(5)
    test_set = [
        {
            "zimg": unit(rows[i]["zimg"] + 0.1 * unit(rng.normal(size=D))),
            "ztxt": unit(rng.normal(size=D)),
            "uid": f"t{i}",
        }
        for i in range(0, 200, 2)
    ]
    test_set += [{"zimg": rows[i]["zimg"], "image": rows[i]["image"], "uid": f"t{i}"} for i in range(300, 320)]
    test_set.append({"zimg": None, "status": "caption_missing"})
    evaluation = embedded_pool(store, SPEC, {"test": test_set})
    pool = embedded_pool(store, SPEC, shards)
    for caption in (None, 0.9):  # the captions of an evaluation set do not matter
        section = DedupSection(threshold=0.97, caption_threshold=caption)
        dedup = dedup_pool(store, pool, SPEC, section, [evaluation])
        assert dedup.evaluation_statuses == {"ok": 120, "caption_missing": 1}
        dropped = dropped_of(store, pool, dedup)
        contaminated = {place for place, why in dropped.items() if why["reason"] == "contaminated"}
        seen = np.array([row["zimg"] for row in test_set[:-1]], np.float16).astype(np.float32)
        expected = {
            (name, i)
            for name, some in shards.items()
            for i, row in enumerate(some)
            if (unit(seen) @ unit(np.asarray(row["zimg"], np.float16).astype(np.float32))).max() >= 0.97
        }
        assert contaminated == expected
        assert all(dropped[place]["representative_shard"] == "evaluation" for place in contaminated)
        clean = {
            name: [row for i, row in enumerate(some) if (name, i) not in expected] for name, some in shards.items()
        }
        others = pairs_left(shards, dropped)
        assert others == pairs_left(clean, literal(clean, threshold=0.97, caption=caption))
    # A later pool is compared with the sets, too.
    grown = embedded_pool(store, SPEC, shards | {"late": [test_set[3] | {"size": (32, 32)}]})
    late = dedup_pool(store, grown, SPEC, section, [evaluation])
    assert late.chain[0] == dedup.folder
    assert dropped_of(store, grown, late)["late", 0]["reason"] == "contaminated"
    # And a pool that is itself the evaluation set loses all of it, not the set's rows.
    same = dedup_pool(store, evaluation, SPEC, section, [evaluation])
    assert sum(same.dropped.values()) == len(test_set) - 1


def test_an_embedding_file_of_an_older_version_is_refused(ray_local: None, store: Store, tmp_path: Path) -> None:
    pool = embedded_pool(store, SPEC, cut(planted(20), 1))
    name = embedding_name(SPEC.sha, pool.shards[0])
    with store.open_input(name) as file:
        table = pq.read_table(file).drop_columns(["picture"])
    pq.write_table(table, tmp_path / "old.parquet")
    store.put_file(tmp_path / "old.parquet", name)
    with pytest.raises(UserError, match=r"expected a column picture.*delete the folder embeddings/m and run again"):
        dedup_pool(store, pool, SPEC, DedupSection())


def test_cells_that_changed_are_refused(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    cells = np.arange(12, dtype=np.float32).reshape(3, 4)
    write_cells(store, "dedup/a/b", cells, {"tasks": 1})
    assert np.array_equal(read_cells(store, "dedup/a/b"), cells)
    path = store.local_path("dedup/a/b/cells.npy")
    whole = path.read_bytes()
    for place in (0, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(DamagedError, match=r"^dedup/a/b/cells\.npy: "):
            read_cells(store, "dedup/a/b")


@pytest.mark.usefixtures("without_ray")
@pytest.mark.parametrize("kinds", [(pa.binary(), pa.string()), (pa.binary_view(), pa.string_view())], ids=str)
def test_a_sheet_shows_what_captions_say_and_obeys_nothing(tmp_path: Path, kinds: tuple[pa.DataType, ...]) -> None:
    write_tiny(tmp_path, "tiny.json")
    evil = '<script>alert("x")</script> & <b>'
    pictures = []
    for number, quality in ((0, 95), (0, 90), (1, 95)):
        drawn = Image.open(io.BytesIO(draw_pair(number, 0, image_size=64)[0])).convert("RGB")
        drawn.save(out := io.BytesIO(), "JPEG", quality=quality)
        pictures.append(out.getvalue())
    columns = (pa.array(values).cast(kind) for values, kind in zip((pictures, [evil] * 3), kinds, strict=True))
    write_pool(tmp_path / "pool", pa.table(list(columns), ["jpg", "caption"]))
    recipe = Recipe.model_validate(
        {
            "root": str(tmp_path / "root"),
            "pool": {"path": str(tmp_path / "pool")},
            "reference": {"model": "tiny.json"},
            "learner": {"model": "tiny.json"},
            "selection": {"sub_batch_size": 1, "n_chunks": 1},
            "dedup": {"threshold": 0.5},
        }
    )
    store, pool, dedup = dedup_recipe(recipe, base=tmp_path)
    assert write_sheet(store, pool, dedup, tmp_path / "sheet.html", groups=4) == 1
    sheet = (tmp_path / "sheet.html").read_text()
    assert sheet.count("<script") == 1  # the page's own
    assert sheet.count(str(escape(evil))) >= 3


@pytest.mark.usefixtures("without_ray")
def test_a_recipes_pool_is_embedded_and_its_groups_are_drawn(tmp_path: Path) -> None:
    write_tiny(tmp_path, "tiny.json")
    draw_pool(tmp_path / "pool", rows=300, shards=3, seed=0, image_size=32, duplicate_share=0.1, broken_share=0.02)
    draw_pool(tmp_path / "test-set", rows=10, shards=1, seed=0, image_size=32)
    recipe = Recipe.model_validate(
        {
            "root": str(tmp_path / "root"),
            "pool": {"path": str(tmp_path / "pool"), "uid": "key"},
            "reference": {"model": "tiny.json"},
            "learner": {"model": "tiny.json"},
            "selection": {"sub_batch_size": 8, "n_chunks": 4},
            "dedup": {"threshold": 0.9995, "evaluation": [{"path": str(tmp_path / "test-set")}]},
            "resources": {"workers": 1},
        }
    )
    store, pool, dedup = dedup_recipe(recipe, base=tmp_path)
    assert min(dedup.dropped[reason] for reason in ("duplicate_exact", "near_duplicate", "contaminated")) > 0
    assert sum(dedup.statuses.values()) == pool.rows
    assert sum(rows for status, rows in dedup.statuses.items() if status.startswith("image")) > 0
    drawn = write_sheet(store, pool, dedup, tmp_path / "sheet.html", groups=4)
    sheet = (tmp_path / "sheet.html").read_text()
    assert drawn == sheet.count('<div class="gallery">') == 4
    shown_to = io.StringIO()
    for item in dedup_tables(dedup, pool):
        Console(file=shown_to, width=200).print(item)
    said = shown_to.getvalue()
    assert f"{dedup.pairs:,} pairs, {dedup.groups:,} groups" in said
    assert "no near-duplicate can have been missed" in said
    assert "decided from the beginning" in said
    assert re.search(rf"{dedup.dropped['near_duplicate']:,} +near_duplicate", said)
    stay = dedup.statuses["ok"] - sum(dedup.dropped.values())
    assert re.search(rf"{stay:,} +no, they stay", said)
    pictures = {image for shard in [*pool.shards] for image in pq.read_table(shard.path)["jpg"].to_pylist()}
    pictures |= set(pq.read_table(tmp_path / "test-set" / "00000.parquet")["jpg"].to_pylist())
    shown = [base64.b64decode(found) for found in re.findall('src="data:image/[a-z]+;base64,([^"]+)"', sheet)]
    assert len(shown) >= 8
    assert set(shown) <= pictures
    assert sheet.count('class="stays"') == 4
    assert write_sheet(store, pool, dedup, tmp_path / "again.html", groups=4) == 4
    assert (tmp_path / "again.html").read_text() == sheet


def test_every_mistake_is_told_at_once(tmp_path: Path) -> None:
    fields = {
        "root": str(tmp_path / "root"),
        "pool": {"path": str(tmp_path / "nowhere")},
        "learner": {"model": "tiny.json"},
        "selection": {"sub_batch_size": 8, "n_chunks": 4},
    }
    with pytest.raises(UserError) as told:
        dedup_recipe(Recipe.model_validate(fields), base=tmp_path)
    dedup, reference, pool = told.value.lines
    assert dedup.startswith("dedup: must be given; ")
    assert reference.startswith("reference: must be given")
    assert "nowhere: expected a file" in pool
    (tmp_path / "labels").mkdir()
    pq.write_table(pa.table({"jpg": [b"x"], "label": ["a"]}), tmp_path / "labels" / "a.parquet")
    sets = [{"path": str(tmp_path / "none")}, {"path": str(tmp_path / "labels")}]
    fields |= {"dedup": {"evaluation": sets}, "reference": {"model": "tiny.json"}}
    with pytest.raises(UserError) as told:
        dedup_recipe(Recipe.model_validate(fields), base=tmp_path)
    pool, none, labels, model = told.value.lines
    assert "nowhere: expected a file" in pool
    assert "none: expected a file" in none
    assert "(or name it with dedup.evaluation.caption)" in labels
    assert "tiny.json" in model


def test_another_question_is_another_folder() -> None:
    pool = Pool(shards=(), columns=Columns(image="i", caption="c", uid=None), schema=None, ignored=(), skipped=())
    asked = [
        DedupSection(),
        DedupSection(threshold=0.9),
        DedupSection(caption_threshold=0.9),
        DedupSection(groups="greedy"),
        DedupSection(earlier="anew"),
    ]
    folders = [dedup_folder(section, SPEC, pool, ()) for section in asked]
    folders.append(dedup_folder(asked[0], SPEC, pool, [pool]))
    folders.append(dedup_folder(asked[0], dataclasses.replace(SPEC, model="other"), pool, ()))
    assert len(set(folders)) == len(folders)
    assert dedup_folder(DedupSection(evaluation=[EvaluationSet(path="moved")]), SPEC, pool, ()) == folders[0]


def test_a_flood_of_near_copies_is_thinned(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    n = 400
    z = unit(np.ones(D) + 0.1 * rng.normal(size=(n, D))).astype(np.float16)
    nodes = np.zeros(n, NODE)
    nodes["id"], nodes["score"] = np.arange(n), rng.random(n)
    distinct = np.column_stack([np.arange(n), np.arange(n)]).astype(np.uint64)
    rows = pipeline.Rows(nodes=nodes, content=distinct, picture=distinct, zimg=z, ztxt=z[:, :0])
    alone = Assignment(home=np.zeros(n, int), border=np.full((n, 3), -1), beyond=np.zeros(n, bool))
    columns = Columns(image="i", caption="c", uid=None)
    shard = Shard(index=0, name="a", path="a", size=0, version="", rows=n, columns=columns)
    compared = pipeline.Compared((shard,), (0,), 0, True)
    every, ordered = pipeline.search_cells(rows, alone, [0], Threshold(image=0.985), compared)
    monkeypatch.setattr(neighbours, "TILE", 64)
    monkeypatch.setattr(pipeline, "MOST_PAIRS", 1000)
    fewer, same = pipeline.search_cells(rows, alone, [0], Threshold(image=0.985), compared)
    assert np.array_equal(ordered, same)
    assert len(every) > 10_000
    assert len(fewer) < 3 * n + 2 * 1000
    for rule in ("components", "greedy"):
        one, other = (decide(pairs, np.zeros(n, int), rule) for pairs in (every, fewer))
        assert np.array_equal(one.dropped, other.dropped)
        assert 10 < len(one.dropped) < n
