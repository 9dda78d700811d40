"""Explain: what a round did, and why a pair is in or out, from what the root holds."""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from curate.dedup import why_dropped
from curate.embeddings import (
    DAMAGED_SHARD,
    EMBEDDING_NONFINITE,
    contents,
    damage_of,
    embedding_name,
    range_scope,
    read_embeddings,
    vectors,
)
from curate.errors import UserError
from curate.manifest import Manifest, last_round, read_manifest, steps_folder
from curate.parquet import read_table
from curate.pool import Pool, Shard, load_pool
from curate.selected import read_selected, selected_name
from curate.spec import EncoderSpec
from curate.storage import Store
from curate.walk import WalkRange, read_walk, super_batch_of, walk_folder, walk_keys


@dataclass(frozen=True, kw_only=True)
class _Context:
    """What is needed to follow a pair through one committed round."""

    manifest: Manifest
    pool: Pool
    reference: EncoderSpec
    learner: EncoderSpec | None
    """None if selection did not look at it."""
    scope: str
    """Of the learner's embedding files, unless they are of the whole pool."""
    selection: Mapping[str, Any]
    """Section of the recipe."""
    folder: str
    """Of its walk."""
    steps: str
    walk_range: WalkRange
    seed: int
    boundaries: tuple[int, ...]
    dedup: str | None
    """Folder of the deduplication that it went by."""
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
    contexts = [_context(store, manifest) for manifest in _rounds(store)]
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
    for shard in context.pool.shards:
        table = read_embeddings(
            store, embedding_name(context.reference.sha, shard), ["uid", "status", "error", "content"]
        )
        for row in np.flatnonzero(pc.equal(table["uid"], uid).to_numpy()):
            there = table.slice(row, 1)
            yield {
                "uid": uid,
                "shard": shard.name,
                "row": int(row),
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
    if context.dedup is not None:
        why = why_dropped(store, context.pool, context.dedup, context.evaluation, shard, row)
        if why is not None:
            return {"round": number} | why
    if (original := _original(store, context, index, row)) is not None:
        return {"round": number, "outcome": "duplicate_exact", "duplicate_of": original}
    walk_key = walk_keys(content, seed=context.seed, epoch=context.walk_range.epoch)
    sub_batch = int(super_batch_of(walk_key, context.boundaries)[0])
    if sub_batch < 0:
        return {"round": number, "outcome": "other_round"}
    table, _ = read_selected(store, selected_name(context.steps, sub_batch))
    here = table.filter((pc.field("shard") == index) & (pc.field("row") == row)).to_pylist()
    if not here:
        return {"round": number, "sub_batch": sub_batch} | _not_selected(store, context, shard, row, table)
    kept = ("sub_batch", "position", "chunk", "score", "learner_loss", "reference_loss")
    return {"round": number, "outcome": "selected"} | {name: here[0][name] for name in kept}


def _not_selected(store: Store, context: _Context, shard: Shard, row: int, chosen: pa.Table) -> dict[str, Any]:
    """What a candidate had to show for itself, beside the least that any row had which was chosen in its place.

    An independent score is of a pair by itself. Joint selection looks at what a pair adds to those before it as well,
    and draws, so that a row may have more than the least and stay behind.
    """
    loss = context.selection["loss"]
    own: dict[str, float | None] = {
        "learner_loss": None,
        "reference_loss": _loss_of(store, context.reference, shard, row, loss),
    }
    if context.learner is not None:
        own["learner_loss"] = _loss_of(store, context.learner, shard, row, loss, context.scope)
    if any(value is not None and math.isnan(value) for value in own.values()):
        return {"outcome": EMBEDDING_NONFINITE}
    scores = [_independent_score(context.selection, losses) for losses in chosen.select(list(own)).to_pylist()]
    return (
        {"outcome": "not_selected"}
        | own
        | {
            "independent_score": _independent_score(context.selection, own),
            "least_chosen": min((score for score in scores if score is not None), default=None),
        }
    )


def _loss_of(store: Store, spec: EncoderSpec, shard: Shard, row: int, loss: str, *scopes: str) -> float | None:
    """The loss of one pair by itself, `curate.jest.diagonal_losses`; NaN without vectors, None without their file."""
    name = next(
        (n for n in (embedding_name(spec.sha, shard, scope) for scope in ("", *scopes)) if store.exists(n)), None
    )
    if name is None:
        return None
    table = read_embeddings(store, name, ["zimg", "ztxt"]).slice(row, 1)
    zimg, ztxt = (vectors(table[column], spec.embed_dim).astype(np.float32) for column in ("zimg", "ztxt"))
    logit = spec.logit_scale * float((zimg * ztxt).sum())
    if math.isnan(logit) or loss == "softmax":
        return -logit
    return float(np.logaddexp(0, -logit - spec.logit_bias))


def _independent_score(selection: Mapping[str, Any], losses: Mapping[str, float | None]) -> float | None:
    """The score of a pair by its own losses; None where selection looked at none, or one is not known."""
    signs = {"learnability": (1, -1), "hard_learner": (1, 0), "easy_reference": (0, -1)}[selection["criterion"]]
    known = [
        sign * value
        for sign, value in zip(signs, (losses["learner_loss"], losses["reference_loss"]), strict=True)
        if sign and value is not None
    ]
    return sum(known) if selection["method"] != "uniform" and len(known) == sum(map(abs, signs)) else None


def _original(store: Store, context: _Context, shard: int, row: int) -> dict[str, Any] | None:
    """The row that this one is an exact duplicate of, or None."""
    for name in store.list(context.folder):
        if not name.endswith(".parquet"):
            continue
        table = read_table(store, name, filters=[("shard", "=", shard), ("row", "=", row)])
        if len(table):
            original = table.to_pylist()[0]
            shards = context.pool.shards
            return {"shard": shards[original["duplicate_of_shard"]].name, "row": original["duplicate_of_row"]}
    return None


def _context(store: Store, manifest: Manifest) -> _Context:
    lineage = manifest.lineage
    pool = load_pool(store, lineage["pool"]["fingerprint"])
    reference = EncoderSpec(**lineage["reference"])
    walk_range = WalkRange(**lineage["walk"]["range"])
    seed = lineage["recipe"]["seed"]
    dedup = lineage.get("dedup") or {"folder": None, "evaluation": ()}
    folder = walk_folder(
        pool,
        reference,
        seed=seed,
        epoch=walk_range.epoch,
        super_batch_size=lineage["walk"]["through"][3],
        dedup=dedup["folder"],
    )
    walk = read_walk(store, folder)
    if walk is None:
        raise UserError(
            f"{folder}/walk.json: expected the walk of round {manifest.round}, found none; restore the file"
        )
    boundaries = walk.boundaries[walk_range.start : walk_range.stop + 1]
    low, high = boundaries[0], boundaries[-1]
    learner = lineage["learner"]
    return _Context(
        manifest=manifest,
        pool=pool,
        reference=reference,
        learner=EncoderSpec(**{name: value for name, value in learner.items() if name != "number"})
        if learner
        else None,
        scope=range_scope(seed=seed, epoch=walk_range.epoch, low=low, high=high, dedup=dedup["folder"]),
        selection=lineage["recipe"]["selection"],
        folder=folder,
        steps=steps_folder(manifest.round, lineage["plan"]),
        walk_range=walk_range,
        seed=seed,
        boundaries=boundaries,
        dedup=dedup["folder"],
        evaluation=tuple(dedup["evaluation"]),
    )


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
