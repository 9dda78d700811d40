"""Embedding files: one per encoder and shard, read and named here, written by `curate.embed`.

An embedding file has exactly one row per row of its shard, in order:

    uid      string                 the recipe's column, else `content` in hex
    status   string                 ok, not_scored, or why the pair cannot be used
    error    string or null         what was found, for people
    content  fixed_size_binary[16]  hash of image bytes and caption: equal pairs, equal content
    picture  fixed_size_binary[16]  hash of image bytes: equal files, equal picture
    width    int32 or null          of the picture, pixels; null unless it was decoded
    height   int32 or null          likewise
    zimg     fixed_size_list<float16>[D] or null     unit rows, null unless status is ok
    ztxt     likewise

Of a shard with a damaged page all rows have the status `damaged_shard`, contents and pictures of zeros, and, where the
column of uids cannot be read or there is none, the uid `<name of the shard>#<row>`.
"""

import hashlib
import json
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from curate.errors import DamagedError, ShardDamagedError
from curate.parquet import open_table
from curate.pool import Shard
from curate.storage import Store

CONTENT_BYTES = 16
NOT_SCORED = "not_scored"
EMBEDDING_NONFINITE = "embedding_nonfinite"
EMBEDDING_ZERO = "embedding_zero"
DAMAGED_SHARD = "damaged_shard"


def content_hash(image: bytes | None, caption: bytes | None) -> bytes:
    """16 bytes that two rows share exactly if image bytes and caption bytes are equal (BLAKE2b).

    >>> content_hash(b"ab", b"c") != content_hash(b"a", b"bc")
    True
    """
    return pair_hashes(image, caption)[1]


def pair_hashes(image: bytes | None, caption: bytes | None) -> tuple[bytes, bytes]:
    """Two hashes for one pass over the bytes: of the image alone, and `content_hash`."""
    digest = hashlib.blake2b(digest_size=CONTENT_BYTES)
    digest.update(len(image or b"").to_bytes(8, "little"))
    digest.update(image or b"")
    picture = digest.digest()
    digest.update(caption or b"")
    return picture, digest.digest()


def uid_texts(column: pa.Array) -> list[str | None]:
    """The user's ids as text; bytes that are not UTF-8 are replaced, or one such id would stop its whole shard."""
    if pa.types.is_integer(column.type):
        column = column.cast(pa.string())
    return [None if raw is None else raw.decode(errors="replace") for raw in column.cast(pa.large_binary()).to_pylist()]


def embedding_name(sha: str, shard: Shard, scope: str = "") -> str:
    """Name, within the root, of a shard's embeddings by one encoder; `scope` if only some rows are scored."""
    return "/".join(part for part in ("embeddings", sha, scope, f"{shard.key}.parquet") if part)


def range_scope(*, seed: int, epoch: int, low: int, high: int, dedup: str | None) -> str:
    """The scope of files that score, of an epoch's walk, the rows from key `low` to below key `high` alone."""
    scope = f"walk-{seed}-{epoch}-{low:016x}-{high:016x}"
    return f"{scope}-{hashlib.sha256(dedup.encode()).hexdigest()[:12]}" if dedup else scope


def read_embeddings(store: Store, name: str, columns: Sequence[str]) -> pa.Table:
    """Columns of an embedding file.

    Raises:
        DamagedError: it is not what was written.
    """
    with open_table(store, name) as parquet:
        check_schema(name, parquet.schema_arrow)
        return parquet.read(list(columns))


def damage_of(store: Store, shards: Sequence[Shard], sha: str) -> list[str]:
    """A line for each of some shards that an encoder's embedding files say is damaged."""
    found = []
    for shard in shards:
        table = read_embeddings(store, embedding_name(sha, shard), ["status", "error"])
        for row in table.slice(0, 1).to_pylist():  # all rows of such a shard are alike
            if row["status"] == DAMAGED_SHARD:
                found.append(str(ShardDamagedError(shard.path, shard.rows, row["error"])))
    return found


def check_schema(name: str, schema: pa.Schema) -> None:
    """Raise DamagedError unless an embedding file of that name has its columns, whatever D is."""
    vector = schema.field("zimg").type if "zimg" in schema.names else None
    width = vector.list_size if vector is not None and pa.types.is_fixed_size_list(vector) else 0
    if schema != embedding_schema(width):
        raise DamagedError(name, "its columns are others")


def vectors(column: pa.ChunkedArray, embed_dim: int) -> npt.NDArray[np.float16]:
    """An embedding column as float16 [n, D]; NaN where it is null, so that nothing can mistake it for a vector."""
    array = column.combine_chunks()
    out = np.full((len(array), embed_dim), np.nan, np.float16)
    valid = np.asarray(array.is_valid())
    out[valid] = array.flatten().to_numpy(zero_copy_only=False).reshape(-1, embed_dim)
    return out


def contents(column: pa.ChunkedArray) -> npt.NDArray[np.uint64]:
    """A content column as its two halves [n, 2]."""
    return np.concatenate([halves(chunk.to_pylist()) for chunk in column.chunks] or [halves([])])


def halves(content: Sequence[bytes]) -> npt.NDArray[np.uint64]:
    """Content hashes as their two halves [n, 2]."""
    return np.frombuffer(b"".join(content), "<u8").reshape(-1, 2)


def embedding_schema(embed_dim: int) -> pa.Schema:
    """The schema of an embedding file; D decides its last two columns."""
    vector = pa.list_(pa.float16(), embed_dim)
    return pa.schema(
        [
            pa.field("uid", pa.string()),
            pa.field("status", pa.string(), nullable=False),
            pa.field("error", pa.string()),
            pa.field("content", pa.binary(CONTENT_BYTES), nullable=False),
            pa.field("picture", pa.binary(CONTENT_BYTES), nullable=False),
            pa.field("width", pa.int32()),
            pa.field("height", pa.int32()),
            pa.field("zimg", vector),
            pa.field("ztxt", vector),
        ],
        metadata={"format": json.dumps({"embeddings": 2})},
    )
