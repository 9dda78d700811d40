"""`curate check` is a promise: what it passes, round and train run; what they would refuse, it refuses first."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from PIL import Image

from curate.errors import UserError
from curate.jobs.check import check_recipe
from curate.jobs.drawn_pool import draw_pair
from curate.jobs.train import train
from curate.models.create import create_model
from curate.models.encoder import store_encoder
from curate.models.learners import record_learner
from curate.recipe import EncoderSection, Recipe
from curate.recipe_file import load_recipe
from curate.rounds.plan import pin_plan
from curate.rounds.stream import end_stream
from curate.storage import Store
from tests.helpers import damage_page, tiny_config, write_tiny

PAIRS = [draw_pair(0, row, image_size=32) for row in range(80)]
COCA = {
    "multimodal_cfg": {"context_length": 24, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    "custom_text": True,
    "text_cfg": tiny_config()["text_cfg"] | {"embed_cls": True, "output_tokens": True},
    "vision_cfg": tiny_config()["vision_cfg"]
    | {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
}


def table(**changes: Any) -> pa.Table:
    return pa.table({"jpg": [jpg for jpg, _ in PAIRS], "caption": [caption for _, caption in PAIRS]} | changes)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A recipe that can be run, and what it names."""
    (tmp_path / "pool").mkdir()
    pq.write_table(table(), tmp_path / "pool/0.parquet")
    write_tiny(tmp_path)
    (tmp_path / "recipe.toml").write_text(
        f"""
        root = "{tmp_path}/root"
        pool.path = "{tmp_path}/pool"
        reference.model = "tiny.json"
        learner.model = "tiny.json"
        selection = {{sub_batch_size = 8, n_chunks = 4, filter_ratio = 0.5}}
        train.steps = 1
        """
    )
    return tmp_path


def recipe_of(folder: Path, *sets: str) -> Recipe:
    return load_recipe(folder / "recipe.toml", sets)


def said(folder: Path, *sets: str) -> list[str]:
    return list(check_recipe(recipe_of(folder, *sets), base=folder, measure=False))


def refused(folder: Path, *sets: str) -> str:
    """The one line that the check answers with; nothing is left behind."""
    before = sorted(path for path in folder.rglob("*"))
    with pytest.raises(UserError) as caught:
        said(folder, *sets)
    assert sorted(path for path in folder.rglob("*")) == before
    (line,) = caught.value.lines
    assert "\n" not in line
    return line


def test_what_is_sound_passes_and_leaves_nothing(folder: Path) -> None:
    before = sorted(folder.rglob("*"))
    assert "pool: 64 of 64 sampled rows can be used" in said(folder)
    assert said(folder, f"root={folder}/a/b/c")
    assert sorted(folder.rglob("*")) == before


# --- the learner -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        (["learner.model=ViT-B-16-SigLP"], ["learner.model = 'ViT-B-16-SigLP': not an open_clip model"]),
        (["learner.model=none.json"], ["learner.model: expected an open_clip JSON config", "none.json"]),
        (["learner.pretrained=/no/such.safetensors"], ["learner.pretrained = '/no/such.safetensors': neither a file"]),
    ],
)
def test_a_learner_that_only_the_trainer_looks_at(folder: Path, sets: list[str], words: list[str]) -> None:
    line = refused(folder, *sets)
    for word in words:
        assert word in line


def test_a_learner_that_is_not_finite(folder: Path) -> None:
    model, _, _ = create_model(EncoderSection(model="tiny.json"), role="learner", base=folder, seed=0)
    weights = model.state_dict()
    weights["visual.proj"][0, 0] = torch.nan
    safetensors.torch.save_file(weights, folder / "w.safetensors")
    for role in ("learner", "reference"):
        assert "visual.proj are not all finite" in refused(folder, f"{role}.pretrained={folder}/w.safetensors")


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"init_logit_bias": None}, "the sigmoid loss has a bias and this model none"),
        (COCA, "found CoCa, whose forward pass returns other things; it can be a reference"),
    ],
    ids=["no bias", "CoCa"],
)
def test_a_model_that_cannot_be_the_learner_can_be_the_reference(folder: Path, changes: Any, word: str) -> None:
    section = write_tiny(folder, "other.json", **changes)
    model, _, _ = create_model(section, role="learner", base=folder, seed=0)
    weights = {
        name: torch.full_like(tensor, 0.5) for name, tensor in model.state_dict().items()
    }  # CoCa leaves some out
    safetensors.torch.save_file(weights, folder / "w.safetensors")
    assert said(folder, "reference.model=other.json", f"reference.pretrained={folder}/w.safetensors")
    line = refused(folder, "learner.model=other.json")
    assert word in line
    for data in ("pool", "rounds"):
        with pytest.raises(UserError) as caught:  # the trainer says the same, before it leaves anything
            train(recipe_of(folder, "learner.model=other.json", f"train.data={data}"), base=folder)
        assert caught.value.lines == (line,)
    assert not (folder / "root").exists()


def test_a_learner_without_bias_under_softmax(folder: Path) -> None:
    write_tiny(folder, "other.json", init_logit_bias=None)
    assert said(folder, "learner.model=other.json", "selection.loss=softmax")


def test_a_learner_that_the_root_holds_goes_before_the_recipes(folder: Path) -> None:
    store = Store(str(folder / "root"))
    encoder = store_encoder(store, EncoderSection(model="tiny.json"), role="learner", base=folder, seed=0)
    record_learner(store, encoder, step=0, next_batch=0)
    write_tiny(folder, "wide.json", embed_dim=24)
    assert said(folder)
    line = refused(folder, "learner.model=wide.json")
    assert "learners/l000000/learner.json holds another untrained model" in line
    record_learner(store, encoder, step=3, next_batch=3)
    assert said(folder, "learner.model=none.json")
    assert "none.json" in refused(folder, "learner.model=none.json", "train.data=pool")


def test_a_root_that_was_trained_otherwise(folder: Path) -> None:
    train(recipe_of(folder, "train.data=pool", f"train.logs={folder}/logs"), base=folder)
    assert said(folder, "train.data=pool", "learner.model=none.json")
    assert "was trained with 'pool'" in refused(folder)


# --- the pool ----------------------------------------------------------------------------------------------------


def picture(**how: Any) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(out, **how)
    return out.getvalue()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"jpg": pa.nulls(80)}, ["columns 'jpg' and 'caption'", "0 of 64 sampled rows can be used (image_empty 64)"]),
        ({"jpg": pa.nulls(80, pa.binary())}, ["image_empty 64"]),
        ({"caption": pa.nulls(80)}, ["0 of 64 sampled rows can be used (caption_missing 64)"]),
        ({"caption": [" "] * 80}, ["caption_empty 64"]),
        ({"jpg": [picture(format="BMP")] * 80}, ["image_undecodable 64"]),
        ({"jpg": [None] * 40 + [jpg for jpg, _ in PAIRS[40:]]}, ["24 of 64", "40 of the pool's 80", "raise it"]),
    ],
)
def test_a_pool_without_usable_pairs(folder: Path, changes: dict[str, Any], words: list[str]) -> None:
    pq.write_table(table(**changes), folder / "pool/0.parquet")
    line = refused(folder)
    for word in ("pool: ", *words):
        assert word in line


def test_what_is_wanted_of_a_pool_is_counted(folder: Path) -> None:
    """Where a sample of its first rows would say something else."""
    pq.write_table(table(n=list(range(80))), folder / "pool/0.parquet")
    assert refused(folder, "pool.where=n > 99").startswith(
        "pool: none of its 80 rows is wanted by pool.where = 'n > 99'"
    )
    assert refused(folder, "pool.where=n > 64").startswith(
        "selection: a round wants 16 candidates (1 super-batches of 16), the pool holds 80 rows, of which 15 are wanted"
    )
    lines = said(folder, "pool.where=n < 48")
    assert any(line.startswith("selection: 3 super-batches of 16 at most") for line in lines)
    assert any(line.startswith("cost: 48 forward passes of the reference at most") for line in lines)


def test_uids_that_tell_nothing_apart(folder: Path) -> None:
    pq.write_table(table(key=[f"k{row}" for row in range(78)] + ["k3", "k4"]), folder / "pool/0.parquet")
    assert refused(folder, "pool.uid=key") == (
        f"pool.uid = 'key': 2 rows repeat a uid, such as row 78 of {folder}/pool/0.parquet that of row 3 of "
        f"{folder}/pool/0.parquet; name a column that tells pairs apart, or none"
    )
    pq.write_table(table(key=[None, *(f"k{row}" for row in range(78)), None]), folder / "pool/0.parquet")
    assert refused(folder, "pool.uid=key") == (
        f"pool.uid = 'key': 2 rows have none, the first row 0 of {folder}/pool/0.parquet; name a column that every row "
        "has a value in, or none"
    )
    pq.write_table(table(key=[None, *range(1, 80)]), folder / "pool/0.parquet")
    assert said(folder, "pool.uid=key")


def test_some_rows_that_cannot_be_used_are_counted(folder: Path) -> None:
    pq.write_table(table(jpg=[None, *(jpg for jpg, _ in PAIRS[1:])]), folder / "pool/0.parquet")
    assert "pool: 63 of 64 sampled rows can be used (image_empty 1)" in said(folder)


def test_rows_that_img2dataset_could_not_download_are_counted(folder: Path) -> None:
    status = ["failed_to_download", *["success"] * 79]
    rows = table(jpg=[None, *(jpg for jpg, _ in PAIRS[1:])], status=status, error_message=["404", *[None] * 79])
    pq.write_table(rows, folder / "pool/0.parquet")
    assert "pool: 63 of 64 sampled rows can be used (download_failed 1)" in said(folder)


def test_columns_in_the_names_of_folders_are_said(folder: Path) -> None:
    (folder / "pool/lang=en").mkdir()
    (folder / "pool/0.parquet").rename(folder / "pool/lang=en/0.parquet")
    assert "pool: the names of folders give lang, as text, to files without such a column" in said(folder)


def test_a_sample_is_spread_over_the_shards(folder: Path) -> None:
    pq.write_table(table(jpg=pa.nulls(80, pa.binary())), folder / "pool/0.parquet")
    pq.write_table(table().slice(0, 0), folder / "pool/1.parquet")
    for number in range(2, 12):
        pq.write_table(table(), folder / f"pool/{number}.parquet")
    assert "pool: 192 of 256 sampled rows can be used (image_empty 64)" in said(folder)


def test_a_damaged_page_that_the_sample_meets(folder: Path) -> None:
    path = folder / "pool/0.parquet"
    pq.write_table(table(), path, compression="zstd")
    damage_page(path, "jpg")
    assert "0.parquet: " in refused(folder)
    pq.write_table(table(), folder / "pool/1.parquet")
    pq.write_table(table(), folder / "pool/2.parquet")
    damage_page(folder / "pool/2.parquet", "caption")
    with pytest.raises(UserError) as caught:
        said(folder)
    assert [line.partition(":")[0] for line in caught.value.lines] == [
        str(folder / f"pool/{i}.parquet") for i in (0, 2)
    ]


def test_damaged_pages_where_bad_shards_are_skipped(folder: Path) -> None:
    pq.write_table(table(), folder / "pool/1.parquet")
    damage_page(folder / "pool/0.parquet", "jpg")
    skip = "pool.on_bad_shard=skip"
    assert "64 of 128 sampled rows can be used (damaged_shard 64)" in refused(folder, skip)
    assert "pool: 64 of 128 sampled rows can be used (damaged_shard 64)" in said(
        folder, skip, "pool.max_dropped_share=0.5"
    )


# --- held-out sets -----------------------------------------------------------------------------------------------


def held_out(folder: Path, rows: pa.Table, name: str = "held-out.parquet") -> str:
    pq.write_table(rows, folder / name)
    return f"evaluate.path={folder}/{name}"


@pytest.mark.parametrize("rows", [80, 2400])
def test_the_trainers_held_out_set(folder: Path, rows: int) -> None:
    many = pa.concat_tables([table(label=["a", "b"] * 40)] * (rows // 80)).combine_chunks()
    path = held_out(folder, many)
    assert said(folder, path, "evaluate.label=label")
    assert "evaluate.label" in refused(folder, path, "evaluate.label=none")
    assert "expected a file" in refused(folder, "evaluate.path=nowhere.parquet")
    line = refused(folder, held_out(folder, many.drop_columns("caption"), "bare.parquet"))
    assert "evaluate.caption" in line
    empty = many.set_column(0, "jpg", pa.nulls(rows, pa.binary()))
    assert "evaluate.path = " in refused(folder, held_out(folder, empty, "empty.parquet"))


def test_a_damaged_held_out_set_is_told_with_the_other_mistakes(folder: Path) -> None:
    path = held_out(folder, table())
    damage_page(folder / "held-out.parquet", "jpg")
    with pytest.raises(UserError) as caught:
        said(folder, path, "learner.model=none.json")
    first, second = caught.value.lines
    assert "held-out.parquet: expected 80 readable rows, found a damaged page in column 'jpg'" in first
    assert "none.json" in second


# --- the root ----------------------------------------------------------------------------------------------------


def test_a_round_that_was_begun_with_another_recipe(folder: Path) -> None:
    pin_plan(Store(str(folder / "root")), recipe_of(folder), base=folder, number=0)
    assert said(folder)
    line = refused(folder, "seed=1")
    assert "rounds/r000000/plan.json: this round was begun with another recipe (seed: 0 → 1)" in line


def test_a_stream_that_was_ended(folder: Path) -> None:
    end_stream(Store(str(folder / "root")))
    assert "the stream of rounds was ended after round -1; delete rounds/end.json to go on" in refused(folder)


# --- a recipe of the trainer alone -------------------------------------------------------------------------------


def without_reference(folder: Path) -> None:
    text = (folder / "recipe.toml").read_text()
    (folder / "recipe.toml").write_text(text.replace('reference.model = "tiny.json"', ""))


def test_a_recipe_of_the_trainer_alone(folder: Path) -> None:
    without_reference(folder)
    assert "reference: must be given for a round" in refused(folder)
    lines = said(folder, "train.data=pool")
    assert lines[-4].startswith("next round: none without [reference], for curate train alone")
    assert lines[-3] == "learner: tiny.json, fp32 on cpu"
    assert lines[-2].startswith("train: one rank holds about 0.0")
    assert "activations of 8 pairs 0.00 GB" in lines[-2]
    line = said(folder, "train.data=pool", "train.fully_shard=true")[-2]
    assert "moments 0.00 GB as one of 8 and 0.01 GB gathered, activations of 1 pair 0.00 GB" in line
    assert lines[-1] == "train: 1 uniform batches of 8"
    assert said(folder, "train.data=pool", "selection.filter_ratio=0.99")
    line = refused(folder, "train.data=pool", "selection.sub_batch_size=100")
    assert "a batch wants 100 pairs, the pool holds 80 rows" in line
    trained = train(recipe_of(folder, "train.data=pool", f"train.logs={folder}/logs"), base=folder)
    assert trained.finished
