"""Figures of a held-out set are what slow loops over its rows say, ties are lost, and the model is left as it was."""

import math
import re
from collections.abc import Sequence
from operator import mul
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from curate.errors import UserError
from curate.jobs.drawn_pool import COLOURS, draw_pool
from curate.models.create import create_model
from curate.models.encoder import eval_transform
from curate.pool.images import Dropped, clean_caption, decode_image
from curate.reader import evaluate as module
from curate.reader.evaluate import NEVER, HeldOut, count_rivals, evaluate, load_held_out, recall
from tests.helpers import CPU, write_tiny

ROWS = 120
TEMPLATES = ["a photo of a {}.", "something {} on grey", "{}"]
BLOCKS = [1, 7, 36, 37, 512]


# --- the definition, one query after another -------------------------------------------------------------------------


def rivals_by_loops(queries: Tensor, candidates: Tensor, positives: Sequence[tuple[int, int]]) -> list[int | None]:
    """For each query, how many candidates of others score at least as high; None if none of its own scores at all."""
    rows, counts = candidates.tolist(), list[int | None]()
    for number, query in enumerate(queries.tolist()):
        own = {candidate for owner, candidate in positives if owner == number}
        scores = [sum(map(mul, query, candidate)) for candidate in rows]
        mine = [scores[i] for i in own if math.isfinite(scores[i])]
        others = [score for i, score in enumerate(scores) if i not in own and math.isfinite(score)]
        counts.append(sum(score >= max(mine) - module.TIE for score in others) if mine else None)
    return counts


def share_below(counts: Sequence[int | None], k: int) -> float:
    return sum(count is not None and count < k for count in counts) / len(counts)


@given(seed=st.integers(0, 10**6), whole=st.booleans(), block_rows=st.integers(1, 12))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_rivals_are_those_that_loops_count(seed: int, whole: bool, block_rows: int) -> None:
    """Vectors of small whole numbers tie often and exactly; every candidate has one owner or more, as have queries."""
    draw = torch.Generator().manual_seed(seed)
    q, c, d = torch.randint(1, 10, (3,), generator=draw).tolist()
    rows = [torch.randint(-1, 2, (n, d), generator=draw).float() for n in (q, c)]
    if not whole:
        rows = [normalize(torch.randn(n, d, generator=draw), dim=-1) for n in (q, c)]
    queries, candidates = rows
    for vectors in rows:
        vectors[torch.rand(len(vectors), generator=draw) < 0.1, 0] = torch.nan
        vectors[torch.rand(len(vectors), generator=draw) < 0.1] = torch.inf
    positives = [(i, int(torch.randint(c, (), generator=draw))) for i in range(q)]
    positives += [(int(torch.randint(q, (), generator=draw)), i) for i in range(c)]

    counts = rivals_by_loops(queries, candidates, positives)
    found = count_rivals(queries, candidates, torch.tensor(positives), block_rows=block_rows)
    assert found.tolist() == [NEVER if count is None else count for count in counts]
    for k in (1, 2, 5):
        assert recall(found, k) == share_below(counts, k)


@pytest.mark.parametrize("block_rows", BLOCKS)
@pytest.mark.parametrize("d", [5, 100, 513])
def test_a_collapsed_model_finds_nothing(block_rows: int, d: int) -> None:
    """Sums of the same products differ in their last bits by where in the matrix they are: ties all the same."""
    for seed in range(20):
        zimg, ztxt = normalize(torch.randn(2, d, generator=torch.Generator().manual_seed(seed)), dim=-1)
        pairs = torch.arange(37)[:, None].expand(-1, 2)
        rivals = count_rivals(zimg.expand(37, -1).clone(), ztxt.expand(37, -1).clone(), pairs, block_rows=block_rows)
        assert rivals.tolist() == [36] * 37


@pytest.mark.parametrize("block_rows", BLOCKS)
def test_perfect_embeddings_find_everything(block_rows: int) -> None:
    rivals = count_rivals(torch.eye(37), torch.eye(37), torch.arange(37)[:, None].expand(-1, 2), block_rows=block_rows)
    assert recall(rivals, 1) == 1


@pytest.mark.parametrize("block_rows", BLOCKS)
def test_rows_that_are_not_finite_are_misses_and_in_nobodys_way(block_rows: int) -> None:
    queries, candidates = torch.eye(37), torch.eye(37)
    queries[3], queries[4, 0], candidates[20], candidates[21, 5] = torch.nan, torch.inf, torch.nan, -torch.inf
    pairs = torch.arange(37)[:, None].expand(-1, 2)
    rivals = count_rivals(queries, candidates, pairs, block_rows=block_rows)
    assert rivals.tolist() == [NEVER if i in (3, 4, 20, 21) else 0 for i in range(37)]
    assert recall(rivals, 37) == 33 / 37  # a miss even where K is as large as the set


# --- a real model over a drawn set -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A drawn set of two shards, with broken rows and duplicates, and the first colour of a caption as its label.

    A label is missing where the caption begins with `on`: null, blank or not there.
    """
    folder = tmp_path_factory.mktemp("held-out") / "pool"
    draw_pool(folder, rows=ROWS, shards=2, seed=7, broken_share=0.1, duplicate_share=0.15, image_size=32)
    for path in folder.iterdir():
        table = pq.read_table(path)
        words = [re.findall("|".join(COLOURS), caption) for caption in table["caption"].to_pylist()]
        starts = [caption[:2] for caption in table["caption"].to_pylist()]
        labels = [
            [None, " "][i % 2] if start == "on" or not found else found[0]
            for i, (found, start) in enumerate(zip(words, starts, strict=True))
        ]
        pq.write_table(table.append_column("colour", pa.array(labels, pa.string()).dictionary_encode()), path)
    return folder


@pytest.fixture(scope="module")
def learner(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Any]:
    folder = tmp_path_factory.mktemp("model")
    model, _, tokenizer = create_model(write_tiny(folder), role="learner", base=folder, seed=3)
    return model, tokenizer, eval_transform(model)


def figures_by_loops(
    learner: tuple[Any, Any, Any], rows: Sequence[dict[str, Any]], templates: Sequence[str] = ()
) -> dict[str, float]:
    """The definition over rows as they are in the files, one embedding at a time."""
    model, tokenize, preprocess = learner
    usable = []
    for row in rows:
        try:
            usable.append((decode_image(row["jpg"]), row["jpg"], clean_caption(row["caption"]), row.get("colour")))
        except Dropped:
            continue
    images = list(dict.fromkeys(data for _, data, _, _ in usable))
    captions = list(dict.fromkeys(caption for _, _, caption, _ in usable))
    pairs = [(images.index(data), captions.index(caption)) for _, data, caption, _ in usable]

    def text(words: str) -> Tensor:
        return normalize(model.encode_text(tokenize([words])), dim=-1)[0]

    with torch.no_grad():
        zimg = torch.cat([normalize(model.encode_image(preprocess(decode_image(x))[None]), dim=-1) for x in images])
        ztxt = torch.stack([text(caption) for caption in captions])
        classes = sorted({label for *_, label in usable if label and label.strip()})
        weights = [
            torch.stack([text(t.replace("{}", name)) for t in templates]).mean(0) for name in classes if templates
        ]
    to_text = rivals_by_loops(zimg, ztxt, pairs)
    to_image = rivals_by_loops(ztxt, zimg, [(caption, image) for image, caption in pairs])
    figures = {
        **{f"image_to_text_r{k}": share_below(to_text, k) for k in (1, 5)},
        **{f"text_to_image_r{k}": share_below(to_image, k) for k in (1, 5)},
    }
    if templates:
        own = {(images.index(data), classes.index(label)) for _, data, _, label in usable if label in classes}
        asked = sorted({image for image, _ in own})
        to_class = rivals_by_loops(
            zimg[asked], normalize(torch.stack(weights), dim=-1), [(asked.index(image), name) for image, name in own]
        )
        figures |= {f"zero_shot_top{k}": share_below(to_class, k) for k in (1, 5) if k == 1 or len(classes) > 5}
    return figures


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [row for path in sorted(folder.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def judged(learner: tuple[Any, Any, Any], held_out: HeldOut, **how: Any) -> dict[str, float]:
    settings: dict[str, Any] = {"device": CPU, "batch_size": 13, "templates": TEMPLATES, "threads": 2}
    return evaluate(*learner, held_out, **settings | how)


def test_a_set_is_loaded_and_no_row_is_lost(labelled: Path) -> None:
    rows = rows_of(labelled)
    broken = [row["broken"] for row in rows if row["broken"]]
    held_out = load_held_out(str(labelled), label="colour", threads=2)
    assert len(broken) == ROWS // 10
    assert held_out.dropped == {reason: broken.count(reason) for reason in sorted(set(broken))}
    kept = [row for row in rows if not row["broken"]]
    assert [(held_out.images[i], held_out.captions[c]) for i, c in held_out.pairs] == [
        (row["jpg"], row["caption"].strip()) for row in kept
    ]
    assert len(held_out.images) == len(set(held_out.images)) == len(kept) - sum(bool(r["duplicate_of"]) for r in kept)
    assert len(held_out.captions) == len(set(held_out.captions)) < len(kept)
    assert held_out.labels == tuple((row["colour"] or "").strip() or None for row in kept)
    assert None in held_out.labels
    assert load_held_out([str(path) for path in labelled.iterdir()]).labels is None


def test_figures_are_those_of_loops_over_the_rows(labelled: Path, learner: tuple[Any, Any, Any]) -> None:
    held_out = load_held_out(str(labelled), label="colour")
    expected = figures_by_loops(learner, rows_of(labelled), TEMPLATES)
    assert set(expected) >= {"zero_shot_top5", "image_to_text_r5"}
    assert judged(learner, held_out) == pytest.approx(expected, abs=1e-9)
    assert 0 < expected["zero_shot_top1"] < expected["zero_shot_top5"] < 1
    for how in ({"batch_size": 1}, {"batch_size": 1000}, {"threads": 1}):
        assert judged(learner, held_out, **how) == pytest.approx(expected, abs=1e-9)
    unlabelled = judged(learner, load_held_out(str(labelled)), templates=[])
    assert unlabelled == {name: value for name, value in expected.items() if "zero" not in name}


def test_every_template_has_its_say(labelled: Path, learner: tuple[Any, Any, Any]) -> None:
    held_out = load_held_out(str(labelled), label="colour")
    found = [judged(learner, held_out, templates=[template]) for template in TEMPLATES]
    assert len({(figures["zero_shot_top1"], figures["zero_shot_top5"]) for figures in found}) == len(TEMPLATES)
    assert len({figures["image_to_text_r1"] for figures in found}) == 1


def test_five_classes_have_no_top5_and_an_image_may_have_two_labels(
    tmp_path: Path, labelled: Path, learner: tuple[Any, Any, Any]
) -> None:
    """Each picture twice, with another label the second time: either is right."""
    table = pa.Table.from_pylist([row for row in rows_of(labelled) if not row["broken"]]).select(["jpg", "caption"])
    labels = pa.array([list("abcde")[i % 5] for i in range(2 * len(table))])
    pq.write_table(pa.concat_tables([table, table]).append_column("colour", labels), tmp_path / "twice.parquet")
    figures = judged(learner, load_held_out(str(tmp_path), label="colour"))
    assert figures == pytest.approx(figures_by_loops(learner, rows_of(tmp_path), TEMPLATES), abs=1e-9)
    assert "zero_shot_top1" in figures
    assert "zero_shot_top5" not in figures


def test_what_is_equal_is_one(tmp_path: Path, labelled: Path, learner: tuple[Any, Any, Any]) -> None:
    """One picture with many captions has no rival, whichever caption is best; neither have the captions."""
    jpg = next(row["jpg"] for row in rows_of(labelled) if not row["broken"])
    captions = ["a", " a ", "b", "c", "d", "e", "f", "g", "b\n"]
    pq.write_table(pa.table({"jpg": [jpg] * len(captions), "caption": captions}), tmp_path / "one.parquet")
    held_out = load_held_out(str(tmp_path))
    assert (len(held_out.images), held_out.captions) == (1, tuple("abcdefg"))
    assert set(judged(learner, held_out).values()) == {1.0}


def test_the_model_is_left_as_it_was(labelled: Path, learner: tuple[Any, Any, Any]) -> None:
    model, tokenize, preprocess = learner
    held_out = load_held_out(str(labelled), label="colour")
    seen = []
    hook = model.visual.register_forward_pre_hook(lambda m, _: seen.append((m.training, torch.is_grad_enabled())))
    try:
        model.train()
        model.visual.ln_post.eval()  # as a trainer does that freezes a part
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        modes = [part.training for part in model.modules()]
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        random = torch.random.get_rng_state()

        evaluate(model, tokenize, preprocess, held_out, device=CPU, batch_size=64, templates=TEMPLATES)
        assert set(seen) == {(False, False)}
        with pytest.raises(ZeroDivisionError):
            evaluate(model, tokenize, lambda _: 1 / 0, held_out, device=CPU, batch_size=64, templates=TEMPLATES)  # type: ignore[arg-type,return-value]

        assert [part.training for part in model.modules()] == modes
        assert set(modes) == {True, False}
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
        assert all(p.requires_grad and p.grad is not None and bool((p.grad == 1).all()) for p in model.parameters())
        assert torch.equal(torch.random.get_rng_state(), random)
        model.encode_text(tokenize(["it trains on"])).sum().backward()
    finally:
        hook.remove()
        model.zero_grad()


@pytest.mark.parametrize("weight", [torch.nan, 0.0])
def test_a_model_that_broke_or_collapsed_scores_nothing(labelled: Path, tmp_path: Path, weight: float) -> None:
    model, _, tokenize = create_model(write_tiny(tmp_path), role="learner", base=tmp_path, seed=0)
    with torch.no_grad():
        model.visual.proj.fill_(weight)
    held_out = load_held_out(str(labelled), label="colour")
    assert set(judged((model, tokenize, eval_transform(model)), held_out).values()) == {0.0}


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        (
            {"label": "species"},
            r"00000\.parquet: expected the label column 'species', found none .*'colour'.*evaluate.label",
        ),
        (
            {"label": "width"},
            r"00000\.parquet: label column 'width': expected .* string, found int32; .*evaluate.label",
        ),
        ({"label": "duplicate_of", "caption": "broken"}, r"evaluate.label = 'duplicate_of': expected two .*found 0; "),
        ({"caption": "prose"}, r"00000\.parquet: expected the caption column 'prose', .* with evaluate\.caption"),
        ({"caption": "duplicate_of", "image": "missing"}, r"the image column 'missing', .* with evaluate\.image"),
    ],
)
def test_a_mistake_is_one_line_per_file(labelled: Path, how: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError) as caught:
        load_held_out(f"{labelled}/00000.parquet", **how)
    (line,) = caught.value.lines
    assert re.search(expected, line), line
    assert "\n" not in line


def test_a_column_that_only_one_file_lacks_is_missing(tmp_path: Path, labelled: Path) -> None:
    table = pq.read_table(labelled / "00000.parquet")
    pq.write_table(table, tmp_path / "a.parquet")
    pq.write_table(table.drop_columns("colour"), tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r"b\.parquet: expected the label column 'colour'"):
        load_held_out(str(tmp_path), label="colour")


def test_a_set_without_a_usable_row_says_why(tmp_path: Path) -> None:
    pq.write_table(pa.table({"jpg": [b"", b"GIF"], "caption": ["a", None]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"found none \(1 caption_missing, 1 image_empty\); name another set"):
        load_held_out(str(tmp_path))
    pq.write_table(
        pa.table({"jpg": pa.array([], pa.binary()), "caption": pa.array([], pa.string())}), tmp_path / "a.parquet"
    )
    with pytest.raises(UserError, match=r"found none \(the files are empty\)"):
        load_held_out(str(tmp_path), label="caption")


def test_a_set_too_large_for_memory_is_refused(labelled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_ROWS", ROWS)
    load_held_out(str(labelled))
    monkeypatch.setattr(module, "MAX_ROWS", ROWS - 1)
    with pytest.raises(UserError, match=r"expected at most 119 rows, .*, found 120; name fewer files") as caught:
        load_held_out(str(labelled))
    assert len(caught.value.lines) == 1
