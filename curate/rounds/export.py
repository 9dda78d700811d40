"""Committed rounds in the formats of other libraries: tars of webdataset, uids of DataComp, a data set of `datasets`.

Exports are made of published files alone and are the same bytes whenever they are made: one that was interrupted goes
on where it stopped.
"""

import hashlib
import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from curate.errors import UserError
from curate.parquet import batches_of, open_table
from curate.pool.shards import ADDED_COLUMN, caption_bytes
from curate.pool.wanted import HALVES, halves_of
from curate.rounds.manifest import CuratedFile, Manifest, is_expired, round_folder
from curate.rounds.pictures import pictures_of
from curate.rounds.write import row_group_rows
from curate.sealed import seal, unseal
from curate.storage import Store

SUFFIXES = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif"}
"""By Pillow's name of a format, the member's suffix; of those alone that a round holds."""
CARD = "README.md"
SIZES = "sizes.json"
RECORD = "rounds.json"
"""Which rounds a folder holds: an export of others would be mixed with it."""


def to_webdataset(store: Store, rounds: Sequence[Manifest], target: Store) -> Iterator[int]:
    """Write one tar for each sub-batch, `00000000.tar` and so on, numbered from round 0, and `sizes.json`.

    Samples lie in the order drawn; their keys have no dots. A sample is the picture (`.jpg`, `.png`, …), the caption
    (`.txt`) and a `.json` of the user's columns, ours in `curate`. `sizes.json` holds the samples of each tar, as
    open_clip reads it; it comes last.

    Yields:
        The number of each sub-batch that is in place.

    Raises:
        UserError: a round's rows are gone; the folder holds an export of other rounds.
    """
    _claim(rounds, target)
    sizes: dict[str, int] = {}
    for manifest in rounds:
        for file in _files(store, manifest):
            numbers = range(manifest.first_batch + file.first_sub_batch, manifest.first_batch + _stop(file))
            names = {number: f"{number:08d}.tar" for number in numbers}
            sizes |= dict.fromkeys(names.values(), manifest.sub_batch_size)
            missing = {number for number, name in names.items() if not target.exists(name)}
            if missing:
                for number, table in zip(numbers, _sub_batches(store, manifest, file), strict=True):
                    if number in missing:
                        target.put_bytes(names[number], _tar(store, table, manifest, number))
            yield from numbers
    target.put_bytes(SIZES, json.dumps(sizes, indent=1).encode())


def _claim(rounds: Sequence[Manifest], target: Store) -> None:
    """Say in a folder which rounds it is for; rounds may be added behind those that it has.

    Raises:
        UserError: it has others.
    """
    ours = [hashlib.sha256(manifest.to_bytes()).hexdigest() for manifest in rounds]
    try:
        theirs = unseal(target.read_bytes(RECORD), f"{target.url}/{RECORD}")["manifests"]
    except FileNotFoundError:
        theirs = []
    if theirs != ours[: len(theirs)]:
        raise UserError(
            f"{target.url}: expected an empty folder, or one with some of these rounds from the first on, found an "
            f"export of {len(theirs)} others ({RECORD}); choose another folder"
        )
    target.put_bytes(RECORD, seal({"manifests": ours}))


def _tar(store: Store, table: pa.Table, manifest: Manifest, number: int) -> bytes:
    """A sub-batch as a tar; the same bytes whoever makes it."""
    image, caption = str(manifest.columns["image"]), str(manifest.columns["caption"])
    images = pictures_of(store, table, manifest.columns)
    captions = caption_bytes(table[caption].combine_chunks()).to_pylist()
    others = _rows(table.select([name for name in table.schema.names if name != image]))
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for place, (picture, text, row) in enumerate(zip(images, captions, others, strict=True)):
            key = f"{number:08d}-{place:06d}"
            said = json.dumps(row, default=_as_text)
            for suffix, data in ((_suffix(picture), picture), ("txt", text), ("json", said.encode())):
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return out.getvalue()


def _rows(table: pa.Table) -> list[dict[str, Any]]:
    """Rows as JSON takes them; what is no UTF-8 in a text is replaced."""
    try:
        return list(table.to_pylist())
    except UnicodeDecodeError:
        texts = [field.name for field in table.schema if pa.types.is_string(field.type)]
        for name in texts:
            raw = table[name].cast(pa.binary()).to_pylist()
            told = [None if one is None else one.decode(errors="replace") for one in raw]
            table = table.set_column(table.schema.get_field_index(name), name, pa.array(told))
        return list(table.to_pylist())


def _suffix(picture: bytes) -> str:
    with Image.open(io.BytesIO(picture)) as opened:
        return SUFFIXES.get(str(opened.format), "jpg")


def _as_text(value: Any) -> str:
    """What JSON has no words for: dates, decimals, bytes."""
    return value.hex() if isinstance(value, bytes) else str(value)


def to_uids(store: Store, rounds: Sequence[Manifest], path: Path) -> int:
    """Write the uids of all chosen rows, each once and sorted, as a NumPy file: `pool.keep` of another recipe.

    Uids of 32 hexadecimal digits, as hashes of contents are, become DataComp's `u8,u8`; others texts. All uids are held
    in memory, as texts, some 300 bytes each; a row without one is left out.

    Returns:
        How many there are.

    Raises:
        UserError: a round's rows are gone.
    """
    uids: set[str] = set()
    for manifest in rounds:
        for file in _files(store, manifest):
            with open_table(store, f"{round_folder(manifest.round)}/{file.name}") as parquet:
                column = parquet.read(columns=[f"{ADDED_COLUMN}.uid"])[ADDED_COLUMN].combine_chunks()
            uids.update(uid for uid in column.field("uid").to_pylist() if uid is not None)
    halves = [halves_of(uid) for uid in uids]
    array = np.array(sorted(uids)) if None in halves else np.sort(np.array(halves, HALVES))
    with path.open("wb") as out:  # np.save adds a suffix to a name that has none
        np.save(out, array)
    return len(array)


def to_datasets(store: Store, rounds: Sequence[Manifest], target: Store) -> Iterator[int]:
    """Write a folder that `datasets.load_dataset` opens, with pictures as pictures and a card that says what made it.

    Files are Parquet, `data/train-<round>-<sub-batch>.parquet`, their rows in the order drawn: rows
    `b·n` to `b·(n + 1)` are batch n.

    Yields:
        The number of each sub-batch that is in place.

    Raises:
        UserError: a round's rows are gone; the folder holds an export of other rounds.
    """
    _claim(rounds, target)
    for manifest in rounds:
        for file in _files(store, manifest):
            name = f"data/train-{manifest.round:06d}-{file.first_sub_batch:06d}.parquet"
            if not target.exists(name):
                with target.local_scratch() as scratch:
                    path = scratch / "rows.parquet"
                    _write_for_datasets(store, manifest, file, path)
                    target.put_file(path, name)
            yield from range(manifest.first_batch + file.first_sub_batch, manifest.first_batch + _stop(file))
    target.put_bytes(CARD, _card(store, rounds).encode())


def _write_for_datasets(store: Store, manifest: Manifest, file: CuratedFile, path: Path) -> None:
    image = str(manifest.columns["image"])
    said = json.dumps({"info": {"features": {image: {"_type": "Image"}}}})
    rows = row_group_rows(manifest.sub_batch_size)
    writer = None
    for whole in _sub_batches(store, manifest, file):
        for start in range(0, len(whole), rows):  # a whole one may hold more bytes than one column can
            found = whole.slice(start, rows).combine_chunks()
            pictures = pa.array(pictures_of(store, found, manifest.columns), pa.binary())
            column = pa.StructArray.from_arrays([pictures, pa.nulls(len(found), pa.string())], names=["bytes", "path"])
            others = found.select([name for name in found.schema.names if name != image])
            table = others.add_column(0, image, column)
            schema = table.schema.with_metadata({"huggingface": said})
            writer = writer or pq.ParquetWriter(path, schema, compression={f"{image}.bytes": "none"})
            writer.write_table(table.cast(schema), row_group_size=rows)
    assert writer is not None  # a curated file holds a sub-batch at least
    writer.close()


def _card(store: Store, rounds: Sequence[Manifest]) -> str:
    """What people and the hub are told of a data set."""
    last = rounds[-1]
    lineage = last.lineage
    selection = lineage["recipe"]["selection"]
    learner = lineage["learner"]["source"] if lineage["learner"] else "not looked at"
    rows = sum(file.rows for manifest in rounds for file in manifest.files)
    return f"""\
---
task_categories: [image-to-text, text-to-image]
configs:
- config_name: default
  data_files: data/train-*.parquet
---

# {PurePosixPath(store.url).name}

{rows:,} image-text pairs in {rows // last.sub_batch_size:,} batches of {last.sub_batch_size:,}, chosen in rounds
{rounds[0].round} to {last.round} from a pool of {last.pool_rows:,} by joint example selection (arXiv 2406.17711). Each
batch was chosen as a whole: rows `{last.sub_batch_size} * n` to `{last.sub_batch_size} * (n + 1)` are batch n. Do not
shuffle rows.

- selection of the last round: {selection["method"]} {selection["criterion"]}, filter ratio {selection["filter_ratio"]}
- reference: {lineage["reference"]["source"]}
- learner: {learner}
- pool: {lineage["pool"]["shards"]:,} shards, fingerprint `{lineage["pool"]["fingerprint"]}`
- manifest of the last round: `{round_folder(last.round)}`, chain of parents up to `{rounds[0].parent or "round 0"}`

The column `{ADDED_COLUMN}` says of each row its round, sub-batch, place, score, losses, uid and source.
"""


def _files(store: Store, manifest: Manifest) -> list[CuratedFile]:
    """A round's files, in order.

    Raises:
        UserError: they are gone.
    """
    if is_expired(store, manifest.round):
        raise UserError(
            f"{store.url}: the rows of round {manifest.round} were removed by curate gc --keep-rounds; begin with a "
            "later one, --first N"
        )
    return sorted(manifest.files, key=lambda file: file.first_sub_batch)


def _stop(file: CuratedFile) -> int:
    return file.first_sub_batch + file.sub_batches


def _sub_batches(store: Store, manifest: Manifest, file: CuratedFile) -> Iterator[pa.Table]:
    """The sub-batches of a file, in order; one is held at a time."""
    b = manifest.sub_batch_size
    with open_table(store, f"{round_folder(manifest.round)}/{file.name}") as parquet:
        held: list[pa.RecordBatch] = []
        missing = b
        for batch in batches_of(parquet, row_group_rows(b)):
            rest = batch  # of which a part may be the next sub-batch's: batches do not end where row groups do
            while rest.num_rows:
                held.append(rest.slice(0, missing))
                missing -= held[-1].num_rows
                rest = rest.slice(held[-1].num_rows)
                if not missing:
                    yield pa.Table.from_batches(held)
                    held, missing = [], b
