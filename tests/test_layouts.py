"""Embeddings that other tools left: the file that an embedding run would have written, or one clear line."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curate.embed.decode import WORKER_CRASH, Decoded, Row, decode_row
from curate.embed.files import vectors
from curate.embed.layouts import Layout
from curate.embed.run import embed_shard
from curate.embed.taking import take_shard
from curate.errors import UserError
from curate.jobs.travel import import_all
from curate.models.encoder import load_encoder
from curate.pool.inventory import take_inventory
from curate.recipe import EmbedSection, EncoderSection, Recipe
from curate.rounds.plan import store_reference
from curate.storage import Store
from tests.helpers import CPU, write_tiny
from tests.test_wanted import recipe, world

__all__ = ["world"]


@pytest.fixture(scope="module")
def embedded(world: Path, tmp_path_factory: pytest.TempPathFactory) -> list[pa.Table]:
    """The embedding files of the pool by the recipe's reference."""
    made = recipe(world, tmp_path_factory.mktemp("embedded") / "root")
    store = Store(made.root)
    spec = store_reference(store, made, base=world, device_type="cpu")
    encoder = load_encoder(store, spec, CPU)
    for shard in take_inventory(made.pool).shards:
        embed_shard(shard, {f"{shard.index}.parquet": encoder}, store, EmbedSection())
    return [pq.read_table(Path(made.root) / f"{number}.parquet") for number in range(2)]


def pairs_and_vectors(world: Path, embedded: list[pa.Table]) -> tuple[pa.Table, np.ndarray, np.ndarray]:
    """Keys and captions of the usable rows, in another order than the pool's, and their embeddings."""
    source = pa.concat_tables(pq.read_table(path) for path in sorted((world / "parquet").iterdir()))
    table = pa.concat_tables(embedded)
    ok = np.flatnonzero(np.array(table["status"].to_pylist()) == "ok")
    ok = np.random.default_rng(0).permutation(ok)
    return (
        source.select(["key", "caption"]).take(ok),
        vectors(table["zimg"], 16)[ok],
        vectors(table["ztxt"], 16)[ok],
    )


def clip_retrieval(folder: Path, pairs: pa.Table, zimg: np.ndarray, ztxt: np.ndarray) -> None:
    """As its `inference` leaves them, in two partitions; it has normalised them, which here is undone."""
    for name in ("metadata", "img_emb", "text_emb"):
        (folder / name).mkdir(parents=True)
    half = len(pairs) // 2
    for number, part in enumerate((slice(0, half), slice(half, None))):
        named = pairs[part].rename_columns(["image_path", "caption"])
        pq.write_table(named, folder / f"metadata/metadata_{number}.parquet")
        np.save(folder / f"img_emb/img_emb_{number}.npy", 2 * zimg[part])
        np.save(folder / f"text_emb/text_emb_{number}.npy", ztxt[part])


def datacomp(folder: Path, pairs: pa.Table, zimg: np.ndarray, ztxt: np.ndarray) -> None:
    """As its metadata has them, with another model's beside."""
    folder.mkdir()
    pq.write_table(pairs.rename_columns(["uid", "text"]), folder / "0a1b.parquet")
    other = np.ones((len(pairs), 24), np.float16)
    np.savez(folder / "0a1b.npz", b32_img=other, b32_txt=other, l14_img=zimg, l14_txt=ztxt, dedup=other[:, 0])


LAYOUTS = [clip_retrieval, datacomp]
Write = Callable[[Path, pa.Table, np.ndarray, np.ndarray], None]


def imported(made: Recipe, world: Path, folder: Path) -> list[str]:
    return list(import_all(made, world, str(folder)))


@pytest.mark.parametrize("form", ["parquet", "tar"])
@pytest.mark.parametrize("write", LAYOUTS)
def test_the_files_are_those_of_an_embedding_run(
    world: Path, embedded: list[pa.Table], tmp_path: Path, write: Write, form: str
) -> None:
    write(tmp_path / "theirs", *pairs_and_vectors(world, embedded))
    made = recipe(world, tmp_path / "root", form)
    assert imported(made, world, tmp_path / "theirs") == [f"{tmp_path}/root: embeddings of 2 shards of 2 are in place"]
    found = [pq.read_table(path) for path in sorted((tmp_path / "root/embeddings").rglob("*.parquet"))]
    for ours, theirs in zip(embedded, found, strict=True):
        plain = [name for name in ours.schema.names if not name.startswith("z")]
        if form == "parquet":  # of a tar a row that has no picture has another reason
            assert theirs.select(plain).equals(ours.select(plain))
        for name in ("zimg", "ztxt"):
            assert theirs[name].is_valid().equals(ours[name].is_valid())
            ok = np.asarray(ours[name].combine_chunks().is_valid())
            np.testing.assert_allclose(vectors(theirs[name], 16)[ok], vectors(ours[name], 16)[ok], atol=1e-3)


@pytest.mark.parametrize("write", LAYOUTS)
def test_another_models_are_refused_and_nothing_is_written(
    world: Path, embedded: list[pa.Table], tmp_path: Path, write: Write
) -> None:
    write(tmp_path / "theirs", *pairs_and_vectors(world, embedded))
    made = recipe(world, tmp_path / "root").model_copy(
        update={"reference": EncoderSection(model="reference.json"), "seed": 1}  # which draws other weights
    )
    with pytest.raises(UserError, match=r"theirs: expected embeddings by the recipe's reference, a cosine of 0.999"):
        imported(made, world, tmp_path / "theirs")
    assert not (tmp_path / "root/embeddings").exists()


def test_other_pairs_leave_their_shard_to_the_round(world: Path, embedded: list[pa.Table], tmp_path: Path) -> None:
    pairs, zimg, ztxt = pairs_and_vectors(world, embedded)
    first = set(pq.read_table(min((world / "parquet").iterdir()))["key"].to_pylist())
    at = next(place for place, key in enumerate(pairs["key"].to_pylist()) if key in first)
    captions = pairs["caption"].to_pylist()
    captions[at] = "another caption"
    datacomp(tmp_path / "theirs", pairs.set_column(1, "caption", pa.array(captions)), zimg, ztxt)
    assert imported(recipe(world, tmp_path / "root"), world, tmp_path / "theirs") == [
        f"{tmp_path}/root: embeddings of 1 shard of 2 are in place",
        "1 shard that could not be read, or not all of whose pairs were found: the next round embeds these",
    ]


@pytest.mark.parametrize("write", LAYOUTS)
def test_vectors_of_other_pairs_are_refused(
    world: Path, embedded: list[pa.Table], tmp_path: Path, write: Write
) -> None:
    """A shard of a few rows is looked at in more than one place."""
    pairs, zimg, ztxt = pairs_and_vectors(world, embedded)
    middle = {uid for table in embedded for uid in usable_uids(table)[len(usable_uids(table)) // 2 :][:1]}
    others = [row for row, key in enumerate(pairs["key"].to_pylist()) if key not in middle]
    zimg[others] = np.roll(zimg[others], 1, axis=0)
    write(tmp_path / "theirs", pairs, zimg, ztxt)
    with pytest.raises(UserError, match=r"a cosine of 0.999 at least to what it makes of rows \d+, \d+, \d+, \d+ of"):
        imported(recipe(world, tmp_path / "root"), world, tmp_path / "theirs")


def usable_uids(table: pa.Table) -> list[str]:
    return [row["uid"] for row in table.select(["uid", "status"]).to_pylist() if row["status"] == "ok"]


def test_vectors_that_are_none_are_what_they_would_be_of_ours(
    world: Path, embedded: list[pa.Table], tmp_path: Path
) -> None:
    pairs, zimg, ztxt = pairs_and_vectors(world, embedded)
    zimg[::3], ztxt[1::3] = 0, np.nan
    datacomp(tmp_path / "theirs", pairs, zimg, ztxt)
    imported(recipe(world, tmp_path / "root"), world, tmp_path / "theirs")
    files = sorted((tmp_path / "root/embeddings").rglob("*.parquet"))
    found = Counter(pa.concat_tables(pq.read_table(path, columns=["status"]) for path in files)["status"].to_pylist())
    assert (found["embedding_zero"], found["embedding_nonfinite"]) == (len(zimg[::3]), len(zimg[1::3]))


def test_nothing_is_written_once_nobody_waits_or_if_a_decoder_ended(
    world: Path, embedded: list[pa.Table], tmp_path: Path
) -> None:
    datacomp(tmp_path / "theirs", *pairs_and_vectors(world, embedded))
    made = recipe(world, tmp_path / "root")
    store = Store(made.root)
    pool = take_inventory(made.pool)
    encoder = load_encoder(store, store_reference(store, made, base=world, device_type="cpu"), CPU)
    layout = Layout(Store(str(tmp_path / "theirs")), tmp_path / "scratch", columns=pool.columns, embed_dim=16)

    def decode(rows: Sequence[Row]) -> list[Decoded]:
        return [decode_row(row, {}) for row in rows]

    def decode_and_end(rows: Sequence[Row]) -> list[Decoded]:
        return [*decode(rows[:-1]), Decoded(status=WORKER_CRASH, error="a decoder ended with exit status 1")]

    assert not take_shard(layout, pool.shards[0], encoder, store, decode, lambda: True)
    assert not take_shard(layout, pool.shards[0], encoder, store, decode_and_end)
    assert not store.list("embeddings")
    assert take_shard(layout, pool.shards[0], encoder, store, decode)


def test_what_is_no_layout_is_told(world: Path, embedded: list[pa.Table], tmp_path: Path) -> None:
    pairs, zimg, ztxt = pairs_and_vectors(world, embedded)
    made = recipe(world, tmp_path / "root")

    def refused(
        write: Write, pattern: str, change: Callable[[Path], object] = lambda _: None, made: Recipe = made
    ) -> None:
        folder = tmp_path / f"theirs-{len(list(tmp_path.iterdir()))}"
        write(folder, pairs, zimg, ztxt)
        change(folder)
        with pytest.raises(UserError, match=pattern):
            imported(made, world, folder)

    refused(
        clip_retrieval,
        r"text_emb_1\.npy: expected the embeddings of .*, found no file; let clip-retrieval run with both",
        lambda folder: (folder / "text_emb/text_emb_1.npy").unlink(),
    )
    refused(
        clip_retrieval,
        r"metadata_0\.parquet: expected embeddings \[\d+, 16\], one for each .* found \[3, 16\]",
        lambda folder: np.save(folder / "img_emb/img_emb_0.npy", zimg[:3]),
    )
    refused(
        clip_retrieval,
        r"expected a column of uids \(key or uid or image_path\) .*, found image_id, embedding",
        lambda folder: pq.write_table(
            pa.table({"image_id": ["a"], "embedding": [[1.0]]}), folder / "metadata/metadata_0.parquet"
        ),
    )
    refused(
        datacomp,
        r"0a1b\.npz: expected 0a1b\.parquet beside it, found no file",
        lambda folder: (folder / "0a1b.parquet").unlink(),
    )
    refused(
        datacomp,
        r"expected embeddings\.json .* clip-retrieval or DataComp's \*\.npz; found none",
        lambda folder: (folder / "0a1b.npz").unlink(),
    )
    for data in (b"\x93NUMPY\x01\x00", b"", b"garbage" * 99):
        refused(
            clip_retrieval,
            r"img_emb_0\.npy, text_emb/text_emb_0\.npy: expected NumPy's arrays, found damage \(.*\); fetch it again",
            lambda folder, data=data: (folder / "img_emb/img_emb_0.npy").write_bytes(data),  # type: ignore[misc]
        )
    refused(
        clip_retrieval,
        r"found \[\d+, 16\] of <U3; name the",
        lambda folder: np.save(folder / "text_emb/text_emb_1.npy", np.full((len(pairs) - len(pairs) // 2, 16), "1.0")),
    )
    refused(
        datacomp,
        r"0a1b\.npz: expected NumPy's arrays, found damage",
        lambda folder: (folder / "0a1b.npz").write_bytes((folder / "0a1b.npz").read_bytes()[:-30]),
    )
    refused(
        datacomp,
        r"0a1b\.parquet: expected a Parquet file, found damage \(.*\); fetch it again",
        lambda folder: (folder / "0a1b.parquet").write_bytes(b"PAR1"),
    )
    refused(
        datacomp,
        r"0a1b\.parquet: expected texts in column text, found list<.*>; write it as such",
        lambda folder: pq.write_table(pa.table({"uid": ["a"], "text": [["b"]]}), folder / "0a1b.parquet"),
    )
    write_tiny(tmp_path, "wide.json", embed_dim=40)
    wide = made.model_copy(update={"reference": EncoderSection(model=str(tmp_path / "wide.json"))})
    refused(
        datacomp,
        r"expected arrays \*_img and \*_txt of width 40, .* found b32_img\.npy of 24, .*l14_txt\.npy of 16",
        made=wide,
    )
    refused(datacomp, r"expected a pool whose rows have uids", made=recipe(world, tmp_path / "root", uid=None))


def test_from_an_object_store(world: Path, embedded: list[pa.Table], tmp_path: Path, s3_root: str) -> None:
    datacomp(tmp_path / "theirs", *pairs_and_vectors(world, embedded))
    clip_retrieval(tmp_path / "others", *pairs_and_vectors(world, embedded))
    for name in ("theirs", "others"):
        target = Store(f"{s3_root}/{name}")
        for path in sorted((tmp_path / name).rglob("*.*")):
            target.put_bytes(str(path.relative_to(tmp_path / name)), path.read_bytes())
        made = recipe(world, tmp_path / f"root-{name}")
        assert (
            imported(made, world, Path(f"{s3_root}/{name}"))
            if False
            else list(import_all(made, world, target.url))
            == [f"{tmp_path}/root-{name}: embeddings of 2 shards of 2 are in place"]
        )
