"""Look: what of a round people want to see, from a part of the root that grows neither with the pool nor the round.

Some shards are read, and in them the candidates of some super-batches: what was chosen, what was not, what another
method would have chosen, what could not be used and what was a duplicate.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor
from torch.nn.functional import softplus

from curate.criteria import Loss
from curate.dedup.files import compared_shards, read_dropped
from curate.embed.files import embedding_name, read_embeddings
from curate.jest import Embeddings, diagonal_losses, jointly_sample_batch
from curate.models.spec import EncoderSpec
from curate.pool.shards import Shard
from curate.rounds.committed import Committed
from curate.seeds import derive_seed
from curate.select.draw import Candidates, Scale, embeddings_of
from curate.select.files import selected_rows
from curate.select.index import DUPLICATE_EXACT, candidate_rows, read_duplicates
from curate.select.load import load_vectors
from curate.select.windows import Rows, key_order, super_batch_of

MOST_ROWS = 200_000
"""Of the shards that are read, about."""
MOST_CANDIDATES = 40_000
"""Whose vectors are held: 330 MB where two models have 512 numbers each, twice that while they are widened."""
MOST_SUB_BATCHES = 64
PER_REASON = 24
"""Unusable rows that are kept of each reason."""
MATRIX_ROWS = 48
"""Pairs of a matrix of losses: a square of a few pixels for each of two pairs."""

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Unusable:
    """A row that no round can use."""

    shard: int
    row: int
    uid: str
    reason: str
    error: str | None


@dataclass(frozen=True, kw_only=True)
class Repeat:
    """A row that left because it repeats another one."""

    shard: int
    row: int
    reason: str
    near: tuple[int, int]
    """Shard and row of what it is near to; shards of evaluation sets are numbered after the pool's."""
    similarity: float
    """Cosine; 1 of an exact duplicate."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Rows that one of them represents."""

    shard: int
    row: int
    """Of the representative."""
    repeats: tuple[Repeat, ...]
    """Those in the shards that were read, the most similar first."""


@dataclass(frozen=True, kw_only=True)
class Matrices:
    """Pair losses [n, n] of some rows: [i, j] is what picture i and caption j add to the loss."""

    rows: Ints
    """Positions [n] in the table of candidates."""
    reference: Floats
    learner: Floats | None


@dataclass(frozen=True, kw_only=True)
class Look:
    """What was looked at."""

    round: Committed
    shards: tuple[Shard, ...]
    """Of the pool, then of the evaluation sets."""
    read: tuple[int, ...]
    """Indices of the shards that were read."""
    rows: int
    """Of these shards."""
    sub_batches: int
    """Whose candidates in these shards were looked at."""
    candidates: pa.Table
    """One row each: sub_batch, shard, row, uid, width, height; reference_loss and learner_loss (null if unknown);
    chosen, and position, chunk and score if so (else null); independent: whether the other method would have taken it
    (null if that was not asked)."""
    unusable: tuple[Unusable, ...]
    groups: tuple[Group, ...]
    """Of duplicates, the largest first."""
    before: Matrices | None
    """Of candidates at random, of one super-batch."""
    after: Matrices | None
    """Of rows of its sub-batch, in the order drawn."""


def look_at(
    found: Committed,
    *,
    progress: Callable[[Iterable[Any], int], Iterable[Any]] = lambda shards, total: shards,
) -> Look:
    """Look at a round whose rows were not removed.

    Args:
        found: the round.
        progress: as `take_inventory` takes it; counts shards.

    Raises:
        UserError: something that the round left is gone.
        DamagedError: or is not what was written.
    """
    number = found.manifest.round
    rng = np.random.default_rng(derive_seed(found.seed, "look", number))
    B, all_of_them = found.super_batch_size, found.manifest.sub_batches
    wanted = min(all_of_them, MOST_SUB_BATCHES, max(1, MOST_CANDIDATES // B))
    numbers = np.sort(rng.permutation(all_of_them)[:wanted])
    order = rng.permutation(np.array(found.shards)).tolist()
    # Enough rows to see what a pool is like; a shard more where the last one falls short.
    rows = np.cumsum([found.pool.shards[i].rows for i in order])
    read = sorted(order[: 1 + int(np.searchsorted(rows, MOST_ROWS))])

    parts: list[Candidates] = []
    tables: list[pa.Table] = []
    unusable: dict[str, list[Unusable]] = defaultdict(list)
    groups: dict[tuple[int, int], list[Repeat]] = defaultdict(list)
    looked = sum(found.pool.shards[i].rows for i in read)
    for index in progress(read, len(read)):
        shard = found.pool.shards[index]
        facts = read_embeddings(
            found.store, embedding_name(found.reference.sha, shard), ["uid", "status", "error", "width", "height"]
        )
        for row in _unusable_rows(facts, index):
            if len(unusable[row.reason]) < PER_REASON:
                unusable[row.reason].append(row)
        for head, repeat in _repeats(found, shard):
            groups[head].append(repeat)
        # Each shard its share, or the first ones would take all.
        part, sub_batches = _candidates(found, shard, numbers, rng, -(-MOST_CANDIDATES * shard.rows // looked))
        parts.append(part)
        at = pa.array(part.rows["row"])
        tables.append(
            facts.select(["uid", "width", "height"])
            .take(at)
            .append_column("sub_batch", pa.array(sub_batches, pa.int32()))
            .append_column("shard", pa.array(np.full(len(at), index), pa.int32()))
            .append_column("row", at)
        )

    learned = all(part.learner is not None for part in parts)
    loaded = Candidates.concatenate(
        [dataclasses.replace(part, learner=part.learner if learned else None) for part in parts]
    )
    # As selection has them, whose noise goes by the order.
    order = key_order(loaded.rows)
    order = order[np.isin(order, loaded.finite_rows())]
    loaded, table = loaded.take(order), pa.concat_tables(tables).take(pa.array(order))
    reference, learner = _models(found, loaded)
    table = _with_losses(table, reference, learner, found.selection["loss"])
    table = _with_choice(found, table, numbers)
    table = _with_other_method(found, table, reference, learner)
    before, after = _matrices(table, reference, learner, found.selection["loss"], rng)
    return Look(
        round=found,
        shards=compared_shards(found.store, found.pool, found.evaluation),
        read=tuple(read),
        rows=looked,
        sub_batches=wanted,
        candidates=table,
        unusable=tuple(row for some in unusable.values() for row in some),
        groups=tuple(
            Group(
                shard=shard, row=row, repeats=tuple(sorted(some, key=lambda one: (-one.similarity, one.shard, one.row)))
            )
            for (shard, row), some in sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
        ),
        before=before,
        after=after,
    )


def pair_losses(model: Embeddings, loss: Loss) -> Tensor:
    """What each picture and each caption add to the loss: [n, n], pictures by captions.

    Of the sigmoid loss its terms (arXiv 2303.15343, Algorithm 1); of the softmax loss, which has none, what a pair's
    picture would lose if the caption were its only rival.

    >>> apart = Embeddings(torch.eye(2), torch.eye(2), logit_scale=10.0, logit_bias=-5.0)
    >>> [[round(value, 3) for value in row] for row in pair_losses(apart, "sigmoid").tolist()]
    [[0.007, 0.007], [0.007, 0.007]]
    """
    logits = model.logit_scale * (model.zimg.float() @ model.ztxt.float().T)
    own = torch.eye(len(logits), dtype=torch.bool)
    if loss == "softmax":
        return softplus(logits - logits.diagonal()[:, None]).masked_fill(own, 0.0)
    logits = logits + model.logit_bias
    return softplus(torch.where(own, -logits, logits))


def _unusable_rows(facts: pa.Table, shard: int) -> Iterator[Unusable]:
    bad = np.flatnonzero(pc.not_equal(facts["status"], "ok").to_numpy())
    for row, fact in zip(bad.tolist(), facts.take(pa.array(bad)).to_pylist(), strict=True):
        yield Unusable(shard=shard, row=row, uid=fact["uid"] or "", reason=fact["status"], error=fact["error"])


def _repeats(found: Committed, shard: Shard) -> Iterator[tuple[tuple[int, int], Repeat]]:
    """Rows of a shard that left as duplicates, each after its representative."""
    for row in read_duplicates(found.store, found.index, shard).to_pylist():
        near = (row["duplicate_of_shard"], row["duplicate_of_row"])
        yield near, Repeat(shard=row["shard"], row=row["row"], reason=DUPLICATE_EXACT, near=near, similarity=1.0)
    if found.index.dedup is not None:
        for row in read_dropped(found.store, found.index.dedup, shard).to_pylist():
            yield (
                (row["representative_shard"], row["representative_row"]),
                Repeat(
                    shard=row["shard"],
                    row=row["row"],
                    reason=row["reason"],
                    near=(row["duplicate_of_shard"], row["duplicate_of_row"]),
                    similarity=row["similarity"],
                ),
            )


def _candidates(
    found: Committed, shard: Shard, numbers: Ints, rng: np.random.Generator, most: int
) -> tuple[Candidates, Ints]:
    """Candidates of some sub-batches that lie in a shard, with their vectors, and their sub-batch's number."""
    cut = found.cut_of(shard.index)
    assert cut is not None, shard  # one of `found.shards`
    rows: Rows = candidate_rows(found.store, shard, found.reference, found.index, seed=cut.seed, epoch=cut.epoch)
    within = super_batch_of(rows["key"], cut.boundaries)
    wanted = np.flatnonzero((within >= 0) & np.isin(within + cut.first, numbers))
    if len(wanted) > most:
        wanted = np.sort(rng.permutation(wanted)[:most])
    rows, sub_batches = rows[wanted], within[wanted] + cut.first
    for scope in ("", cut.scope) if found.learner is not None else ():
        name = embedding_name(found.learner.sha, shard, scope) if found.learner else ""
        if found.store.exists(name):
            return load_vectors(found.store, shard, rows, found.reference, found.learner, scope), sub_batches
    return load_vectors(found.store, shard, rows, found.reference, None, ""), sub_batches


def _models(found: Committed, loaded: Candidates) -> tuple[Embeddings, Embeddings | None]:
    def embeddings(vectors: Any, spec: EncoderSpec) -> Embeddings:
        scale = Scale(logit_scale=spec.logit_scale, logit_bias=spec.logit_bias)
        return embeddings_of(vectors, scale, torch.device("cpu"))

    own = embeddings(loaded.learner, found.learner) if loaded.learner and found.learner else None
    return embeddings(loaded.reference, found.reference), own


def _with_losses(table: pa.Table, reference: Embeddings, learner: Embeddings | None, loss: Loss) -> pa.Table:
    own = diagonal_losses(learner, loss).float().numpy() if learner is not None else pa.nulls(len(table), pa.float32())
    fixed = diagonal_losses(reference, loss).float().numpy()
    return table.append_column("reference_loss", pa.array(fixed)).append_column("learner_loss", pa.array(own))


def _with_choice(found: Committed, table: pa.Table, numbers: Ints) -> pa.Table:
    """Whether a candidate was chosen, and what was known at the pick."""
    picked = pa.concat_tables([selected_rows(found.store, found.steps, number) for number in numbers.tolist()])
    places = _places(picked)
    order = np.argsort(places)
    at = np.searchsorted(places[order], _places(table))
    at[at == len(order)] = 0
    at = order[at]
    chosen = places[at] == _places(table)
    picks = picked.select(["position", "chunk", "score"]).take(pa.array(at, mask=~chosen))
    for name in picks.column_names:
        table = table.append_column(name, picks[name])
    # Of a learner whose embeddings are gone: what was kept of those that were chosen.
    kept = picked["learner_loss"].take(pa.array(at, mask=~chosen))
    place = table.column_names.index("learner_loss")
    table = table.set_column(place, "learner_loss", pc.coalesce(table["learner_loss"], kept))
    return table.append_column("chosen", pa.array(chosen))


def _places(table: pa.Table) -> Ints:
    """Shard and row of each row of a table as one number."""
    return np.asarray(table["shard"].to_numpy().astype(np.int64) * 2**40 + table["row"].to_numpy())


def _with_other_method(
    found: Committed, table: pa.Table, reference: Embeddings, learner: Embeddings | None
) -> pa.Table:
    """Whether a joint round would have taken a candidate one by one: the same share of each super-batch."""
    selection = found.selection
    known: Any = pa.nulls(len(table), pa.bool_())
    if selection["method"] == "joint" and (learner is not None or selection["criterion"] == "easy_reference"):
        taken = np.zeros(len(table), bool)
        of = table["sub_batch"].to_numpy()
        for number in np.unique(of).tolist():
            here = np.flatnonzero(of == number)
            models = [_some(model, here) if model is not None else None for model in (learner, reference)]
            drawn = jointly_sample_batch(
                models[0],
                models[1],
                sub_batch_size=max(1, round(len(here) * found.manifest.sub_batch_size / found.super_batch_size)),
                loss=selection["loss"],
                criterion=selection["criterion"],
                method="independent",
                gain=selection["gain"],
                generator=torch.Generator().manual_seed(derive_seed(found.seed, "draw", found.manifest.round, number)),
            )
            taken[here[drawn.positions.numpy()]] = True
        known = pa.array(taken)
    return table.append_column("independent", known)


def _some(model: Embeddings, rows: Ints) -> Embeddings:
    at = torch.from_numpy(rows)
    return Embeddings(model.zimg[at], model.ztxt[at], model.logit_scale, model.logit_bias)


def _matrices(
    table: pa.Table, reference: Embeddings, learner: Embeddings | None, loss: Loss, rng: np.random.Generator
) -> tuple[Matrices | None, Matrices | None]:
    """Of the super-batch of which most was looked at: rows at random, and rows that were chosen."""
    of, chosen = table["sub_batch"].to_numpy(), table["chosen"].to_numpy()
    if not chosen.any():
        return None, None
    here = np.flatnonzero(of == np.bincount(of[chosen]).argmax())
    picked = here[chosen[here]]
    picked = picked[np.argsort(table["position"].to_numpy()[picked])]
    count = min(MATRIX_ROWS, len(picked))
    if count < 2:  # there is nothing beside the diagonal
        return None, None

    def matrices(rows: Ints) -> Matrices:
        own = pair_losses(_some(learner, rows), loss).numpy() if learner is not None else None
        return Matrices(rows=rows, reference=pair_losses(_some(reference, rows), loss).numpy(), learner=own)

    return matrices(np.sort(rng.permutation(here)[:count])), matrices(picked[:count])
