"""Trace: why a pair is in or out of each round, from what the root holds."""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from curate.dedup.files import why_dropped
from curate.embed.files import (
    CONTENT_BYTES,
    EMBEDDING_NONFINITE,
    contents,
    embedding_name,
    read_embeddings,
    vectors,
)
from curate.errors import UserError
from curate.models.spec import EncoderSpec
from curate.pool.shards import Shard
from curate.rounds.committed import Committed, newest_round, open_rounds
from curate.rounds.explain import committed_rounds
from curate.rounds.manifest import is_expired
from curate.select.files import read_selected, selected_name
from curate.select.index import look_up, read_duplicates, uid_digest
from curate.storage import Store


def explain_uid(store: Store, uid: str) -> list[dict[str, Any]]:
    """Each row with this uid: where it lies, whether it can be used, and what every round did with it.

    Raises:
        UserError: no committed round, or no row has this uid.
    """
    contexts = open_rounds(store, committed_rounds(store))
    newest = contexts[-1]
    rows = list(_find(store, newest, uid))
    if not rows:
        raise _no_such(uid, newest)
    expired = {context.manifest.round for context in contexts if is_expired(store, context.manifest.round)}
    for row in rows:
        content, key = row.pop("content"), row.pop("key")
        if row["status"] == "ok":
            row["rounds"] = [
                {"round": context.manifest.round, "outcome": "round_expired"}
                if context.manifest.round in expired
                else _follow(store, context, key, row["row"], content)
                for context in contexts
            ]
    return rows


def find_uid(store: Store, uid: str) -> tuple[Shard, int, str]:
    """Where the first row with this uid lies in the pool of the newest round, and whether it could be used.

    Raises:
        UserError: no committed round, or no row has this uid.
    """
    (context,) = open_rounds(store, [newest_round(store)])
    row = next(_find(store, context, uid), None)
    if row is None:
        raise _no_such(uid, context)
    return next(shard for shard in context.pool.shards if shard.key == row["key"]), row["row"], row["status"]


def _no_such(uid: str, context: Committed) -> UserError:
    return UserError(f"uid {uid}: none of the {context.pool.rows:,} rows of the pool has it; uids are in curate.uid")


def _find(store: Store, context: Committed, uid: str) -> Iterator[dict[str, Any]]:
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


def _follow(store: Store, context: Committed, key: str, row: int, content: npt.NDArray[np.uint64]) -> dict[str, Any]:
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
    cut = context.cut_of(index)
    sub_batch = -1 if cut is None else int(cut.sub_batches(content)[0])
    if cut is None or sub_batch < 0:
        return {"round": number, "outcome": context.turn_of(index, content)}
    table, _ = read_selected(store, selected_name(context.steps, sub_batch))
    here = table.filter((pc.field("shard") == index) & (pc.field("row") == row)).to_pylist()
    if not here:
        return {"round": number, "sub_batch": sub_batch} | _not_selected(store, context, shard, row, table, cut.scope)
    kept = ("sub_batch", "position", "chunk", "score", "learner_loss", "reference_loss")
    return {"round": number, "outcome": "selected"} | {name: here[0][name] for name in kept}


def _not_selected(
    store: Store, context: Committed, shard: Shard, row: int, chosen: pa.Table, scope: str
) -> dict[str, Any]:
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
        own["learner_loss"] = _loss_of(store, context.learner, shard, row, loss, scope)
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
    table = read_embeddings(store, name, ["zimg", "ztxt"], numbered=True).filter(pc.field("row") == row)
    if not len(table):
        return None
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
