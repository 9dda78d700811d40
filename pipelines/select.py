"""Select, scaled out: embeddings travel from shards to super-batches, one Ray task draws each sub-batch."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from curate.embeddings import embedding_name, read_embeddings, vectors
from curate.pool import Pool, Shard
from curate.recipe import SelectionSection
from curate.select import Candidates, Scale, Vectors, select_sub_batch
from curate.selected import SubBatchStats, read_selected, selected_name, write_selected
from curate.spec import EncoderSpec
from curate.storage import Store
from curate.walk import WalkRange, super_batch_of
from pipelines.cluster import Devices, device, exchange, fetch, groups
from pipelines.walk import candidate_rows


def select_round(
    store: Store,
    pool: Pool,
    *,
    selection: SelectionSection,
    reference: EncoderSpec,
    learner: EncoderSpec | None,
    learner_scope: str,
    walk_range: WalkRange,
    boundaries: Sequence[int],
    seed: int,
    round_number: int,
    steps: str,
    devices: Devices,
    dedup: str | None = None,
) -> list[SubBatchStats]:
    """Draw every sub-batch of a round that has not been drawn yet.

    Args:
        store: the root.
        pool: the inventory.
        selection: sizes, criterion and method.
        reference: its embedding files are complete.
        learner: likewise for the rows of this round; None if selection does not look at it.
        learner_scope: of the learner's files.
        walk_range: the round's place in the walk.
        boundaries: of the round's super-batches, one more than there are.
        seed: of the recipe.
        round_number: of the round.
        steps: folder of the round's steps.
        devices: what draws.
        dedup: folder of the deduplication whose dropped rows are no candidates.

    Returns:
        Statistics by sub-batch, those of sub-batches drawn before included.
    """
    names = [selected_name(steps, i) for i in range(walk_range.super_batches)]
    there = set(store.list(steps))
    todo = [i for i, name in enumerate(names) if name not in there]

    def split(shards: list[Shard]) -> list[Candidates]:
        loaded = Candidates.concatenate(
            [
                load_candidates(
                    store,
                    shard,
                    reference,
                    learner,
                    learner_scope,
                    boundaries,
                    seed=seed,
                    epoch=walk_range.epoch,
                    dedup=dedup,
                )
                for shard in shards
            ]
        )
        number = super_batch_of(loaded.rows["key"], boundaries)
        return [loaded.take(np.flatnonzero(number == i)) for i in todo]

    def join(sub_batch: int, parts: Sequence[Candidates]) -> None:
        table, stats = select_sub_batch(
            Candidates.concatenate(parts),
            selection,
            learner=Scale(logit_scale=learner.logit_scale, logit_bias=learner.logit_bias) if learner else None,
            reference=Scale(logit_scale=reference.logit_scale, logit_bias=reference.logit_bias),
            seed=seed,
            round_number=round_number,
            sub_batch=sub_batch,
            device=device(),
        )
        write_selected(store, names[sub_batch], table, stats)

    # A joining task holds the vectors of a super-batch three times in float16 (its parts, all of them, the distinct
    # ones) and, on a CPU, once in float32.
    width = 2 * (reference.embed_dim + (learner.embed_dim if learner else 0))
    vector_bytes = selection.super_batch_size * width * (3 * 2 + 4)
    sources = groups(pool.shards)
    fetch(exchange(sources, split, todo, join, title="select", devices=devices, join_memory=vector_bytes))
    return [read_selected(store, name)[1] for name in names]


def load_candidates(
    store: Store,
    shard: Shard,
    reference: EncoderSpec,
    learner: EncoderSpec | None,
    learner_scope: str,
    boundaries: Sequence[int],
    *,
    seed: int,
    epoch: int,
    dedup: str | None,
) -> Candidates:
    """The candidates of a shard that some super-batch of the round holds, with their vectors."""
    columns = ["status", "content", "zimg", "ztxt"]
    table = read_embeddings(store, embedding_name(reference.sha, shard), columns)
    rows = candidate_rows(store, shard, table, dedup, seed=seed, epoch=epoch)
    rows = rows[super_batch_of(rows["key"], boundaries) >= 0]
    wanted = pa.array(rows["row"])

    def towers(embedded: pa.Table, width: int) -> tuple[Vectors, Vectors]:
        return vectors(embedded["zimg"].take(wanted), width), vectors(embedded["ztxt"].take(wanted), width)

    own = None
    if learner is not None:
        name = embedding_name(learner.sha, shard, learner_scope)
        own = towers(read_embeddings(store, name, columns[2:]), learner.embed_dim)
    return Candidates(rows=rows, reference=towers(table, reference.embed_dim), learner=own)
