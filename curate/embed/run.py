"""What embeds shards: a loader that decodes, one thread that runs the models, and whoever asks, who writes the files.

    embed(shard)   cuts it into slices ──► Loader (threads or processes): reads, hashes, decodes, crops, tokenises
         ▲                                    │ pieces, of several shards by turns
         │ parts, complete and in order       ▼
    writes and uploads ◄──────────────── the thread of the models: copies, runs both towers, collects on the device

Several threads may ask at a time: while one waits for the last parts of its shard and uploads, the loader is at the
next one's, so that nothing stands still between shards.
"""

import itertools
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from curate.embed.loader import Inline, Loader, Processes, Threads, processes_that_fit
from curate.embed.pieces import Decode, Piece, Reading, Rows, Slice, columns_read, cut_slices
from curate.embed.shard import Job, write_files
from curate.errors import ShardDamagedError
from curate.pool.shards import Shard, read_batches, row_groups
from curate.recipe import EmbedSection
from curate.storage import Store

if TYPE_CHECKING:
    from curate.models.encoder import Encoder

AHEAD = 2
"""Finished pieces of each decoding process that wait."""


def reading_for(encoders: "Mapping[str, Encoder]") -> Reading:
    """How rows are read for some encoders: one crop for all that see the same pixels, and so with words."""
    return Reading(
        views={name: encoder.view for name, encoder in encoders.items()},
        crops={encoder.view: encoder.crop for encoder in encoders.values()},
        wordings={name: encoder.wording for name, encoder in encoders.items()},
        tokenizers={encoder.wording: encoder.tokenize for encoder in encoders.values()},
    )


class Embedder:
    """Embeds shards with some encoders, for as long as it is not closed.

    Args:
        encoders: by any name.
        settings: sizes.
        threads: of this process that decode; 0 if the one that runs the models does.
        loaders: processes that decode instead; as many of them as shared memory has room for.
        decode: decodes rows in those threads; watched if None.
        preload: modules that the decoding processes will have to import.
        loader: what decodes, made by `reading_for` the same encoders; made as the rest says if None.
    """

    def __init__(
        self,
        encoders: "Mapping[str, Encoder]",
        settings: EmbedSection,
        *,
        threads: int = 1,
        loaders: int = 0,
        decode: Decode | None = None,
        preload: tuple[str, ...] = (),
        loader: Loader | None = None,
    ) -> None:
        self._encoders = encoders
        self._settings = settings
        self._piece_rows = min(settings.batch_size, settings.chunk_rows)
        self._jobs: dict[int, Job] = {}
        self._numbers = itertools.count()
        self._broken: BaseException | None = None
        self._lock = threading.Lock()
        self._wanted_since = 0.0
        """When somebody asked for a shard while nobody else did."""
        self._worked_s = self._waited_s = 0.0
        self._loader = loader or self._make_loader(threads, loaders, decode, preload)
        self._thread = threading.Thread(target=self._run, daemon=True, name="embed_run")
        self._thread.start()

    def _make_loader(self, threads: int, loaders: int, decode: Decode | None, preload: tuple[str, ...]) -> Loader:
        reading = reading_for(self._encoders)
        sizes = {encoder.view: encoder.image_size for encoder in self._encoders.values()}
        piece_bytes = self._piece_rows * sum(3 * height * width for height, width in sizes.values())
        if processes := processes_that_fit(loaders, piece_bytes, ahead=AHEAD):
            pin = any(encoder.device.type == "cuda" for encoder in self._encoders.values())
            return Processes(
                reading,
                processes=processes,
                piece_bytes=piece_bytes,
                ahead=AHEAD,
                pin=pin,
                preload=preload,
            )
        if not threads and not loaders:
            return Inline(reading, piece_bytes=piece_bytes, decode=decode)
        ahead = max(1, self._settings.chunk_rows // self._piece_rows)
        # Where shared memory has no room for processes' pieces, threads decode on their cores.
        return Threads(
            reading,
            piece_bytes=piece_bytes,
            threads=max(threads, loaders),
            ahead=ahead,
            decode=decode,
        )

    def embed(
        self, shard: Shard, names: Mapping[str, str], store: Store, *, rows: Rows | None = None
    ) -> dict[str, int]:
        """Write the embedding files of one shard; several threads may call it at a time.

        Args:
            shard: of the pool.
            names: within the root, of the files to write, by encoder.
            store: the root.
            rows: numbers of the rows that are wanted, ascending; the files hold these alone. All if None.

        Returns:
            Rows by status; the same for every encoder but for rows whose embedding is unusable, which are counted once.

        Raises:
            InputChangedError: if the shard is not the file that was inventoried.
            ShardDamagedError: if a page of it cannot be read; nothing is written then.
        """
        sizes = row_groups(shard)
        cuts = cut_slices(sizes, rows, piece_rows=self._piece_rows, slice_rows=self._settings.chunk_rows)
        job = Job(
            names=names,
            pieces=-(-(cuts[-1][1] if cuts else 0) // self._piece_rows),
            piece_rows=self._piece_rows,
            part_pieces=-(-self._settings.chunk_rows // self._piece_rows),
        )
        number = next(self._numbers)
        with self._lock:
            if self._broken is not None:
                raise self._broken
            if not self._jobs:
                self._wanted_since = time.perf_counter()
            self._jobs[number] = job
        try:
            for start, stop in cuts:
                wanted = None if rows is None else rows[start:stop]
                self._loader.submit(
                    Slice(
                        job=number,
                        shard=shard,
                        start=start,
                        stop=stop,
                        rows=wanted,
                        piece_rows=self._piece_rows,
                        encoders=tuple(names),
                    )
                )
            return write_files(store, job, self._encoders, some=rows is not None)
        except ShardDamagedError:
            # Which of its slices met the damage first is chance; read from the start it is told in the same words.
            for _ in read_batches(shard, columns_read(shard), batch_rows=self._settings.chunk_rows):
                pass
            raise
        finally:
            with self._lock:
                del self._jobs[number]

    def spent(self) -> tuple[float, float]:
        """Seconds that the models were at work, and that they waited for pieces though somebody wanted a shard.

        Both since this was called before. A GPU's queue is full where it is at work, so that their thread waits for
        it there. Where that thread decodes as well, it does so in what counts as a wait.
        """
        with self._lock:
            found = self._worked_s, self._waited_s
            self._worked_s = self._waited_s = 0.0
        return found

    def close(self) -> None:
        """End the loader and the thread."""
        self._loader.close()
        self._thread.join()

    def _run(self) -> None:
        """The thread of the models."""
        try:
            done = time.perf_counter()
            while (found := self._loader.next()) is not None:
                begun = time.perf_counter()
                with self._lock:
                    job = self._jobs.get(found.job)
                    self._waited_s += max(0.0, begun - max(done, self._wanted_since))
                if isinstance(found, Piece):
                    if job is not None:  # it may have failed meanwhile
                        self._step(job, found)
                    found.let_go()
                elif job is not None:
                    job.done.put(found.error)
                done = time.perf_counter()
                with self._lock:
                    self._worked_s += done - begun
        except BaseException as error:
            with self._lock:
                self._broken = error
                for job in self._jobs.values():
                    job.done.put(error)

    @torch.inference_mode()
    def _step(self, job: Job, piece: Piece) -> None:
        z = {}
        for name in job.names if piece.ok else ():
            encoder = self._encoders[name]
            z[name] = encoder.encode(piece.pixels[encoder.view], piece.texts[encoder.wording], piece.of)
        job.add(replace(piece, pixels={}, texts={}, room=None), z)


def embed_shard(
    shard: Shard,
    encoders: "Mapping[str, Encoder]",
    store: Store,
    settings: EmbedSection,
    *,
    threads: int = 1,
    loaders: int = 0,
    rows: Rows | None = None,
    decode: Decode | None = None,
) -> dict[str, int]:
    """Write the embedding files of one shard: `Embedder.embed` by one that lives as long.

    Args:
        shard: of the pool.
        encoders: by the name, within the root, of the file to write.
        store: the root.
        settings: sizes.
        threads: as `Embedder`.
        loaders: likewise.
        rows: as `Embedder.embed`.
        decode: as `Embedder`.

    Returns:
        As `Embedder.embed`.

    Raises:
        InputChangedError, ShardDamagedError: as `Embedder.embed`.
    """
    embedder = Embedder(encoders, settings, threads=threads, loaders=loaders, decode=decode)
    try:
        return embedder.embed(shard, {name: name for name in encoders}, store, rows=rows)
    finally:
        embedder.close()
