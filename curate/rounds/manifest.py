"""The manifest: one immutable JSON file per round, whose appearance is the round's publication.

Nothing in it tells attempts apart (no time, host or attempt id), so a round that was interrupted and finished has the
same bytes as one that was not, and a conditional write that "failed" on those very bytes is recognised as ours.
"""

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from typing import Any

from curate.errors import RowsLostError, UserError
from curate.sealed import seal, unseal
from curate.storage import Store
from curate.tally import Tally, check_chain

FORMAT_VERSION = 4
EXPIRED = "expired.json"
BY_SUB_BATCH = ("learnability", "uniform_learnability", "reference_loss")


@dataclass(frozen=True, kw_only=True)
class CuratedFile:
    """One curated Parquet file of a round."""

    name: str
    sha256: str
    size: int
    rows: int
    first_sub_batch: int
    sub_batches: int


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A committed round."""

    round: int
    parent: str | None
    """sha256 of the manifest of the round before; None for round 0."""
    first_batch: int
    """Number of this round's first sub-batch, counted from round 0: where the reader's state stands before it."""
    sub_batch_size: int
    sub_batches: int
    columns: dict[str, Any]
    """Which column holds image, caption and uid: `curate.pool.columns.Columns`. In a round without pictures `pool` is
    the fingerprint of the pool whose shards hold them."""
    files: tuple[CuratedFile, ...]
    pool_rows: int
    tallies: tuple[Tally, ...]
    learnability: tuple[float | None, ...]
    """Per example, of each sub-batch, at the time it was chosen."""
    uniform_learnability: tuple[float | None, ...]
    """Of a uniform sub-batch of the same super-batch."""
    reference_loss: tuple[float, ...]
    """Of each sub-batch, per example: the loss in training less this is the learnability when it is trained on."""
    quality: dict[str, Any]
    """How good this round and the one before it are, as far as can be known now: see `curate.rounds.quality`."""
    lineage: dict[str, Any]

    @property
    def stop_batch(self) -> int:
        """Number of the first batch after this round."""
        return self.first_batch + self.sub_batches

    def to_bytes(self) -> bytes:
        """The bytes that are committed.

        Raises:
            RowsLostError: if the tallies do not account for every row of the pool, or the files do not hold b rows a
                sub-batch.
        """
        rows = sum(file.rows for file in self.files)
        written = Tally(step="written", rows_in=rows, kept=self.sub_batches * self.sub_batch_size)
        check_chain([*self.tallies, written], rows=self.pool_rows)
        record = {"format_version": FORMAT_VERSION} | asdict(self) | {"tallies": [t.to_json() for t in self.tallies]}
        return seal(record)

    @classmethod
    def from_bytes(cls, data: bytes, name: str) -> "Manifest":
        """The inverse of `to_bytes`; `name` is for messages.

        Raises:
            UserError: not a manifest, or of a format that this version does not know.
        """
        try:
            version = json.loads(data)["format_version"]
            if version != FORMAT_VERSION:
                raise UserError(
                    f"{name}: format_version is {version}, this version reads {FORMAT_VERSION}; read it with "
                    "the one that wrote it, or choose another root"
                )
            record = unseal(data, name)
            del record["format_version"]
            files = tuple(CuratedFile(**file) for file in record.pop("files"))
            tallies = tuple(Tally(**tally) for tally in record.pop("tallies"))
            by_sub_batch: dict[str, Any] = {name: tuple(record.pop(name)) for name in BY_SUB_BATCH}
            return cls(files=files, tallies=tallies, **by_sub_batch, **record)
        except (ValueError, KeyError, TypeError, AttributeError, RowsLostError) as error:
            raise UserError(f"{name}: expected a manifest, found something else ({error}); restore the file") from error


def round_folder(number: int) -> str:
    """Folder of a round within the root."""
    return f"rounds/r{number:06d}"


def steps_folder(number: int, plan: str) -> str:
    """Folder of what a round's steps leave for each other, by the digest of its plan."""
    return f"{round_folder(number)}/steps-{plan}"


def manifest_name(number: int) -> str:
    """Name of a round's manifest within the root."""
    return f"{round_folder(number)}/manifest.json"


def expire(store: Store, number: int) -> None:
    """Say that the rows of a round are to be removed; who misses them then is told so."""
    if not is_expired(store, number):  # asked before each file of the round: a look is less than a publication
        store.put_if_absent(f"{round_folder(number)}/{EXPIRED}", seal({"round": number}))


def is_expired(store: Store, number: int) -> bool:
    """Whether the rows of a round were removed, because nobody was to need them any more."""
    return store.exists(f"{round_folder(number)}/{EXPIRED}")


def read_manifest(store: Store, number: int) -> tuple[Manifest, str] | None:
    """A round's manifest and its sha256, or None if the round is not committed."""
    try:
        data = store.read_bytes(manifest_name(number))
    except FileNotFoundError:
        return None
    return Manifest.from_bytes(data, manifest_name(number)), hashlib.sha256(data).hexdigest()


def last_round(store: Store) -> int:
    """Number of the newest committed round; -1 if there is none."""
    numbers = (re.fullmatch(r"rounds/r(\d{6,})", name) for name in store.list("rounds"))
    for number in sorted((int(match[1]) for match in numbers if match), reverse=True):
        if store.exists(manifest_name(number)):
            return number
    return -1


def commit(store: Store, manifest: Manifest) -> str:
    """Publish a round; returns the sha256 of its manifest. Doing it twice changes nothing.

    Raises:
        RowsLostError: rows are unaccounted for.
        UserError: a curated file is missing or of another size. (Their content was hashed after they were written.)
        CommitConflictError: somebody else committed another round under this number.
        CommitUnknownError: the store did not answer.
    """
    data = manifest.to_bytes()
    folder = round_folder(manifest.round)
    for file in manifest.files:
        found = store.size(f"{folder}/{file.name}")
        if found != file.size:
            raise UserError(
                f"{folder}/{file.name}: expected {file.size} bytes, found {found}; it was removed or changed "
                f"before the commit: delete {folder} and run the round again"
            )
    store.put_if_absent(manifest_name(manifest.round), data)
    return hashlib.sha256(data).hexdigest()
