"""Explain: what rounds did, from what the root holds."""

from collections import defaultdict
from typing import Any

from curate.embed.files import DAMAGED_SHARD, damage_of
from curate.errors import UserError
from curate.models.spec import EncoderSpec
from curate.pool.shards import load_pool
from curate.rounds.manifest import Manifest, is_expired, last_round, read_manifest
from curate.rounds.quality import selection_of
from curate.storage import Store


def summarize_rounds(store: Store) -> list[dict[str, Any]]:
    """One line per committed round.

    Raises:
        UserError: there is none.
    """
    manifests = committed_rounds(store)
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
            "chosen_by": chosen_by(manifest),
            "lead": (manifest.quality.get("standing") or {}).get("lead"),  # rounds of before it was measured have none
            "learnability": mean_of(manifest.learnability),
            "uniform_learnability": mean_of(manifest.uniform_learnability),
            "realised_learnability": _weighted_mean(realised[manifest.round]),
            "rank_correlation": (manifest.quality["rank_correlation"] or {}).get("value"),
            "chosen_again": manifest.quality["chosen_again"],
            "unique_examples": manifest.quality["unique_examples"],
        }
        for manifest in manifests
    ]


def read_committed(store: Store, number: int) -> tuple[Manifest, str]:
    """A round's manifest and its sha256.

    Raises:
        UserError: the round is not committed.
    """
    found = read_manifest(store, number)
    if found is None:
        raise UserError(f"{store.url}: round {number} is not committed; the newest is {last_round(store)}")
    return found


def describe_round(store: Store, number: int) -> dict[str, Any]:
    """A round's accounting: where the rows of the pool went, step by step, and what was chosen.

    Raises:
        UserError: the round is not committed.
    """
    manifest, sha256 = read_committed(store, number)
    return {
        "round": number,
        "manifest_sha256": sha256,
        "parent": manifest.parent,
        "expired": is_expired(store, number),
        "pool_rows": manifest.pool_rows,
        "skipped_shards": _skipped_shards(store, manifest),
        "steps": [tally.to_json() for tally in manifest.tallies],
        "sub_batches": manifest.sub_batches,
        "sub_batch_size": manifest.sub_batch_size,
        "chosen_by": chosen_by(manifest),
        "learnability": mean_of(manifest.learnability),
        "uniform_learnability": mean_of(manifest.uniform_learnability),
        "quality": manifest.quality,
        "files": [{"name": f.name, "size": f.size, "sub_batches": f.sub_batches} for f in manifest.files],
        "lineage": manifest.lineage,
    }


def chosen_by(manifest: Manifest) -> str:
    """Method and criterion of a round, what `auto` decided included."""
    selection = selection_of(manifest)
    return "uniform" if selection["method"] == "uniform" else f"{selection['method']} {selection['criterion']}"


def _skipped_shards(store: Store, manifest: Manifest) -> list[str]:
    """A line for each shard that was bad: by its footer, or, if the tally tells, by its pages."""
    pool = manifest.lineage.get("pool", {})
    lines = list(pool.get("skipped_shards", ()))
    if manifest.tallies[0].dropped.get(DAMAGED_SHARD):
        shards = load_pool(store, pool["fingerprint"]).shards
        lines += damage_of(store, shards, EncoderSpec(**manifest.lineage["reference"]).sha)
    return lines


def committed_rounds(store: Store) -> list[Manifest]:
    """Manifests of all committed rounds.

    Raises:
        UserError: there is none.
    """
    found = [read_manifest(store, number) for number in range(last_round(store) + 1)]
    manifests = [read[0] for read in found if read is not None]
    if not manifests:
        raise UserError(f"{store.url}: expected a committed round, found none; run: curate round RECIPE")
    return manifests


def _weighted_mean(values: list[tuple[float, int]]) -> float | None:
    return sum(value * weight for value, weight in values) / sum(weight for _, weight in values) if values else None


def mean_of(values: tuple[float | None, ...]) -> float | None:
    """Mean of those that are known."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
