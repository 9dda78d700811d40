"""Select, scaled out: each shard of a window is read once, and one task draws each sub-batch.

shards of the window, in groups    one task each    vectors of their candidates, a part for each super-batch
super-batches                      one task each    its parts in, a selected file out
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from curate.models.spec import EncoderSpec
from curate.parts import by_destination, pack_arrays, read_parts, remove_parts, unpack_arrays, write_parts
from curate.pipelines.cluster import Devices, device, groups, run_tasks
from curate.pool.shards import Shard
from curate.recipe import SelectionSection
from curate.select.draw import Candidates, Scale, select_sub_batch
from curate.select.files import SubBatchStats, read_stats, selected_name, write_selected
from curate.select.index import Index, candidate_rows
from curate.select.load import load_vectors
from curate.select.windows import super_batch_of
from curate.storage import Store

GROUP_BYTES = 2**28
"""Vectors that one task reads, and parts by super-batch, which takes as much twice more."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What the tasks of a window are given: the whole of what decides its sub-batches."""

    store: Store
    section: SelectionSection
    reference: EncoderSpec
    learner: EncoderSpec | None
    """None if selection does not look at it."""
    scope: str
    """Of the learner's embedding files."""
    index: Index
    seed: int
    epoch: int
    round: int
    steps: str
    """Folder of the round's steps."""
    first: int
    """Number, within the round, of the window's first sub-batch."""
    boundaries: tuple[int, ...]
    """Of its super-batches, one more than there are."""
    sources: int = 0
    """Groups of shards."""

    @property
    def row_bytes(self) -> int:
        """Of the vectors of a candidate."""
        return 4 * (self.reference.embed_dim + (self.learner.embed_dim if self.learner else 0))

    @property
    def parts(self) -> str:
        """How the names of all files of parts begin."""
        return f"{self.steps}/vectors-{self.first:06d}"

    def part_name(self, source: int) -> str:
        """Name of the file of parts of one group of shards."""
        return f"{self.parts}-{source:06d}"


def select_window(selection: Selection, shards: Sequence[Shard], devices: Devices) -> list[SubBatchStats]:
    """Draw every sub-batch of a window that has not been drawn yet.

    Args:
        selection: what decides them.
        shards: of the window.
        devices: what draws.

    Returns:
        Statistics by sub-batch, those of sub-batches drawn before included.
    """
    store, first, count = selection.store, selection.first, len(selection.boundaries) - 1
    there = set(store.list(selection.steps))
    numbers = range(first, first + count)
    todo = [i for i in numbers if selected_name(selection.steps, i) not in there]
    drawn: dict[int, SubBatchStats] = {}
    if todo:
        sources = groups(shards, max(1, GROUP_BYTES // selection.row_bytes))
        selection = replace(selection, sources=len(sources))
        largest = max(sum(shard.rows for shard in group) for group in sources) * selection.row_bytes
        run_tasks(_part_vectors, list(enumerate(sources)), selection, title="candidates", memory=3 * largest)
        # A drawing task holds the vectors of a super-batch three times in float16 (its parts, all of them, the sound
        # ones) and, on a CPU, once in float32.
        memory = selection.section.super_batch_size * selection.row_bytes * (3 + 2)
        found = run_tasks(_draw, todo, selection, title="select", memory=memory, devices=devices)
        drawn = dict(zip(todo, found, strict=True))
    remove_parts(store, selection.parts)
    return [drawn[i] if i in drawn else read_stats(store, selected_name(selection.steps, i)) for i in numbers]


def _part_vectors(item: tuple[int, Sequence[Shard]], selection: Selection) -> None:
    """Write the candidates of a group of shards with their vectors, a part for each super-batch of the window."""
    number, shards = item
    name, count = selection.part_name(number), len(selection.boundaries) - 1
    if selection.store.exists(name):
        return
    found = Candidates.concatenate([_load(selection, shard) for shard in shards])
    parts = by_destination(
        super_batch_of(found.rows["key"], selection.boundaries), count, lambda at: pack_candidates(found.take(at))
    )
    write_parts(selection.store, name, parts, count=count)


def _draw(sub_batch: int, selection: Selection) -> SubBatchStats:
    """Draw one sub-batch from the parts of its super-batch."""
    names = [selection.part_name(number) for number in range(selection.sources)]
    parts = [unpack_candidates(part) for part in read_parts(selection.store, names, sub_batch - selection.first)]
    learner, reference = selection.learner, selection.reference
    table, stats = select_sub_batch(
        Candidates.concatenate(parts),
        selection.section,
        learner=Scale(logit_scale=learner.logit_scale, logit_bias=learner.logit_bias) if learner else None,
        reference=Scale(logit_scale=reference.logit_scale, logit_bias=reference.logit_bias),
        seed=selection.seed,
        round_number=selection.round,
        sub_batch=sub_batch,
        device=device(),
    )
    write_selected(selection.store, selected_name(selection.steps, sub_batch), table, stats)
    return stats


def _load(selection: Selection, shard: Shard) -> Candidates:
    """The candidates of a shard that some super-batch of the window holds, with their vectors."""
    rows = candidate_rows(
        selection.store, shard, selection.reference, selection.index, seed=selection.seed, epoch=selection.epoch
    )
    rows = rows[super_batch_of(rows["key"], selection.boundaries) >= 0]
    return load_vectors(selection.store, shard, rows, selection.reference, selection.learner, selection.scope)


def pack_candidates(candidates: Candidates) -> bytes:
    """Candidates as bytes."""
    return pack_arrays(candidates.rows, *candidates.reference, *(candidates.learner or ()))


def unpack_candidates(part: bytes) -> Candidates:
    """The inverse of `pack_candidates`."""
    rows, *found = unpack_arrays(part)
    zimg, ztxt, *own = (z.astype(np.float16, copy=False) for z in found)
    return Candidates(rows=rows, reference=(zimg, ztxt), learner=(own[0], own[1]) if own else None)
