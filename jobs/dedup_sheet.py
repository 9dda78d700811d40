"""A sheet of groups of near-duplicates as pictures, one HTML file, to be looked at before a threshold is trusted."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from curate.dedup.files import DROPPED_SCHEMA, Dedup, compared_shards, dropped_files, dropped_name
from curate.jobs.page import Figure, Gallery, Pair, Place, picture, read_pairs, write_page
from curate.messages import counted
from curate.parquet import read_table
from curate.pool.shards import Pool, Shard
from curate.storage import Store

SURE = ["duplicate_exact", "duplicate_image"]
"""Reasons that nobody need look at."""
MOST_MEMBERS = 12
"""Pictures of one group; how many more there are is said."""


@dataclass(frozen=True, kw_only=True)
class _Member:
    place: Place
    why: str


def write_sheet(store: Store, pool: Pool, dedup: Dedup, path: Path, *, groups: int, seed: int = 0) -> int:
    """Draw groups at random among those that hold a near-duplicate, and write them as one HTML file.

    Args:
        store: the root.
        pool: the inventory.
        dedup: complete.
        path: of the file.
        groups: how many, if there are so many.
        seed: of the draw.

    Returns:
        The number of groups drawn.
    """
    files = [dropped_name(dedup.folder, number) for number in range(dropped_files(len(pool.shards)))]
    near = np.unique(np.concatenate([_heads_of_near(store, name) for name in files]), axis=0)
    drawn = near[np.sort(np.random.default_rng(seed).permutation(len(near))[:groups])]
    dropped = pa.concat_tables([_led_by(store, name, drawn) for name in files])
    heads = _heads(dropped)
    shards = compared_shards(store, pool, dedup.evaluation)
    members = []
    for head in drawn:
        shard, row = head.tolist()
        stays = "stays" if shard < len(pool.shards) else "of an evaluation set"
        members.append(_members((shard, row), stays, dropped.filter(pa.array((heads == head).all(axis=1)))))
    pictures = read_pairs(shards, [member.place for some in members for member in some[: MOST_MEMBERS + 1]])
    write_page(
        path,
        "sheet.html.j2",
        title=f"Near-duplicates: {len(drawn)} of {counted(len(near), 'group')}",
        facts=", ".join(f"{reason} {rows:,}" for reason, rows in dedup.dropped.items()),
        galleries=[_gallery(some, shards, pictures) for some in members],
    )
    return len(drawn)


def _heads(table: pa.Table) -> npt.NDArray[np.int64]:
    """Shard and row of the representative of each dropped row: [n, 2]."""
    columns = [table[name].to_numpy().astype(np.int64) for name in ("representative_shard", "representative_row")]
    return np.column_stack(columns)


def _heads_of_near(store: Store, name: str) -> npt.NDArray[np.int64]:
    """Shard and row of those that represent a near-duplicate of one file, each once: [n, 2]."""
    table = read_table(store, name, schema=DROPPED_SCHEMA)
    return np.unique(_heads(table.filter(pc.invert(pc.is_in(table["reason"], pa.array(SURE))))), axis=0)


def _led_by(store: Store, name: str, heads: npt.NDArray[np.int64]) -> pa.Table:
    """The rows of a file that some rows [n, 2] represent."""
    table = read_table(store, name, schema=DROPPED_SCHEMA)
    wanted = set(map(tuple, heads.tolist()))
    return table.filter(pa.array([head in wanted for head in map(tuple, _heads(table).tolist())], pa.bool_()))


def _members(head: Place, stays: str, dropped: pa.Table) -> list[_Member]:
    """The row that is kept, then those that it represents, the most similar first."""
    rows = sorted(dropped.to_pylist(), key=lambda row: (-row["similarity"], row["shard"], row["row"]))
    said = [_Member(place=(row["shard"], row["row"]), why=f"{row['reason']} {row['similarity']:.4f}") for row in rows]
    return [_Member(place=head, why=stays), *said]


def _gallery(members: Sequence[_Member], shards: Sequence[Shard], pictures: dict[Place, Pair]) -> Gallery:
    figures: list[Figure] = []
    for member in members[: MOST_MEMBERS + 1]:
        shard, row = member.place
        image, caption = pictures[member.place]
        figures.append(
            Figure(
                caption=caption,
                image=picture(image),
                title=member.why,
                where=f"{shards[shard].name}, row {row}",
                kind="leaves" if figures else "stays",
            )
        )
    more = len(members) - 1 - MOST_MEMBERS
    return Gallery(
        title=counted(len(members), "row") + (f", {more} more not shown" if more > 0 else ""), figures=figures
    )
