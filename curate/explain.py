"""Explain: what a round did, and why a pair is in or out, from what the root holds."""

import functools
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from curate.dedup import why_dropped
from curate.embeddings import CONTENT_BYTES, DAMAGED_SHARD, contents, damage_of, embedding_name, read_embeddings
from curate.errors import UserError
from curate.index import Index, look_up, read_duplicates, read_index, uid_digest
from curate.manifest import Manifest, last_round, read_manifest, steps_folder
from curate.pool import Pool, load_pool
from curate.selected import read_selected, selected_name
from curate.spec import EncoderSpec
from curate.storage import Store
from curate.windows import (
    EpochRange,
    Window,
    cut_name,
    read_cut,
    row_keys,
    stretches,
    super_batch_of,
    windows_of,
)


@dataclass(frozen=True, kw_only=True)
class _Context:
    """What is needed to follow a pair through one committed round."""

    manifest: Manifest
    pool: Pool
    index: Index
    reference: EncoderSpec
    steps: str
    windows: tuple[Window, ...]
    taken: EpochRange
    seed: int
    super_batch_size: int
    evaluation: tuple[str, ...]


def summarize_rounds(store: Store) -> list[dict[str, Any]]:
    """One line per committed round.

    Raises:
        UserError: there is none.
    """
    manifests = _rounds(store)
    # How a round's batches did in training is known to the rounds whose learner was trained on them.
    realised: dict[int, list[tuple[float, int]]] = defaultdict(list)
    for manifest in manifests:
        for entry in manifest.quality["trained"]:
            realised[entry["round"]].append((entry["realised"], entry["batches"]))
    return [
        {
            "round": manifest.round,
            "sub_batches": manifest.sub_batches,
            "sub_batch_size": manifest.sub_batch_size,
            "rows": manifest.tallies[-1].kept,
            "pool_rows": manifest.pool_rows,
            "learner": manifest.quality["learner"],
            "staleness_batches": manifest.quality["staleness_batches"],
            "learnability": _mean(manifest.learnability),
            "uniform_learnability": _mean(manifest.uniform_learnability),
            "realised_learnability": _weighted_mean(realised[manifest.round]),
            "rank_correlation": (manifest.quality["rank_correlation"] or {}).get("value"),
            "chosen_again": manifest.quality["chosen_again"],
            "unique_examples": manifest.quality["unique_examples"],
        }
        for manifest in manifests
    ]


def describe_round(store: Store, number: int) -> dict[str, Any]:
    """A round's accounting: where the rows of the pool went, step by step, and what was chosen.

    Raises:
        UserError: the round is not committed.
    """
    found = read_manifest(store, number)
    if found is None:
        raise UserError(f"{store.url}: round {number} is not committed; the newest is {last_round(store)}")
    manifest, sha256 = found
    return {
        "round": number,
        "manifest_sha256": sha256,
        "parent": manifest.parent,
        "pool_rows": manifest.pool_rows,
        "skipped_shards": _skipped_shards(store, manifest),
        "steps": [tally.to_json() for tally in manifest.tallies],
        "sub_batches": manifest.sub_batches,
        "sub_batch_size": manifest.sub_batch_size,
        "learnability": _mean(manifest.learnability),
        "uniform_learnability": _mean(manifest.uniform_learnability),
        "quality": manifest.quality,
        "files": [{"name": f.name, "size": f.size, "sub_batches": f.sub_batches} for f in manifest.files],
        "lineage": manifest.lineage,
    }


def _skipped_shards(store: Store, manifest: Manifest) -> list[str]:
    """A line for each shard that was bad: by its footer, or, if the tally tells, by its pages."""
    pool = manifest.lineage.get("pool", {})
    lines = list(pool.get("skipped_shards", ()))
    if manifest.tallies[0].dropped.get(DAMAGED_SHARD):
        shards = load_pool(store, pool["fingerprint"]).shards
        lines += damage_of(store, shards, EncoderSpec(**manifest.lineage["reference"]).sha)
    return lines


def explain_uid(store: Store, uid: str) -> list[dict[str, Any]]:
    """Each row with this uid: where it lies, whether it can be used, and what every round did with it.

    Raises:
        UserError: no committed round, or no row has this uid.
    """
    contexts = _contexts(store, _rounds(store))
    newest = contexts[-1]
    rows = list(_find(store, newest, uid))
    if not rows:
        raise UserError(f"uid {uid}: none of the {newest.pool.rows:,} rows of the pool has it; uids are in curate.uid")
    for row in rows:
        content, key = row.pop("content"), row.pop("key")
        if row["status"] == "ok":
            row["rounds"] = [_follow(store, context, key, row["row"], content) for context in contexts]
    return rows


def _find(store: Store, context: _Context, uid: str) -> Iterator[dict[str, Any]]:
    """The rows with this uid: one look-up in the index, one embedding file for each."""
    pool = context.pool
    if pool.columns.uid:
        places = look_up(store, context.index, "uids", uid_digest(uid))
    elif re.fullmatch(f"[0-9a-f]{{{2 * CONTENT_BYTES}}}", uid):
        places = look_up(store, context.index, "contents", bytes.fromhex(uid))
    else:
        # Rows of a damaged shard, whose contents nobody knows.
        name, _, number = uid.rpartition("#")
        at = int(number) if number.isdecimal() else -1
        places = [(shard.index, at) for shard in pool.shards if shard.name == name and 0 <= at < shard.rows]
    for index, row in sorted(places):
        shard = pool.shards[index]
        name = embedding_name(context.reference.sha, shard)
        there = read_embeddings(store, name, ["uid", "status", "error", "content"]).slice(row, 1)
        if there["uid"][0].as_py() != uid:
            continue
        yield {
            "uid": uid,
            "shard": shard.name,
            "row": row,
            "status": there["status"][0].as_py(),
            "error": there["error"][0].as_py(),
            "content": contents(there["content"]),
            "key": shard.key,
        }


def _follow(store: Store, context: _Context, key: str, row: int, content: npt.NDArray[np.uint64]) -> dict[str, Any]:
    """What one round did with a usable row of the shard that `key` names: this very file, whatever its name then."""
    number = context.manifest.round
    index = next((s.index for s in context.pool.shards if s.key == key), None)
    if index is None:
        return {"round": number, "outcome": "not_in_pool"}
    shard = context.pool.shards[index]
    if context.index.dedup is not None:
        why = why_dropped(store, context.pool, context.index.dedup, context.evaluation, shard, row)
        if why is not None:
            return {"round": number} | why
    repeated = read_duplicates(store, context.index, shard)
    for original in repeated.filter(pc.field("row") == row).to_pylist():
        place = {"shard": context.pool.shards[original["duplicate_of_shard"]].name, "row": original["duplicate_of_row"]}
        return {"round": number, "outcome": "duplicate_exact", "duplicate_of": place}
    sub_batch = _sub_batch(store, context, index, content)
    if sub_batch is None:
        return {"round": number, "outcome": "other_round"}
    table, _ = read_selected(store, selected_name(context.steps, sub_batch))
    here = table.filter((pc.field("shard") == index) & (pc.field("row") == row)).to_pylist()
    if not here:
        return {"round": number, "outcome": "not_selected", "sub_batch": sub_batch}
    kept = ("sub_batch", "position", "chunk", "score", "learner_loss", "reference_loss")
    return {"round": number, "outcome": "selected"} | {name: here[0][name] for name in kept}


def _sub_batch(store: Store, context: _Context, shard: int, content: npt.NDArray[np.uint64]) -> int | None:
    """Number of the sub-batch whose super-batch held a candidate of a shard; None if it was another round's."""
    epoch = context.taken.epoch
    for stretch in stretches(context.windows, context.taken, context.super_batch_size):
        if shard not in stretch.window.shards:
            continue
        shards = [context.pool.shards[i] for i in stretch.window.shards]
        name = cut_name(
            context.index.folder, shards, seed=context.seed, epoch=epoch, super_batch_size=context.super_batch_size
        )
        if (cut := read_cut(store, name)) is None:
            raise UserError(f"{name}: expected where a window of the round is cut, found nothing; restore the file")
        inside = cut[stretch.start : stretch.start + stretch.super_batches + 1]
        found = int(super_batch_of(row_keys(content, seed=context.seed, epoch=epoch), inside)[0])
        return stretch.first + found if found >= 0 else None
    return None


def _contexts(store: Store, manifests: Sequence[Manifest]) -> list[_Context]:
    """Of some rounds; what several of them share is read once."""
    pool_of = functools.cache(lambda fingerprint: load_pool(store, fingerprint))
    index_of = functools.cache(lambda folder: read_index(store, folder))
    found = []
    for manifest in manifests:
        lineage = manifest.lineage
        pool, index = pool_of(lineage["pool"]["fingerprint"]), index_of(lineage["index"])
        if index is None:
            raise UserError(
                f"{lineage['index']}/index.json: expected the index of round {manifest.round}, found none; restore it"
            )
        _, seed, super_batch_size, window_rows = lineage["windows"]["through"]
        taken = EpochRange(**lineage["windows"]["taken"])
        found.append(
            _Context(
                manifest=manifest,
                pool=pool,
                index=index,
                reference=EncoderSpec(**lineage["reference"]),
                steps=steps_folder(manifest.round, lineage["plan"]),
                windows=tuple(
                    windows_of(pool.shards, index.candidates, seed=seed, epoch=taken.epoch, window_rows=window_rows)
                ),
                taken=taken,
                seed=seed,
                super_batch_size=super_batch_size,
                evaluation=tuple((lineage["dedup"] or {"evaluation": ()})["evaluation"]),
            )
        )
    return found


def _rounds(store: Store) -> list[Manifest]:
    found = [read_manifest(store, number) for number in range(last_round(store) + 1)]
    manifests = [read[0] for read in found if read is not None]
    if not manifests:
        raise UserError(f"{store.url}: expected a committed round, found none; run: curate round RECIPE")
    return manifests


def _weighted_mean(values: list[tuple[float, int]]) -> float | None:
    return sum(value * weight for value, weight in values) / sum(weight for _, weight in values) if values else None


def _mean(values: tuple[float | None, ...]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
