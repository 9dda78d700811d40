"""What `curate check` says that a round costs: rows that are missing, bytes that are written, and what is short."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import curate.jobs.cost
from curate.embed.files import embedding_name
from curate.errors import UserError
from curate.jobs.check import check_recipe
from curate.jobs.cost import Hands, Stage, Supply, described, hands_of, stages_of, supply_of
from curate.jobs.drawn_pool import draw_pool
from curate.jobs.rates import FileBytes, Rates, measure
from curate.jobs.work import LEARNER, REFERENCE, Pass, Work, encoders_of, work_of
from curate.models.encoder import Encoder
from curate.models.spec import EncoderSpec
from curate.pipelines.round import run_round
from curate.pool.inventory import take_inventory
from curate.pool.shards import Pool
from curate.recipe import EmbedSection, Recipe, ResourcesSection, SelectionSection
from curate.rounds.manifest import manifest_name
from curate.rounds.plan import evaluation_sets
from curate.storage import Store
from tests.helpers import write_pool, write_tiny
from tests.stand_in import without_ray

__all__ = ["without_ray"]

ROWS, SHARDS = 640, 40
BOTH = (REFERENCE, LEARNER)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, a drawn pool of sound pairs, each once, and a set that is kept out of it."""
    folder = tmp_path_factory.mktemp("world")
    write_tiny(folder, "reference.json")
    write_tiny(folder, "learner.json", embed_dim=24)
    draw_pool(folder / "pool", rows=ROWS, shards=SHARDS, seed=0, image_size=32)
    draw_pool(folder / "held-out", rows=30, shards=2, seed=1, image_size=32)
    return folder


def recipe_of(world: Path, root: Path, **changes: Any) -> Recipe:
    """Rounds of 32 candidates, in windows of 16 shards or more."""
    selection = {
        "sub_batch_size": 8,
        "n_chunks": 4,
        "filter_ratio": 0.75,
        "criterion": "learnability",
        "super_batches": 1,
    }
    return Recipe.model_validate(
        {
            "root": str(root),
            "pool": {"path": str(world / "pool"), "uid": "key"},
            "reference": {"model": "reference.json"},
            "learner": {"model": "learner.json"},
            "selection": selection | changes.pop("selection", {}),
        }
        | changes
    )


KINDS: dict[str, dict[str, Any]] = {
    "a window": {},
    "one pass": {"selection": {"super_batches": 12}},
    "near-duplicates": {"dedup": {"threshold": 0.9999, "max_dropped_share": 1}},
    "no learner": {"selection": {"criterion": "easy_reference"}},
    "auto": {"selection": {"criterion": "auto"}},
}


def found(recipe: Recipe, world: Path, scratch: Path, number: int) -> tuple[Work, Pool, dict[str, EncoderSpec]]:
    store, copies = Store(recipe.root), Store(str(scratch))
    pool = take_inventory(recipe.pool)
    encoders = encoders_of(store, copies, recipe, base=world, number=number, device_type="cpu")
    return work_of(store, copies, recipe, pool, evaluation_sets(recipe), encoders, usable=1.0), pool, encoders


def embedded(root: Path, spec: EncoderSpec) -> int:
    """Rows in the embedding files of a model, in whatever folders."""
    return sum(pq.read_metadata(path).num_rows for path in (root / "embeddings" / spec.sha).rglob("*.parquet"))


def bytes_below(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.exhaustive] if kind == "one pass" else []) for kind in KINDS]
)
def test_what_is_said_is_what_a_round_does(world: Path, tmp_path: Path, without_ray: None, kind: str) -> None:
    recipe = recipe_of(world, tmp_path / "root", **KINDS[kind])
    before, _, encoders = found(recipe, world, tmp_path / "a", 0)
    with pytest.MonkeyPatch.context() as patch:
        kept: list[Stage] = []
        patch.setattr(curate.jobs.cost, "stages_of", lambda *args, **how: kept.extend(stages_of(*args, **how)) or kept)
        assert list(check_recipe(recipe, base=world))[-1].startswith("short: ")
    assert not (tmp_path / "root").exists()

    run_round(recipe, base=world)
    assert {role: embedded(tmp_path / "root", spec) for role, spec in encoders.items()} == {
        role: before.missing(role) for role in encoders
    }
    models, pools = (bytes_below(tmp_path / "root" / name) for name in ("models", "pools"))
    assert before.new_bytes == models + pools
    assert (before.index_entries, before.chosen) == (2 * ROWS, (recipe.selection.super_batches or 0) * 8)
    if recipe.dedup is None:  # how many near-duplicates will be found, and written down, nobody knows before
        written = bytes_below(tmp_path / "root") - models  # which are nearly all
        assert sum(stage.written_bytes for stage in kept) - models == pytest.approx(written, rel=0.2)

    after, _, _ = found(recipe, world, tmp_path / "b", 1)
    assert (after.missing(REFERENCE), after.dedup_rows, after.index_entries, after.new_bytes) == (0, 0, 0, 0)
    run_round(recipe, base=world)  # by the learner of the first
    for role, spec in encoders.items():
        assert embedded(tmp_path / "root", spec) == before.missing(role) + after.missing(role)


def test_evaluation_sets_are_embedded_and_compared(world: Path, tmp_path: Path, without_ray: None) -> None:
    section = {"threshold": 0.9999, "max_dropped_share": 1, "evaluation": [{"path": str(world / "held-out")}]}
    recipe = recipe_of(world, tmp_path / "root", dedup=section)
    work, _, encoders = found(recipe, world, tmp_path / "a", 0)
    assert (work.missing(REFERENCE), work.dedup_rows) == (ROWS + 30, ROWS + 30)
    run_round(recipe, base=world)
    assert embedded(tmp_path / "root", encoders[REFERENCE]) == ROWS + 30
    assert work.new_bytes == bytes_below(tmp_path / "root/models") + bytes_below(tmp_path / "root/pools")


def test_of_a_round_that_was_begun_what_is_there_is_not_counted(world: Path, tmp_path: Path, without_ray: None) -> None:
    recipe = recipe_of(world, tmp_path / "root")
    run_round(recipe, base=world)
    store = Store(recipe.root)
    store.delete(manifest_name(0))
    complete, pool, encoders = found(recipe, world, tmp_path / "a", 0)
    assert complete.passes == ()
    window = next(
        path for path in (tmp_path / "root/embeddings" / encoders[LEARNER].sha).iterdir() if "window" in path.name
    )
    lost = sorted(window.iterdir())[:3]
    rows = sum(pq.read_metadata(path).num_rows for path in lost)
    for path in lost:
        path.unlink()
    store.delete(embedding_name(encoders[REFERENCE].sha, pool.shards[5]))
    work, _, _ = found(recipe, world, tmp_path / "b", 0)
    assert work.missing(REFERENCE) == pool.shards[5].rows
    assert abs(work.missing(LEARNER) - rows) <= 5  # a window's share of each shard is an expectation
    assert [one.files for one in work.passes] == [1, 3]


def test_rows_of_which_none_can_be_used(encoder: Encoder, tmp_path: Path, store: Store) -> None:
    rows = pa.table({"jpg": [b"", b"no picture"], "caption": ["a", "b"]})
    with pytest.raises(UserError, match="none of 8 rows, drawn at random, can be used"):
        measure(
            write_pool(tmp_path / "pool", rows),
            {REFERENCE: encoder},
            [(REFERENCE,)],
            {REFERENCE: 16},
            EmbedSection(),
            SelectionSection(sub_batch_size=8, n_chunks=4),
            store,
            device=encoder.device,
            seed=0,
            dedup=False,
        )


# --- from what was measured to what is said ----------------------------------------------------------------------

RATES = Rates(
    rows=256,
    device_type="cpu",
    read_s=1e-4,
    row_bytes=1e4,
    decode_s={BOTH: 2e-3, (REFERENCE,): 1e-3},
    forward_s={REFERENCE: 1e-4, LEARNER: 3e-4},
    write_s={REFERENCE: 0, LEARNER: 0},
    files={role: FileBytes(row=100, group=1000, chunk_rows=1024) for role in BOTH},
    curated_s=1e-4,
    curated_bytes=1e4,
    draw_s=2,
    product_s=0,
)
GPUS = Hands(workers=2, gpus=2, threads=1, loaders=4, cores=12, here=True)
CPUS = Hands(workers=3, gpus=0, threads=2, loaders=0, cores=6, here=True)
WORK = Work(
    passes=(Pass(roles=BOTH, rows=7200, files=8, read_bytes=72_000_000),),
    asked={REFERENCE: 7200, LEARNER: 7200},
    starts=1,
    dedup_rows=0,
    index_entries=0,
    window_rows=0,
    super_batches=3,
    candidates=3000,
    chosen=300,
    chosen_read_bytes=72_000_000,
    new_bytes=5,
)


def test_stages_are_what_there_is_to_do_times_what_it_takes() -> None:
    start, embed, select, write = stages_of(WORK, RATES, GPUS, imports_s=10)
    assert (start.seconds, start.written_bytes) == (pytest.approx(10 * (2.4 + 1.15)), 5)
    # Two workers of four loaders each decode 4,000 pairs a second; the devices could embed 5,000.
    assert (embed.seconds, embed.units) == (pytest.approx(7200 / 4000), 2)
    assert embed.written_bytes == 2 * (7200 * 100 + 8 * 1000)
    assert select.seconds == pytest.approx(2 * 2)  # three draws on two cards
    assert write.seconds == pytest.approx(7200 * 1e-4 + 300 * 1e-4)
    assert write.written_bytes == 300 * 1e4


def test_on_cpus_decoders_and_models_share_the_cores() -> None:
    one = WORK.passes[0]
    supply = supply_of(one, RATES, CPUS)
    assert supply == Supply(
        reading=pytest.approx(2e4), decoding=1000, device=2500, cores=pytest.approx(2 / 2.8e-3), decoders=2
    )
    assert supply.rate == supply.cores
    assert supply_of(one, RATES, replace(CPUS, cores=60)).rate == 1000


@pytest.mark.parametrize(
    ("supply", "words"),
    [
        (
            Supply(reading=1e6, decoding=1000, device=2500, cores=None, decoders=4),
            "decoding, 1,000 pairs/s by 4 loaders; the device embeds 2,500, which 6 more loaders each would feed",
        ),
        (
            Supply(reading=1e6, decoding=1000, device=1100, cores=9e9, decoders=10),
            "decoding, 1,000 pairs/s by 10 threads; the device embeds 1,100, which 1 more thread each would feed",
        ),
        (
            Supply(reading=1e6, decoding=5000, device=2500, cores=None, decoders=1),
            "the device, 2,500 pairs/s; 1 loader could decode 5,000",
        ),
        (
            Supply(reading=900, decoding=5000, device=2500, cores=None, decoders=2),
            "the pool's store, 900 pairs/s to 2 loaders; the device embeds 2,500",
        ),
        (
            Supply(reading=900, decoding=700, device=600, cores=500, decoders=2),
            "cores, 500 pairs/s; decoding alone does 700, and the device embeds 600 if it has them to itself",
        ),
    ],
)
def test_what_is_short(supply: Supply, words: str) -> None:
    assert supply.short() == words


def test_a_table_of_80_columns_and_a_price() -> None:
    lines = list(described(WORK, RATES, GPUS, ResourcesSection(price_per_hour=36.0), imports_s=10))
    assert lines[0] == "measured: 256 rows on this machine's cpu, for 2 workers"
    assert max(map(len, lines[1:-3])) <= 80
    assert lines[-3] == "missing: embeddings by the reference 7,200 of 7,200, by the learner 7,200 of 7,200"
    whole = sum(stage.seconds for stage in stages_of(WORK, RATES, GPUS, imports_s=10))
    assert lines[-2] == f"price: {whole / 3600 * 2 * 36:.2f}, at 36 for a worker and hour, the start included"
    assert not [line for line in described(WORK, RATES, GPUS, ResourcesSection(), imports_s=1) if "price" in line]
    some = replace(WORK, passes=())
    assert "short" not in list(described(some, RATES, GPUS, ResourcesSection(), imports_s=1))[-1]


def test_hands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(curate.jobs.cost.loky, "cpu_count", lambda: 18)
    assert hands_of(ResourcesSection(device="cpu")) == Hands(
        workers=16, gpus=0, threads=1, loaders=0, cores=18, here=True
    )
    assert hands_of(ResourcesSection(device="cpu", threads=2, address="auto")) == Hands(
        workers=1, gpus=0, threads=2, loaders=0, cores=2, here=False
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert hands_of(ResourcesSection()) == Hands(workers=2, gpus=2, threads=1, loaders=7, cores=18, here=True)
    assert hands_of(ResourcesSection(workers=1)).gpus == 1


def test_what_cannot_be_measured_is_a_line(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of(world, tmp_path / "root")

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(curate.jobs.cost, "measure", fail)
    assert list(check_recipe(recipe, base=world))[-1] == "measured: nothing: CUDA out of memory. Tried to allocate"
    if not torch.cuda.is_available():
        lines = list(check_recipe(recipe_of(world, tmp_path / "root", resources={"device": "cuda"}), base=world))
        assert lines[-1].endswith("resources.device = 'cuda', and this machine has no GPU; run check on one that has")
    assert not (tmp_path / "root").exists()
