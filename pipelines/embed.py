"""Embed, scaled out: Ray Data over the inventory's shards, actors that hold the models, one file per encoder and shard.

Ray Data is handed shards, not files to read: its own reader skips empty files silently, and its checkpoints score
dropped rows again. Here what remains to do is the set of shards whose file is missing.
"""

import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray
import ray.data
import torch
from ray.data import ActorPoolStrategy, DataContext
from ray.data.exceptions import ExecutionTimeoutError
from tqdm import tqdm

from curate.decode import Apart, Watched
from curate.dedup import kept_rows
from curate.embed import Wanted, crops_of, embed_damaged, embed_shard
from curate.embeddings import NOT_SCORED, contents, embedding_name, read_embeddings
from curate.errors import ClusterError, CurateError, ShardDamagedError, UserError
from curate.pool import Columns, Pool, Shard
from curate.recipe import BadShardPolicy, EmbedSection, ResourcesSection
from curate.spec import WEIGHTS_NAME, EncoderSpec
from curate.storage import Store
from pipelines.cluster import (
    RETRIES,
    Devices,
    device,
    free_cpus,
    largest_node,
    own_errors,
    places_for,
    require_memory,
    restarted,
)
from pipelines.keys import KeyRange, Sample

# A shard is one task. A slow CPU may spend hours on one, so Ray's guard of 30 minutes would stop healthy work.
NO_PROGRESS_S = 6 * 3600
MOST_BLOCKS = 1000
# Below one per thread, so that the tasks which feed the actors find a CPU (ray#44687).
CPU_SHARE = 0.9
ACTOR_BYTES = 3 * 2**29
"""What an actor holds beside its weights: `import open_clip` alone leaves a process at 1.3 GB."""


def missing_shards(store: Store, pool: Pool, spec: EncoderSpec, scope: str = "") -> set[int]:
    """Indices of the shards that lack an embedding file by this encoder, found by listing."""
    folder = embedding_name(spec.sha, pool.shards[0], scope).rpartition("/")[0]
    there = set(store.list(folder))
    return {shard.index for shard in pool.shards if embedding_name(spec.sha, shard, scope) not in there}


def embed_pool(
    store: Store,
    pool: Pool,
    encoders: Sequence[EncoderSpec],
    settings: EmbedSection,
    resources: ResourcesSection,
    devices: Devices,
    *,
    key_range: KeyRange | None = None,
    sample: Sample | None = None,
    reference: EncoderSpec | None = None,
) -> None:
    """Write every embedding file that is missing; a pair that several encoders want is decoded once.

    Args:
        store: the root.
        pool: the inventory.
        encoders: whose files are wanted.
        settings: sizes.
        resources: number of actors and their threads.
        devices: what the actors compute on.
        key_range: score only these rows, into files of their own.
        sample: and these, with a `key_range`.
        reference: whose files a deduplication went by, if the `key_range` leaves out what it dropped.

    Raises:
        UserError: a worker asks for more CPUs or memory than any node has; or, one line each, the shards that are
            damaged, unless the pool's policy is to skip them.
        InputChangedError: a shard is not the file that was inventoried.
    """
    scope = key_range.scope if key_range else ""
    missing = {spec.sha: missing_shards(store, pool, spec, scope) for spec in encoders}
    todo = [shard for shard in pool.shards if any(shard.index in left for left in missing.values())]
    if not todo:
        return
    items = [
        {"shard": asdict(shard), "encoders": [spec.sha for spec in encoders if shard.index in missing[spec.sha]]}
        for shard in todo
    ]
    # Twice: while a model is loaded it is there, and its checkpoint as well.
    memory = ACTOR_BYTES + 2 * sum(store.size(f"{spec.folder}/{WEIGHTS_NAME}") or 0 for spec in encoders)
    workers = min(_workers(resources, devices, memory), len(todo))
    context = DataContext.get_current()
    context.enable_progress_bars = False  # ours counts rows
    context.execution_no_progress_timeout_s = NO_PROGRESS_S
    blocks = ray.data.from_items(items, override_num_blocks=min(len(items), MOST_BLOCKS))
    with warnings.catch_warnings():
        # Limits on restarts are "deprecated, use the named parameters", and have none: hence ray < 2.64.
        warnings.filterwarnings("ignore", message="`ray_remote_args`")
        receipts = blocks.map_batches(
            EmbedShards,
            fn_constructor_args=(
                store,
                list(encoders),
                settings,
                resources.threads,
                key_range,
                sample,
                reference,
                pool.on_bad_shard,
            ),
            batch_size=1,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(size=workers),
            num_cpus=None if devices.gpus else CPU_SHARE * resources.threads,
            num_gpus=1 if devices.gpus else None,
            memory=memory,
            **RETRIES,
        )
    names = " and ".join(spec.source for spec in encoders)
    rows = sum(shard.rows for shard in todo)
    damaged: list[str] = []
    with tqdm(total=rows, desc=f"embed with {names}", unit="row", disable=None) as bar, own_errors():
        dropped = 0
        try:
            for receipt in receipts.iter_rows():
                dropped += receipt["dropped"]
                bar.set_postfix(dropped=dropped, refresh=False)
                bar.update(receipt["rows"])
                if receipt["damage"]:
                    damaged.append(receipt["damage"])
        except ExecutionTimeoutError:
            raise ClusterError(
                f"embed: no worker finished a shard for {NO_PROGRESS_S // 3600} hours; see with `ray status` whether "
                "they have the CPUs or GPUs that they wait for, and run the same command again: what is done stays"
            ) from None
    if damaged and pool.on_bad_shard == "fail":
        raise UserError(*sorted(damaged))


def _workers(resources: ResourcesSection, devices: Devices, memory: int) -> int:
    """How many actors of so many bytes: as many as the recipe says, if all of them can live at once.

    Raises:
        UserError: not even one can.
    """
    require_memory(memory, "embed")
    if devices.gpus:
        return min(resources.workers or devices.gpus, devices.gpus, places_for(memory))
    needed, largest = CPU_SHARE * resources.threads, largest_node("CPU")
    if needed > largest:
        raise UserError(
            f"resources.threads = {resources.threads}: a worker would need {needed:.1f} CPUs, the largest node has "
            f"{largest:g}; lower it"
        )
    return min(resources.workers or max(1, free_cpus() // resources.threads), places_for(memory))


class EmbedShards:
    """The actor: holds the encoders, embeds the shards that it is given one at a time."""

    def __init__(
        self,
        store: Store,
        encoders: Sequence[EncoderSpec],
        settings: EmbedSection,
        threads: int,
        key_range: KeyRange | None,
        sample: Sample | None,
        reference: EncoderSpec | None,
        on_bad_shard: BadShardPolicy,
    ) -> None:
        logging.getLogger().setLevel(logging.ERROR)  # open_clip narrates every load on the root logger
        torch.set_num_threads(threads)
        self.store = store
        self.settings = settings
        self.threads = threads
        self.scope = key_range.scope if key_range else ""
        self.key_range = key_range
        self.sample = sample
        self.reference = reference
        self.on_bad_shard = on_bad_shard
        self.failure: CurateError | None = None
        try:
            self._load(encoders)
        except CurateError as error:
            self.failure = error  # raised here it would be lost: Ray tells of a constructor its traceback alone

    def _load(self, encoders: Sequence[EncoderSpec]) -> None:
        # Here, because the driver of a round needs neither a model nor the seconds that importing open_clip takes.
        from curate.encoder import load_encoder  # noqa: PLC0415

        self.encoders = {spec.sha: load_encoder(self.store, spec, device()) for spec in encoders}
        # Ray starts an actor again that died, and gives it the shards that it died of.
        self.decode = (Apart if restarted() else Watched)(crops_of(self.encoders.values()))

    def __call__(self, batch: pa.Table) -> Iterator[dict[str, Any]]:
        """Embed the shards of a batch; yields one receipt per shard."""
        if self.failure is not None:
            raise self.failure
        for item in batch.to_pylist():
            shard = Shard(**item["shard"] | {"columns": Columns(**item["shard"]["columns"])})
            names = {sha: embedding_name(sha, shard, self.scope) for sha in item["encoders"]}
            # A block holds many shards of a large pool, and Ray gives all of them again to the actor that takes over
            # from one that died.
            encoders = {name: self.encoders[sha] for sha, name in names.items() if not self.store.exists(name)}
            if not encoders:
                yield {"rows": [shard.rows], "dropped": [0], "damage": [""]}
                continue
            damage = ""
            try:
                counts = embed_shard(
                    shard,
                    encoders,
                    self.store,
                    self.settings,
                    threads=self.threads,
                    wanted=self._wanted(shard),
                    decode=self.decode,
                )
            except ShardDamagedError as error:
                # Not raised: all other shards are read, so that all that are damaged are told together.
                damage, counts = str(error), {}
                if self.on_bad_shard == "skip":
                    counts = embed_damaged(shard, encoders, self.store, error)
            dropped = sum(rows for status, rows in counts.items() if status not in ("ok", NOT_SCORED))
            yield {"rows": [shard.rows], "dropped": [dropped], "damage": [damage]}

    def _wanted(self, shard: Shard) -> Wanted | None:
        """Which rows of a shard to score; all if None."""
        key_range, sample = self.key_range, self.sample
        if key_range is None:
            return None
        ranges = [key_range] if sample is None or shard.index not in sample.shards else [key_range, sample.keys]
        dropped = self._dropped(shard, key_range.dedup)

        def wanted(content: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
            inside = np.logical_or.reduce([keys.wanted(content) for keys in ranges])
            return np.asarray(inside & ~np.isin(content[:, 0], dropped))

        return wanted

    def _dropped(self, shard: Shard, dedup: str | None) -> npt.NDArray[np.uint64]:
        """Contents, their first halves, of which no row of the shard was left by a deduplication."""
        if dedup is None:
            return np.empty(0, np.uint64)
        assert self.reference is not None, dedup
        table = read_embeddings(self.store, embedding_name(self.reference.sha, shard), ["content"])
        content = contents(table["content"])[:, 0]
        left = kept_rows(self.store, dedup, shard, np.arange(len(content)))
        return np.setdiff1d(content, content[left])
