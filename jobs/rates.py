"""What a few of the user's own pairs take on this machine, by the very pieces that a round is made of.

Nothing is written but to a scratch folder. Seconds are of the clock, bytes those of files.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch.nn.functional import normalize

from curate.dedup.neighbours import Threshold, near_pairs
from curate.embed.decode import Decoded, Row, decode_row
from curate.embed.files import content_hash, halves
from curate.embed.pieces import Piece, Raw, Slice
from curate.embed.run import reading_for
from curate.embed.shard import Job, write_files
from curate.errors import UserError
from curate.messages import counted
from curate.models.encoder import Encoder
from curate.pool.columns import Columns
from curate.pool.shards import Pool, caption_bytes, image_bytes, row_groups
from curate.recipe import EmbedSection, SelectionSection
from curate.rounds.write import chosen_rows, curated_schema, write_curated
from curate.seeds import derive_seed
from curate.select.draw import Candidates, Scale, select_sub_batch
from curate.select.files import SELECTED_SCHEMA
from curate.select.windows import ROW
from curate.storage import Store

ROWS = 256
SPOTS = 4
"""Row groups, drawn at random, from the beginning of which so many rows come."""
FIRST_PAIRS = 16
BUDGET_S = 5.0
"""For the batches of one model, and for one set of models to be decoded for."""
STEADY_S = 0.5
"""Batches that take less are repeated for so long."""
LEAST_S = 1e-6
"""What cannot be told from nothing."""
DRAWN = {"cpu": 4096, "cuda": 163_840}
"""Candidates of a super-batch on which a draw is timed, at most."""
COMPARED = {"cpu": 4096, "cuda": 65_536}
"""Rows that are compared with each other."""


@dataclass(frozen=True, kw_only=True)
class FileBytes:
    """How large embedding files of one model are."""

    row: float
    group: float
    """Of a row group beside its rows."""
    chunk_rows: int
    """Of a row group."""

    def of(self, rows: int, files: int) -> int:
        """Of so many rows in so many files that are alike."""
        groups = files * -(-rows // max(1, files) // self.chunk_rows) if files else 0
        return round(self.row * rows + self.group * groups)


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What was measured; seconds of one row, unless they say otherwise."""

    rows: int
    """That were read."""
    device_type: str
    read_s: float
    """One stream from the store of the pool."""
    row_bytes: float
    """Of the pool, all columns."""
    decode_s: Mapping[tuple[str, ...], float]
    """To hash, decode, crop and tokenise on one core, by the roles that it is done for."""
    forward_s: Mapping[str, float]
    """Both towers on the device, by role."""
    write_s: Mapping[str, float]
    """Into an embedding file, by role."""
    files: Mapping[str, FileBytes]
    """By role."""
    curated_s: float
    """To write a chosen row."""
    curated_bytes: float
    draw_s: float
    """Of one sub-batch."""
    product_s: float
    """Of one comparison between two rows; 0 where nothing is compared."""


def measure(
    pool: Pool,
    encoders: Mapping[str, Encoder],
    passes: Iterable[tuple[str, ...]],
    dims: Mapping[str, int],
    settings: EmbedSection,
    selection: SelectionSection,
    scratch: Store,
    *,
    device: torch.device,
    seed: int,
    dedup: bool,
) -> Rates:
    """Take the measures, in seconds.

    Args:
        pool: the user's.
        encoders: on `device`, by role; those that will run.
        passes: roles that are decoded for together.
        dims: D of each role that a round looks at.
        settings: of the embedding files, and the pairs of a batch.
        selection: whose draws are timed.
        scratch: where files are written.
        device: that computes.
        seed: decides which rows are read.
        dedup: whether rows will be compared.

    Raises:
        CurateError: the rows cannot be read, or none of them can be used.
    """
    raws, took = _raws(pool, seed)
    rows = sum(len(raw.rows) for raw in raws)
    decode_s: dict[tuple[str, ...], float] = {}
    pieces: dict[str, list[Piece]] = {}
    for roles in passes:
        decode_s[roles], made = _decode(raws, {role: encoders[role] for role in roles})
        pieces |= dict.fromkeys(roles, made)
    forward_s = {role: _forward(encoders[role], made, settings.batch_size) for role, made in pieces.items()}
    written = {role: _embedding_file(encoders[role], made, settings, scratch) for role, made in pieces.items()}
    curated_s, curated_bytes = _curated(pool, raws, scratch)
    return Rates(
        rows=rows,
        device_type=device.type,
        read_s=took / rows,
        row_bytes=sum(shard.bytes for shard in pool.shards) / pool.rows,
        decode_s=decode_s,
        forward_s=forward_s,
        write_s={role: took for role, (took, _) in written.items()},
        files={role: size for role, (_, size) in written.items()},
        curated_s=curated_s,
        curated_bytes=curated_bytes,
        draw_s=_draw(selection, dims, device, seed),
        product_s=_product(dims["reference"], device) if dedup else 0.0,
    )


def _raws(pool: Pool, seed: int) -> tuple[list[Raw], float]:
    """The first rows of some row groups, as a loader reads them, and how long that took but for opening the files."""
    reading = reading_for({})
    rng = np.random.default_rng(derive_seed(seed, "rates"))
    share = np.array([shard.rows for shard in pool.shards]) / pool.rows
    found: list[Raw] = []
    took = 0.0
    for i in rng.choice(len(pool.shards), SPOTS, p=share):
        shard = pool.shards[i]
        begun = time.perf_counter()
        sizes = row_groups(shard)
        opened = time.perf_counter()
        took -= opened - begun if found else 0  # the first time much is done that is done once
        group = int(rng.choice(len(sizes), p=np.array(sizes) / shard.rows))
        start = sum(sizes[:group])
        rows = np.arange(start, start + min(ROWS // SPOTS, sizes[group]))
        some = Slice(job=0, shard=shard, start=0, stop=len(rows), rows=rows, piece_rows=len(rows), encoders=())
        begun = time.perf_counter()
        found += list(reading.raw(some))
        took += time.perf_counter() - begun
    return found, max(took, LEAST_S)


def _decode(raws: Sequence[Raw], encoders: Mapping[str, Encoder]) -> tuple[float, list[Piece]]:
    """Seconds a row, and the pieces: as a loader makes them, but for the watch, which ends a process that hangs."""
    reading = reading_for(encoders)

    def decode(rows: Sequence[Row]) -> list[Decoded]:
        return [decode_row(row, reading.crops) for row in rows]

    def of(raw: Raw, number: int) -> Piece:
        some = replace(raw.slice, encoders=tuple(encoders))
        return replace(reading.piece(replace(raw, slice=some), decode), number=number)

    of(replace(raws[0], rows=raws[0].rows[:1], batch=raws[0].batch.slice(0, 1)), 0)  # what is made once is made now
    pieces: list[Piece] = []
    begun = time.perf_counter()
    while len(pieces) < len(raws) and time.perf_counter() - begun < BUDGET_S:
        pieces.append(of(raws[len(pieces)], len(pieces)))
    took, rows = time.perf_counter() - begun, sum(len(raw.rows) for raw in raws[: len(pieces)])
    if not any(piece.ok for piece in pieces):
        raise UserError(f"none of {counted(rows, 'row')}, drawn at random, can be used")
    return took / rows, pieces


def _forward(encoder: Encoder, pieces: Sequence[Piece], batch_size: int) -> float:
    """Seconds a pair of both towers, in batches that grow to their size for as long as there is time."""
    pixels = torch.cat([piece.pixels[encoder.view] for piece in pieces if piece.ok])
    texts = torch.cat([piece.texts[encoder.wording][piece.of] for piece in pieces if piece.ok])
    if encoder.device.type == "cuda":
        pixels, texts = pixels.pin_memory(), texts.pin_memory()
    most = min(batch_size, len(pixels))
    n, begun = min(FIRST_PAIRS, most), time.perf_counter()
    _encode(encoder, pixels[:n], texts[:n])  # which makes what is made once
    while True:
        took = _encode(encoder, pixels[:n], texts[:n])
        spent, more = time.perf_counter() - begun, min(4 * n, most)
        if n == more or spent + took * more / n > BUDGET_S:
            break
        n = more
    batches, steady = 1, took
    while steady < STEADY_S:
        steady += _encode(encoder, pixels[:n], texts[:n])
        batches += 1
    return steady / batches / n


def _encode(encoder: Encoder, pixels: torch.Tensor, texts: torch.Tensor) -> float:
    begun = time.perf_counter()
    zimg, ztxt = encoder.encode(pixels, texts)
    for z in (zimg, ztxt):
        z.half().cpu()  # waits for a GPU, and is what a part of an embedding file does
    return time.perf_counter() - begun


def _embedding_file(
    encoder: Encoder, pieces: Sequence[Piece], settings: EmbedSection, scratch: Store
) -> tuple[float, FileBytes]:
    """Seconds a row and bytes of an embedding file: of one with all pieces, and of one with a few rows."""
    begun = time.perf_counter()
    rows, size = _written(encoder, pieces, scratch)
    took = (time.perf_counter() - begun) / rows
    fewer, small = _written(encoder, pieces[:1], scratch)
    row = (size - small) / (rows - fewer) if rows > fewer else size / rows
    return took, FileBytes(row=row, group=max(0.0, small - row * fewer), chunk_rows=settings.chunk_rows)


def _written(encoder: Encoder, pieces: Sequence[Piece], scratch: Store) -> tuple[int, int]:
    """Rows and bytes of a file with one row group; its vectors are drawn: none compress less."""
    most = max(piece.table().num_rows for piece in pieces)
    job = Job(names={"": "embeddings.parquet"}, pieces=len(pieces), piece_rows=most, part_pieces=len(pieces))
    generator = torch.Generator().manual_seed(0)
    for piece in pieces:
        z = normalize(torch.randn(2, piece.ok, encoder.spec.embed_dim, generator=generator), dim=2)
        job.add(replace(piece, pixels={}, texts={}), {"": (z[0], z[1])} if piece.ok else {})
    counts = write_files(scratch, job, {"": encoder}, some=False)
    return sum(counts.values()), scratch.size("embeddings.parquet") or 0


def _curated(pool: Pool, raws: Sequence[Raw], scratch: Store) -> tuple[float, float]:
    """Seconds and bytes of a chosen row in a curated file."""
    n = sum(len(raw.rows) for raw in raws)
    rng = np.random.default_rng(0)
    position, score = rng.permutation(n), rng.random((3, n))
    pieces, done = [], 0
    for raw in raws:
        at = slice(done, done + len(raw.rows))
        done = at.stop
        picks = _picks(raw, pool.columns, position[at], score[:, at])
        schema = curated_schema(pool)
        pieces.append(chosen_rows(raw.slice.shard, picks, columns=pool.columns, schema=schema, round_number=0))
    begun = time.perf_counter()
    file = write_curated(pieces, scratch, "rounds", columns=pool.columns, sub_batch_size=n)
    return (time.perf_counter() - begun) / n, file.size / n


def _picks(raw: Raw, columns: Columns, position: npt.NDArray[np.int64], score: npt.NDArray[np.float64]) -> pa.Table:
    """Rows as a selected file would have them; scores [3, n] are anything."""
    images = image_bytes(raw.batch.column(columns.image)).to_pylist()
    captions = caption_bytes(raw.batch.column(columns.caption)).to_pylist()
    content = halves([content_hash(image, caption) for image, caption in zip(images, captions, strict=True)])
    zeros = np.zeros(len(raw.rows), np.int64)
    return pa.Table.from_pydict(
        {
            "sub_batch": zeros,
            "position": position,
            "chunk": zeros,
            "score": score[0].astype(np.float32),
            "learner_loss": score[1].astype(np.float32),
            "reference_loss": score[2].astype(np.float32),
            "shard": zeros + raw.slice.shard.index,
            "row": raw.rows,
            "content_low": content[:, 0],
            "content_high": content[:, 1],
        },
        schema=SELECTED_SCHEMA,
    )


def _draw(selection: SelectionSection, dims: Mapping[str, int], device: torch.device, seed: int) -> float:
    """Seconds of a draw: of a smaller one, times how many more products there are in a whole one."""
    b = selection.sub_batch_size
    few = max(selection.n_chunks, min(b, round(b * DRAWN[device.type] / selection.super_batch_size)))
    small = selection.model_copy(update={"sub_batch_size": few})
    B = small.super_batch_size
    rng = np.random.default_rng(derive_seed(seed, "rates"))
    rows = np.zeros(B, ROW)
    rows["key"], rows["row"] = rng.integers(2**63, size=B), np.arange(B)
    vectors = {
        role: normalize(torch.from_numpy(rng.standard_normal((B, dim), np.float32)), dim=1).half().numpy()
        for role, dim in dims.items()
    }
    learner = vectors.get("learner")
    candidates = Candidates(
        rows=rows,
        reference=(vectors["reference"], vectors["reference"]),
        learner=None if learner is None else (learner, learner),
    )
    scale = Scale(logit_scale=10.0, logit_bias=-10.0)
    took = 0.0
    for _ in range(2):  # the first makes what is made once
        begun = time.perf_counter()
        select_sub_batch(
            candidates,
            small,
            learner=scale if "learner" in dims else None,
            reference=scale,
            seed=seed,
            round_number=0,
            sub_batch=0,
            device=device,
        )
        took = time.perf_counter() - begun
    return took * (b / few) ** 2


def _product(width: int, device: torch.device) -> float:
    """Seconds of one comparison of two rows in a search for near-duplicates that finds none."""
    n = COMPARED[device.type]
    z = normalize(torch.randn(n, width, generator=torch.Generator().manual_seed(0)), dim=1).to(device)
    yes = torch.ones(n, dtype=torch.bool, device=device)
    took = 0.0
    for _ in range(2):
        begun = time.perf_counter()
        for _ in near_pairs(z, None, Threshold(image=0.9999), inner=n, fresh=yes, images_alone=~yes):
            pass
        took = time.perf_counter() - begun
    return took / (n * n / 2)
