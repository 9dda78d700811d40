"""The report: one file that shows what a round did, opens without a network, and obeys nothing that a pool says."""

import io
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from curate.errors import UserError
from curate.jobs.cli import app
from curate.jobs.drawn_pool import draw_pool
from curate.jobs.page import Figure, Gallery, linked, picture
from curate.jobs.plots import histograms
from curate.jobs.report import Counted, _captions, _counts, write_report
from curate.pipelines.round import run_round
from curate.recipe import Recipe
from curate.rounds.attempts import read_attempts
from curate.rounds.committed import newest_round, open_rounds
from curate.rounds.look import look_at
from curate.rounds.manifest import expire
from curate.storage import Store
from tests.helpers import write_tiny
from tests.stand_in import without_ray

EVIL = '<script>document.title = "evil"</script>\' onload="x" & <b>'
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two rounds of a pool with broken rows, duplicates and one caption that would like to be obeyed."""
    folder = tmp_path_factory.mktemp("world")
    write_tiny(folder, "reference.json")
    write_tiny(folder, "learner.json", embed_dim=24)
    drawn: dict[str, Any] = {"image_size": 32, "broken_share": 0.05, "duplicate_share": 0.1}
    draw_pool(folder / "pool", rows=320, shards=4, seed=0, **drawn)
    for path in (folder / "pool").iterdir():
        table = pq.read_table(path)
        captions = [EVIL + caption if caption else caption for caption in table["caption"].to_pylist()]
        pq.write_table(table.set_column(table.column_names.index("caption"), "caption", pa.array(captions)), path)
    fields = {
        "root": str(folder / "root"),
        "pool": {"path": str(folder / "pool"), "uid": "key"},
        "reference": {"model": "reference.json"},
        "learner": {"model": "learner.json"},
        "dedup": {"threshold": 0.9999},
        "selection": {"sub_batch_size": 16, "filter_ratio": 0.75, "criterion": "learnability", "super_batches": 2},
        "resources": {"price_per_hour": 4.0},
    }
    with pytest.MonkeyPatch.context() as patch:
        without_ray.__wrapped__(patch)
        for number in range(2):
            run_round(Recipe.model_validate(fields), base=folder, number=number)
    return folder / "root"


@pytest.fixture(scope="module")
def page(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_report(Store(str(root)), 1, path)
    return path


def test_everything_is_in_one_file_and_the_same_twice(root: Path, page: Path, tmp_path: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert len(text) < 10 * 2**20
    assert not re.findall(r'(?:src|href)="(?!data:image/|#)', text)
    write_report(Store(str(root)), 1, tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == text


def test_what_a_pool_says_is_text(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert text.count("<script") == 1  # the page's own
    assert "&lt;script&gt;" in text
    assert "onload=&#34;" in text


def test_chosen_pairs_broken_rows_and_duplicates_are_shown(root: Path, page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    chosen = pq.read_table(sorted((root / "rounds/r000001").glob("curated-*.parquet")))["key"].to_pylist()
    shown = set(re.findall(r'data-uid="([^"]+)"', text))
    assert len(shown & set(chosen)) >= 18
    for what in ("image_truncated", "image_empty", "duplicate_exact", "similarity", "no picture to show"):
        assert what in text
    for heading in ("The best of the chosen", "Taken for the batch", "Left for the batch", "believes least"):
        assert heading in text


def test_time_and_price_of_the_attempt(root: Path, page: Path) -> None:
    (attempt,) = read_attempts(Store(str(root)), 1)
    took = {one["step"]: one["seconds"] for one in attempt["steps"]}
    assert {"embed", "dedup", "index", "window", "embed learner", "select", "write", "quality"} <= set(took)
    assert max(took.values()) <= attempt["wall_s"]
    price = attempt["wall_s"] / 3600 * attempt["workers"] * 4.0
    assert f"{price:,.2f} at 4.0 for a worker and hour" in page.read_text(encoding="utf-8")


def test_a_round_whose_rows_were_removed_has_its_counts(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path / "root")
    store = Store(str(tmp_path / "root"))
    expire(store, 0)
    write_report(store, 0, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "The rows of this round were removed" in text
    assert "Where the rows went" in text
    assert "<figure" not in text


def test_a_pool_that_changed_is_said(root: Path, tmp_path: Path, page: Path) -> None:
    shard = sorted((root.parent / "pool").iterdir())[2]
    kept, written = shard.read_bytes(), shard.stat().st_mtime_ns
    try:
        shard.write_bytes(kept + b" ")
        write_report(Store(str(root)), 1, tmp_path / "report.html")
    finally:
        shard.write_bytes(kept)
        os.utime(shard, ns=(written, written))
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert f"No pictures of {shard.name}: {shard}: expected" in text
    assert text.count("No pictures of ") == 1
    whole = page.read_text(encoding="utf-8").count("<img ")
    assert whole / 2 < text.count("<img ") < whole
    assert "Where the rows went" in text


def test_captions_and_hosts_are_those_of_the_rows(root: Path) -> None:
    store = Store(str(root))
    look = look_at(open_rounds(store, [newest_round(store)])[0])
    captions, hosts = _captions(look, look.candidates, None)
    assert len(captions) == len(look.candidates)
    assert len({place[0] for place in captions}) == 4
    for (shard, row), caption in captions.items():
        assert caption == pq.read_table(look.shards[shard].path)["caption"][row].as_py()
        assert hosts[shard, row] == look.shards[shard].name
    some = {(0, 1): "a", (1, 0): "a", (1, 5): "b"}
    assert _counts(some, {(1, 5), (7, 7)}) == [
        Counted(name="a", chosen=0.0, candidates=2 / 3),
        Counted(name="b", chosen=1.0, candidates=1 / 3),
    ]


@pytest.mark.parametrize("method", ["joint", "uniform"])
def test_the_smallest_round_has_a_report(root: Path, tmp_path: Path, method: str) -> None:
    """A sub-batch of one row, of a learner that was not looked at: nothing to compare, no matrix, and no crash."""
    fields = {
        "root": str(tmp_path / "root"),
        "pool": {"path": str(root.parent / "pool"), "uid": "key"},
        "reference": {"model": "reference.json"},
        "learner": {"model": "learner.json"},
        "selection": {"sub_batch_size": 1, "n_chunks": 1, "filter_ratio": 0.5, "super_batches": 1, "method": method},
    }
    with pytest.MonkeyPatch.context() as patch:
        without_ray.__wrapped__(patch)
        run_round(Recipe.model_validate(fields), base=root.parent)
    store = Store(str(tmp_path / "root"))
    write_report(store, 0, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "A sub-batch as a matrix" not in text
    assert ("Taken for the batch" in text) == (method == "joint")
    assert not histograms({"chosen": np.array([]), "candidates": np.array([])}, label="nothing")


def test_what_is_gone_from_a_root_is_a_line(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path / "root")
    shutil.rmtree(tmp_path / "root/embeddings")
    with pytest.raises(UserError, match="expected what round 1 left; restore the file"):
        write_report(Store(str(tmp_path / "root")), 1, tmp_path / "report.html")


def test_the_verb_says_where_it_wrote(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    app(["report", str(root)], standalone_mode=False)
    assert capsys.readouterr().out == "report-r000001.html\n"
    assert (tmp_path / "report-r000001.html").stat().st_size > 10_000
    with pytest.raises(UserError, match="round 7 is not committed; the newest is 1"):
        app(["report", str(root), "--round", "7"], standalone_mode=False)
    with pytest.raises(UserError, match=r"--to no/where.html: expected it in a folder"):
        app(["report", str(root), "-o", "no/where.html"], standalone_mode=False)
    with pytest.raises(UserError, match="expected a committed round, found none"):
        app(["report", str(tmp_path / "empty")], standalone_mode=False)


def test_a_large_picture_is_made_small_and_a_broken_one_is_none() -> None:
    large, small = io.BytesIO(), io.BytesIO()
    Image.effect_noise((900, 600), 90).save(large, "PNG")
    Image.new("RGB", (20, 20), "red").save(small, "PNG")
    shown = picture(large.getvalue())
    assert shown is not None
    assert shown.startswith("data:image/jpeg;base64,")
    assert len(shown) < 60_000
    as_it_is = picture(small.getvalue())
    assert as_it_is is not None
    assert as_it_is.startswith("data:image/png;base64,")
    assert picture(large.getvalue()[:100]) is None
    assert picture(None) is None


def test_a_pair_that_is_shown_twice_has_one_id_and_links_lead_somewhere() -> None:
    def figure(uid: str, near: str = "") -> Figure:
        return Figure(uid=uid, caption="", where="", near=near)

    seen: set[str] = set()
    first = linked([Gallery(title="", figures=[figure("a b"), figure("c", near="x")])], seen)
    second = linked([Gallery(title="", figures=[figure("a b", near="c"), figure("", near="")])], seen)
    figures = [one for gallery in first + second for one in gallery.figures]
    assert [one.anchor for one in figures] == ["uid-a%20b", "uid-c", "", ""]
    assert [one.near_anchor for one in figures] == ["", "", "uid-c", ""]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A real browser, without a network."""
    if BROWSER is None:
        pytest.skip("there is no Chromium here")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def opened(browser: Any, page: Path) -> Iterator[Any]:
    context = browser.new_context(offline=True, viewport={"width": 1280, "height": 860})
    shown = context.new_page()
    shown.complaints = []
    shown.on("console", lambda message: shown.complaints.append(message.text))
    shown.on("pageerror", lambda error: shown.complaints.append(str(error)))
    shown.goto(page.as_uri())
    yield shown
    assert shown.complaints == []
    context.close()


def test_pictures_are_there_and_nothing_is_obeyed(opened: Any) -> None:
    assert opened.title().startswith("Round 1 of ")
    widths = opened.evaluate("[...document.images].map(image => image.naturalWidth)")
    assert len(widths) > 40
    assert min(widths) > 0


def test_pairs_are_filtered_by_words(opened: Any) -> None:
    everything = opened.locator("figure:visible").count()
    opened.fill("#filter", "red circle")
    shown = opened.locator("figure:visible")
    assert 0 < shown.count() < everything
    captions = shown.evaluate_all("all => all.map(one => one.dataset.text)")
    assert all("red" in text and "circle" in text for text in captions)
    assert opened.inner_text("#count") == f"{shown.count()} of {everything} pairs"
    opened.fill("#filter", "")
    assert opened.locator("figure:visible").count() == everything


def test_a_gallery_is_sorted_and_put_back(opened: Any) -> None:
    gallery = opened.locator("#chosen ~ .gallery").first
    facts = "all => all.map(one => JSON.parse(one.dataset.facts)['reference loss'])"
    listed = gallery.locator("figure").evaluate_all(facts)
    gallery.locator("select").select_option("reference loss")
    ordered = gallery.locator("figure").evaluate_all(facts)
    assert ordered == sorted(listed, reverse=True) != listed
    gallery.locator("select").select_option("")
    assert gallery.locator("figure").evaluate_all(facts) == listed


def test_a_link_leads_to_the_pair_that_another_one_is_near_to(opened: Any) -> None:
    link = opened.locator("#duplicates ~ .groups a").first
    uid = link.inner_text()
    link.click()
    assert opened.evaluate("document.querySelector(':target').querySelector('.copy').dataset.uid") == uid


def test_a_uid_is_copied(opened: Any) -> None:
    button = opened.locator(".copy").first
    opened.context.grant_permissions(["clipboard-read", "clipboard-write"])
    button.click()
    opened.wait_for_function("document.getElementById('count').textContent !== ''")
    copied = opened.evaluate("getSelection().toString() || navigator.clipboard.readText()")
    assert copied.strip() == button.get_attribute("data-uid")


@pytest.mark.parametrize(
    ("width", "scheme"),
    [
        (390, "dark"),
        (1280, "light"),
        pytest.param(390, "light", marks=pytest.mark.exhaustive),
        pytest.param(1280, "dark", marks=pytest.mark.exhaustive),
    ],
)
def test_readers_of_all_kinds_can_read_it(browser: Any, page: Path, scheme: Any, width: int) -> None:
    from axe_playwright_python.sync_playwright import Axe

    context = browser.new_context(offline=True, viewport={"width": width, "height": 860}, color_scheme=scheme)
    shown = context.new_page()
    shown.goto(page.as_uri())
    assert shown.evaluate("document.documentElement.scrollWidth") <= width
    # Without its policy, which does not let a stranger's script in.
    context.close()
    context = browser.new_context(bypass_csp=True, viewport={"width": width, "height": 860}, color_scheme=scheme)
    shown = context.new_page()
    shown.goto(page.as_uri())
    found = Axe().run(shown).response["violations"]
    serious = [(one["id"], one["nodes"][0]["html"][:200]) for one in found if one["impact"] in ("serious", "critical")]
    assert serious == []
    context.close()
