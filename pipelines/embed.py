"""Embed, scaled out: Ray Data over the inventory's shards, actors that hold the models, one file per encoder and shard.

Ray Data is handed shards, not files to read: its own reader skips empty files silently, and its checkpoints score
dropped rows again. Here what remains to do is the set of shards whose file is missing.
"""

import gc
import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import loky
import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray.data import ActorPoolStrategy, DataContext
from ray.data.exceptions import ExecutionTimeoutError

from curate.embed.files import embedding_name
from curate.errors import ClusterError, CurateError, ShardDamagedError, UserError
from curate.messages import counted
from curate.models.spec import WEIGHTS_NAME, EncoderSpec
from curate.pipelines import progress
from curate.pipelines.cluster import (
    CPU_SHARE,
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
from curate.pipelines.wanted import Wanted
from curate.pool.columns import Columns
from curate.pool.shards import Pool, Shard
from curate.recipe import BadShardPolicy, EmbedSection, ResourcesSection
from curate.storage import Store

# A shard is one task. A slow CPU may spend hours on one, so Ray's guard of 30 minutes would stop healthy work.
NO_PROGRESS_S = 6 * 3600
MOST_BLOCKS = 1000
ACTOR_BYTES = 3 * 2**29
"""What an actor holds beside its weights: `import open_clip` alone leaves a process at 1.3 GB."""
LOADER_BYTES = 2**29
"""What a decoding process of an actor holds that it does not share with the others: pieces, and a row group."""
SHARDS_AT_ONCE = 2, 32
"""That an actor is given: two at least, for while it waits for the last rows of one and uploads, it is at the next; and
no more than this, each of which takes a thread."""
WAITED = "GPUs waited for pictures"
"""Of the time in which there was something to embed, what they had none for: a fact that progress tells."""
SLICES_EACH = 2
"""For each who decodes: one to decode, and one to read meanwhile."""


def missing_shards(store: Store, shards: Sequence[Shard], spec: EncoderSpec, scope: str = "") -> set[int]:
    """Indices of those of some shards that lack an embedding file by this encoder, found by listing.

    For a reference the listing names every shard of the pool: a file that was lost is to be made again.
    """
    if not shards:
        return set()
    folder = embedding_name(spec.sha, shards[0], scope).rpartition("/")[0]
    there = set(store.list(folder))
    return {shard.index for shard in shards if embedding_name(spec.sha, shard, scope) not in there}


def embed_pool(
    store: Store,
    pool: Pool,
    encoders: Sequence[EncoderSpec],
    settings: EmbedSection,
    resources: ResourcesSection,
    devices: Devices,
) -> None:
    """Write every embedding file of a pool that is missing; a pair that several encoders want is decoded once.

    Args:
        store: the root.
        pool: the inventory.
        encoders: whose files are wanted.
        settings: sizes.
        resources: number of actors and their threads.
        devices: what the actors compute on.

    Raises:
        UserError: a worker asks for more CPUs or memory than any node has; or, one line each, the shards that are
            damaged, unless the pool's policy is to skip them.
        InputChangedError: a shard is not the file that was inventoried.
    """
    missing = {spec.sha: missing_shards(store, pool.shards, spec) for spec in encoders}
    items = []
    for shard in pool.shards:
        if asked := [spec.sha for spec in encoders if shard.index in missing[spec.sha]]:
            items.append({"shard": asdict(shard), "encoders": asked, "wanted": None, "rows": shard.rows})
    _embed(store, items, encoders, (), settings, resources, devices, pool.on_bad_shard)


def embed_some(
    store: Store,
    pool: Pool,
    encoder: EncoderSpec,
    wanted: Sequence[Wanted],
    settings: EmbedSection,
    resources: ResourcesSection,
    devices: Devices,
) -> None:
    """Write an encoder's embeddings of some rows of some shards, where they are missing: as `embed_pool`."""
    items = [
        {"shard": asdict(pool.shards[i]), "encoders": [encoder.sha], "wanted": number, "rows": some.expected(i)}
        for number, some in enumerate(wanted)
        for i in sorted(missing_shards(store, [pool.shards[i] for i in some.shards], encoder, some.scope))
    ]
    # A shard that can be read no more was sound when the reference read it, so that no policy says to skip it.
    _embed(store, items, [encoder], wanted, settings, resources, devices, "fail")


def _embed(
    store: Store,
    items: Sequence[dict[str, Any]],
    encoders: Sequence[EncoderSpec],
    wanted: Sequence[Wanted],
    settings: EmbedSection,
    resources: ResourcesSection,
    devices: Devices,
    on_bad_shard: BadShardPolicy,
) -> None:
    if not items:
        return
    # Twice: while a model is loaded it is there, and its checkpoint as well.
    memory = ACTOR_BYTES + 2 * sum(store.size(f"{spec.folder}/{WEIGHTS_NAME}") or 0 for spec in encoders)
    loaders = loaders_of(resources, devices.gpus, largest_node("CPU"), largest_node("GPU"))
    memory += LOADER_BYTES * loaders
    workers = min(_workers(resources, devices, memory), len(items))
    _require_croppers(resources, devices, workers)
    # Where each actor has a core and there are no more, threads would only take turns.
    threads = resources.threads if devices.gpus or resources.threads > 1 or workers < free_cpus() else 0
    decoders = loaders or resources.crop_actors or resources.threads
    at_once = shards_at_once([item["rows"] for item in items], decoders, settings.chunk_rows)
    context = DataContext.get_current()
    context.enable_progress_bars = False  # ours counts rows
    context.execution_no_progress_timeout_s = NO_PROGRESS_S
    blocks = ray.data.from_items(items, override_num_blocks=min(len(items), MOST_BLOCKS))
    with warnings.catch_warnings():
        # Limits on restarts are "deprecated, use the named parameters", and have none: hence ray < 2.64.
        warnings.filterwarnings("ignore", message="`ray_remote_args`")
        receipts = blocks.map_batches(
            EmbedShards,
            fn_constructor_args=(store, list(encoders), list(wanted), settings, resources, on_bad_shard, threads),
            batch_size=1,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(
                size=workers,
                max_tasks_in_flight_per_actor=at_once,
                max_concurrent_calls_per_actor=at_once,
                enable_true_multi_threading=True,
            ),
            num_cpus=None if devices.gpus else CPU_SHARE * resources.threads,
            num_gpus=1 if devices.gpus else None,
            memory=memory,
            **RETRIES,
        )
    names = " and ".join(_short(spec.source) for spec in encoders)
    rows = sum(item["rows"] for item in items)
    damaged: list[str] = []
    spent = np.zeros(2)
    with progress.bar(f"embed with {names}", rows) as bar, own_errors():
        try:
            for receipt in receipts.iter_rows():
                bar.add(**json.loads(receipt["dropped"]))
                spent += receipt["spent_s"]
                if devices.gpus and spent.any():  # on a CPU the models have to leave it to those who decode
                    bar.tell(**{WAITED: f"{spent[1] / spent.sum():.0%}"})
                bar.update(receipt["rows"])
                if receipt["damage"]:
                    damaged.append(receipt["damage"])
        except ExecutionTimeoutError:
            raise ClusterError(
                f"embed: no worker finished a shard for {NO_PROGRESS_S // 3600} hours; see with `ray status` whether "
                "they have the CPUs or GPUs that they wait for, and run the same command again: what is done stays"
            ) from None
    if damaged and on_bad_shard == "fail":
        raise UserError(*sorted(damaged))


def shards_at_once(rows: Sequence[int], decoders: int, slice_rows: int) -> int:
    """Shards that an actor is given at a time, so that all who decode for it have something to decode.

    Where each shard was one slice, and 14 processes waited a millisecond a row in place of decoding, four shards at a
    time gave 2,545 rows a second, and 28 gave 6,337, for which the two cores were busy (`benchmarks/embed.py`).

    >>> shards_at_once([10_000] * 50, decoders=14, slice_rows=1024)
    4
    >>> shards_at_once([300] * 50, decoders=14, slice_rows=1024)
    28

    Args:
        rows: that are wanted of each shard.
        decoders: threads, processes or actors.
        slice_rows: that one of them is given at a time, if a shard has as many.
    """
    slices = max(1, int(np.median(rows)) // slice_rows)
    least, most = SHARDS_AT_ONCE
    return min(most, max(least, -(-SLICES_EACH * decoders // slices)))


def _short(source: str) -> str:
    """Where a model comes from, without the folders of a path."""
    return source.rpartition("/")[2] if source.startswith(("/", "local-dir:")) else source


def _workers(resources: ResourcesSection, devices: Devices, memory: int) -> int:
    """How many actors of so many bytes: as many as the recipe says, if all of them can live at once.

    Raises:
        UserError: not even one can.
    """
    require_memory(memory, "embed")
    if devices.gpus:
        return min(workers_of(resources, devices.gpus, 0), places_for(memory))
    needed, largest = CPU_SHARE * resources.threads, largest_node("CPU")
    if needed > largest:
        raise UserError(
            f"resources.threads = {resources.threads}: a worker would need {needed:.1f} CPUs, the largest node has "
            f"{largest:g}; lower it"
        )
    return min(workers_of(resources, 0, free_cpus()), places_for(memory))


def workers_of(resources: ResourcesSection, gpus: int, free: int) -> int:
    """Actors on so many GPUs, or else on so many free CPUs, as far as memory has room for them."""
    if gpus:
        return min(resources.workers or gpus, gpus)
    return resources.workers or max(1, free // resources.threads)


def _require_croppers(resources: ResourcesSection, devices: Devices, workers: int) -> None:
    """Refuse what would wait for ever.

    Raises:
        UserError: the cluster lacks the CPUs for all actors that decode, beside those that embed.
    """
    if not resources.crop_actors:
        return
    needed = workers * CPU_SHARE * (resources.crop_actors + (0 if devices.gpus else resources.threads))
    if needed > (there := float(ray.cluster_resources().get("CPU", 0))):
        raise UserError(
            f"resources.crop_actors = {resources.crop_actors}: with {counted(workers, 'worker')} this needs "
            f"{needed:.1f} CPUs, the cluster has {there:g}; lower it, or add nodes"
        )


def loaders_of(resources: ResourcesSection, gpus: int, cores: float, gpus_of_node: float) -> int:
    """Decoding processes of an actor, whose node has so many cores."""
    if resources.loaders is not None or resources.crop_actors:
        return resources.loaders or 0
    return max(1, int(cores / max(1, gpus_of_node)) - 2) if gpus else 0


class EmbedShards:
    """The actor: holds the encoders, embeds the shards that it is given; several threads may call it at a time.

    It imports what it computes with: the driver needs neither torch and open_clip nor the seconds that they take.
    """

    def __init__(
        self,
        store: Store,
        encoders: Sequence[EncoderSpec],
        wanted: Sequence[Wanted],
        settings: EmbedSection,
        resources: ResourcesSection,
        on_bad_shard: BadShardPolicy,
        threads: int,
    ) -> None:
        logging.getLogger().setLevel(logging.ERROR)  # open_clip narrates every load on the root logger
        self.store = store
        self.wanted = wanted
        self.on_bad_shard = on_bad_shard
        self.failure: CurateError | None = None
        gc.disable()  # what is imported stays: to look through it for garbage takes a quarter of the time
        try:
            self._load(encoders, settings, resources, threads)
        except CurateError as error:
            self.failure = error  # raised here it would be lost: Ray tells of a constructor its traceback alone
        finally:
            gc.enable()

    def _load(
        self, encoders: Sequence[EncoderSpec], settings: EmbedSection, resources: ResourcesSection, threads: int
    ) -> None:
        from curate.embed.loader import start_server  # noqa: PLC0415

        where = device()
        gpu = where.type == "cuda"
        if loaders := loaders_of(resources, int(gpu), loky.cpu_count(), _gpus_here() if gpu else 0):
            start_server(["ray"])  # imports what they need while this process loads its models
        import torch  # noqa: PLC0415

        from curate.embed.decode import Apart  # noqa: PLC0415
        from curate.embed.run import Embedder, reading_for  # noqa: PLC0415
        from curate.models.encoder import load_encoder  # noqa: PLC0415

        torch.set_num_threads(resources.threads)
        compile_for = settings.batch_size if settings.compile and gpu else None
        self.encoders = {spec.sha: load_encoder(self.store, spec, where, compile_for=compile_for) for spec in encoders}
        reading, loader = reading_for(self.encoders), None
        if resources.crop_actors:
            from curate.pipelines.crops import Croppers  # noqa: PLC0415

            loader = Croppers(reading, resources.crop_actors, pin=gpu)
        self.embedder = Embedder(
            self.encoders,
            settings,
            threads=threads,
            loaders=loaders,
            # Ray starts an actor again that died, and gives it the shards that it died of.
            decode=Apart(reading.crops) if restarted() else None,
            preload=("ray",),
            loader=loader,
        )

    def __call__(self, batch: pa.Table) -> Iterator[dict[str, Any]]:
        """Embed the shards of a batch; yields one receipt per shard."""
        if self.failure is not None:
            raise self.failure
        for item in batch.to_pylist():
            shard = Shard(**item["shard"] | {"columns": Columns.from_json(item["shard"]["columns"])})
            some = None if item["wanted"] is None else self.wanted[item["wanted"]]
            scope = some.scope if some else ""
            # A block holds many shards of a large pool, and Ray gives all of them again to the actor that takes over
            # from one that died.
            names = {
                sha: name
                for sha in item["encoders"]
                if not self.store.exists(name := embedding_name(sha, shard, scope))
            }
            damage = ""
            counts: dict[str, int] = {}
            try:
                if names:
                    rows = some.rows(self.store, shard) if some else None
                    counts = self.embedder.embed(shard, names, self.store, rows=rows)
            except ShardDamagedError as error:
                # Not raised: all other shards are read, so that all that are damaged are told together.
                damage = str(error)
                if self.on_bad_shard == "skip":
                    from curate.embed.shard import embed_damaged  # noqa: PLC0415

                    encoders = {name: self.encoders[sha] for sha, name in names.items()}
                    counts = embed_damaged(shard, encoders, self.store, error)
            dropped = {status: rows for status, rows in counts.items() if status != "ok"}
            # As text: Arrow would make of these one struct with a field for each reason that some shard has.
            yield {
                "rows": [item["rows"]],
                "dropped": [json.dumps(dropped)],
                "damage": [damage],
                "spent_s": [self.embedder.spent()],
            }


def _gpus_here() -> float:
    """GPUs of this node, among which its cores are shared."""
    here = ray.get_runtime_context().get_node_id()
    return max(float(node["Resources"].get("GPU", 0)) for node in ray.nodes() if node["NodeID"] == here)
