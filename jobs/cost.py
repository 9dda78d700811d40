"""What the next round costs: what it has to do, times what a few batches took, and which resource is short."""

import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path

import loky
import torch

from curate.dedup.neighbours import BORDERS, ITERATIONS, cell_count, sample_share
from curate.errors import UserError
from curate.jobs.rates import Rates, measure
from curate.jobs.work import REFERENCE, Pass, Work, encoders_of, work_of
from curate.messages import counted
from curate.models.create import CONFIG_NAME
from curate.models.encoder import Encoder, load_encoder
from curate.models.spec import EncoderSpec
from curate.pipelines.cluster import free_of
from curate.pipelines.embed import loaders_of, workers_of
from curate.pipelines.neighbours import ROWS_PER_TASK
from curate.pipelines.write import GROUP_BYTES
from curate.pool.shards import Pool
from curate.recipe import Recipe, ResourcesSection
from curate.rounds.plan import foreseen_selection
from curate.storage import Store

ROUND_STARTS, ACTOR_STARTS = 2.4, 1.15
"""What a round waits for beside its work, in times of what this process took to import: once for the imports of its
driver, Ray and the first tasks, and each time that embedding actors start. Two cores, docs/performance.md."""
ROW_S = 28e-6
"""CPU time to index, cut and part a row, by `python -m benchmarks.scale --only epoch` (docs/scale.md)."""
INDEX_BYTES = 22
"""Of an entry: 21.1 of 4,000 rows."""
SELECTED_BYTES, SELECTED_FILE_BYTES = 34, 4000
"""Of a chosen row in a selected file, and of such a file beside: those of 8 rows had 4,265, of 256 rows 12,640."""


@dataclass(frozen=True, kw_only=True)
class Hands:
    """What a round has to work with."""

    workers: int
    gpus: int
    """0 if CPUs compute."""
    threads: int
    """Of each worker."""
    loaders: int
    """Decoding processes of each worker, instead of threads."""
    cores: int
    """That all workers share."""
    here: bool
    """Whether this machine is what they are of; else there is one worker, unless the recipe says how many."""

    @property
    def decoders(self) -> int:
        """Of each worker."""
        return self.loaders or self.threads

    @property
    def lanes(self) -> int:
        """Tasks that compute at a time."""
        return self.gpus or self.cores


@dataclass(frozen=True, kw_only=True)
class Supply:
    """How many pairs a second each resource of a worker lets through, by itself."""

    reading: float
    """Streams from the pool's store, one of each decoder."""
    decoding: float
    """All decoders."""
    device: float
    cores: float | None
    """Where decoders and models share them; None beside a GPU."""
    decoders: int

    @property
    def rate(self) -> float:
        """Pairs a second."""
        return min(self.reading, self.decoding, self.device, self.device if self.cores is None else self.cores)

    def short(self) -> str:
        """Which resource is short, and how far.

        >>> Supply(reading=9e5, decoding=4200, device=9000, cores=None, decoders=14).short()
        'decoding, 4,200 pairs/s by 14 loaders; the device embeds 9,000, which 16 more loaders each would feed'
        """
        device = f"the device embeds {self.device:,.0f}"
        if self.cores == self.rate:
            return (
                f"cores, {self.rate:,.0f} pairs/s; decoding alone does {self.decoding:,.0f}, and {device} if it has "
                "them to itself"
            )
        feed = ceil(self.decoders * self.device / self.decoding)
        word = "thread" if self.cores is not None else "loader"
        who = counted(self.decoders, word)
        if self.decoding == self.rate:
            more = counted(feed - self.decoders, f"more {word}")
            return f"decoding, {self.rate:,.0f} pairs/s by {who}; {device}, which {more} each would feed"
        if self.reading == self.rate:
            return f"the pool's store, {self.rate:,.0f} pairs/s to {who}; {device}"
        return f"the device, {self.rate:,.0f} pairs/s; {who} could decode {self.decoding:,.0f}"


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A line of the table."""

    name: str
    rows: int | None = None
    seconds: float
    units: int
    """GPUs that it keeps busy for so long, where there are any, else cores."""
    read_bytes: float = 0
    written_bytes: float = 0


def hands_of(resources: ResourcesSection) -> Hands:
    """What a round will have to work with, as far as can be known without joining a cluster.

    Raises:
        UserError: the recipe wants a GPU, and there is none here to measure on.
    """
    gpus = torch.cuda.device_count() if resources.device != "cpu" and torch.cuda.is_available() else 0
    if resources.device == "cuda" and not gpus:
        raise UserError("resources.device = 'cuda', and this machine has no GPU; run check on one that has")
    here = (os.environ.get("RAY_ADDRESS") or resources.address) == "local"
    cores = loky.cpu_count()
    workers = workers_of(resources, gpus, free_of(cores)) if here else resources.workers or 1
    loaders = loaders_of(resources, gpus, cores, gpus)
    if not here:
        cores = workers * max(loaders, resources.threads)
    return Hands(
        workers=workers,
        gpus=min(gpus, workers),
        threads=resources.threads,
        loaders=loaders,
        cores=cores,
        here=here,
    )


def supply_of(one: Pass, rates: Rates, hands: Hands) -> Supply:
    """What a worker gets through in one pass."""
    host_s = rates.decode_s[one.roles] + sum(rates.write_s[role] for role in one.roles)
    forward_s = sum(rates.forward_s[role] for role in one.roles)
    shared = hands.cores / hands.workers / (host_s + hands.threads * forward_s)
    return Supply(
        reading=hands.decoders / rates.read_s,
        decoding=hands.decoders / host_s,
        device=1 / forward_s,
        cores=None if hands.gpus else shared,
        decoders=hands.decoders,
    )


def stages_of(work: Work, rates: Rates, hands: Hands, *, imports_s: float) -> list[Stage]:
    """What is left to do, stage by stage."""
    start = imports_s * (ROUND_STARTS + ACTOR_STARTS * work.starts)
    found = [Stage(name="start", seconds=start, units=0 if hands.gpus else 1, written_bytes=work.new_bytes)]
    found += [_embedding(one, rates, hands) for one in work.passes if REFERENCE in one.roles]
    if n := work.dedup_rows:
        cells = cell_count(n)
        # Half of the products of a cell, and each row in half of the cells that it may border on; cells' training.
        products = n * n / cells * (1 + BORDERS / 2) / 2 if cells > 1 else n * n / 2
        products += cells * n * (1 + ITERATIONS * sample_share(n, cells)) if cells > 1 else 0
        lanes = min(hands.lanes, ceil(n / ROWS_PER_TASK))
        found.append(Stage(name="dedup", rows=n, seconds=products * rates.product_s / lanes, units=lanes))
    found += [_embedding(one, rates, hands) for one in work.passes if REFERENCE not in one.roles]
    lanes = min(hands.lanes, work.super_batches)
    rows_s = (work.index_entries + work.window_rows) * ROW_S / hands.cores
    found.append(
        Stage(
            name="select",
            rows=work.candidates,
            seconds=rows_s + rates.draw_s * ceil(work.super_batches / lanes),
            units=lanes,
            written_bytes=INDEX_BYTES * work.index_entries
            + SELECTED_BYTES * work.chosen
            + SELECTED_FILE_BYTES * work.super_batches,
        )
    )
    lanes = min(hands.cores, ceil(work.chosen_read_bytes / GROUP_BYTES) or 1)
    read_s = work.chosen_read_bytes / rates.row_bytes * rates.read_s
    found.append(
        Stage(
            name="write",
            rows=work.chosen,
            seconds=(read_s + work.chosen * rates.curated_s) / lanes,
            units=0 if hands.gpus else lanes,
            read_bytes=work.chosen_read_bytes,
            written_bytes=work.chosen * rates.curated_bytes,
        )
    )
    return found


def _embedding(one: Pass, rates: Rates, hands: Hands) -> Stage:
    workers = min(hands.workers, max(1, one.files))
    return Stage(
        name=f"embed {one.roles[0] if len(one.roles) == 1 else 'both'}",
        rows=one.rows,
        seconds=one.rows / supply_of(one, rates, hands).rate / workers,
        units=workers if hands.gpus else workers * hands.threads,
        read_bytes=one.read_bytes,
        written_bytes=sum(rates.files[role].of(one.rows, one.files) for role in one.roles),
    )


def described(
    work: Work, rates: Rates, hands: Hands, resources: ResourcesSection, *, imports_s: float
) -> Iterator[str]:
    """A table of 80 columns, and a line for each thing that it does not tell."""
    unit = "GPU-hours" if hands.gpus else "core-hours"
    stages = stages_of(work, rates, hands, imports_s=imports_s)
    yield (
        f"measured: {counted(rates.rows, 'row')} on this machine's {rates.device_type}, for "
        f"{counted(hands.workers, 'worker')}" + ("" if hands.here else "; the nodes of the cluster may be others")
    )
    yield _line("", "rows", "time", unit, "read of pool", "written")
    total = Stage(
        name="all",
        seconds=sum(stage.seconds for stage in stages),
        units=0,
        read_bytes=sum(stage.read_bytes for stage in stages),
        written_bytes=sum(stage.written_bytes for stage in stages),
    )
    for stage in [*stages, total]:
        hours = sum(one.seconds * one.units for one in (stages if stage is total else [stage])) / 3600
        yield _line(
            stage.name,
            "" if stage.rows is None else f"{stage.rows:,}",
            _time(stage.seconds),
            f"{hours:,.3f}" if hours < 10 else f"{hours:,.0f}",
            _size(stage.read_bytes),
            _size(stage.written_bytes),
        )
    yield "missing: embeddings " + ", ".join(
        f"by the {role} {work.missing(role):,} of {rows:,}" for role, rows in work.asked.items()
    )
    if resources.price_per_hour is not None:
        price = total.seconds / 3600 * hands.workers * resources.price_per_hour
        yield f"price: {price:,.2f}, at {resources.price_per_hour:g} for a worker and hour, the start included"
    if work.passes:
        longest = max(work.passes, key=lambda one: one.rows / supply_of(one, rates, hands).rate)
        yield f"short: {supply_of(longest, rates, hands).short()}"


def _line(name: str, *cells: str) -> str:
    return f"  {name:<20}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, (13, 9, 11, 14, 10), strict=True))


def _time(seconds: float) -> str:
    """Two digits, about.

    >>> _time(0.2), _time(90), _time(1800), _time(86400)
    ('0.2 s', '90 s', '30 min', '24 h')
    """
    for size, unit, most in ((1, "s", 120), (60, "min", 120), (3600, "h", 100)):
        if seconds < size * most:
            return f"{seconds / size:.1f} {unit}" if seconds < 10 * size else f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86400:.1f} d"


def _size(size: float) -> str:
    """Nothing, or bytes in the unit that suits.

    >>> _size(0), _size(1_500), _size(2e12)
    ('', '0.0 MB', '2.0 TB')
    """
    unit, name = next(
        (unit, name) for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")) if size >= unit or unit == 1e6
    )
    return f"{size / unit:,.1f} {name}" if size else ""


def _loaded(store: Store, scratch: Store, spec: EncoderSpec, device: torch.device) -> Encoder:
    held = store if store.exists(f"{spec.folder}/{CONFIG_NAME}") else scratch
    return load_encoder(held, spec, device)


def cost_of(
    store: Store,
    recipe: Recipe,
    pool: Pool,
    evaluation: Sequence[Pool],
    *,
    base: Path,
    number: int,
    usable: float,
    imports_s: float,
) -> Iterator[str]:
    """Measure a few batches, and say what the round will cost.

    Args:
        store: the root.
        recipe: sound, with a reference.
        pool: its inventory.
        evaluation: those of the sets that are kept out of it.
        base: the recipe's folder.
        number: of the round.
        usable: share of a sample of the pool that can be used.
        imports_s: that this process took to import what workers import.

    Raises:
        CurateError: nothing could be measured.
    """
    hands = hands_of(recipe.resources)
    device = torch.device("cuda", 0) if hands.gpus else torch.device("cpu")
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Store(folder)
        specs = encoders_of(
            store, scratch, recipe, base=base, number=number, device_type="cuda" if hands.gpus else "cpu"
        )
        work = work_of(store, scratch, recipe, pool, evaluation, specs, usable=usable)
        torch.set_num_threads(recipe.resources.threads)
        try:
            rates = measure(
                pool,
                {role: _loaded(store, scratch, specs[role], device) for role in specs if work.missing(role)},
                [one.roles for one in work.passes],
                {role: spec.embed_dim for role, spec in specs.items()},
                recipe.embed,
                foreseen_selection(store, recipe),
                scratch,
                device=device,
                seed=recipe.seed,
                dedup=work.dedup_rows > 0,
            )
        finally:
            torch.set_num_threads(threads)
    yield from described(work, rates, hands, recipe.resources, imports_s=imports_s)
