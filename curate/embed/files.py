"""Embedding files: one per encoder and shard, read and named here, written by `curate.embed.shard`.

An embedding file has exactly one row per row of its shard, in order:

    uid      string                 the recipe's column, else `content` in hex
    status   string                 ok, or why the pair cannot be used
    error    string or null         what was found, for people
    content  fixed_size_binary[16]  hash of image bytes and caption: equal pairs, equal content
    picture  fixed_size_binary[16]  hash of image bytes: equal files, equal picture
    width    int32 or null          of the picture, pixels; null unless it was decoded
    height   int32 or null          likewise
    zimg     fixed_size_list<float16>[D] or null     unit rows, null unless status is ok
    ztxt     likewise

That of a learner, which is asked for some rows alone, has these rows alone, and a column more in front:

    row      int64                  number of the row in the shard, ascending

Of a shard with a damaged page all rows have the status `damaged_shard`, contents and pictures of zeros, and, where the
column of uids cannot be read or there is none, the uid `<name of the shard>#<row>`.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from curate.errors import DamagedError, ShardDamagedError
from curate.parquet import open_table
from curate.pool.columns import Columns
from curate.pool.shards import Shard
from curate.storage import Store

CONTENT_BYTES = 16
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


def uids_of(batch: pa.RecordBatch, columns: Columns, contents: Iterable[bytes]) -> list[str | None]:
    """The ids of rows: the user's, else their contents, as `content_hash` gives them, in hex."""
    return uid_texts(batch.column(columns.uid)) if columns.uid else [content.hex() for content in contents]


def embedding_name(sha: str, shard: Shard, scope: str = "") -> str:
    """Name, within the root, of a shard's embeddings by one encoder; `scope` if only some rows are scored."""
    return "/".join(part for part in ("embeddings", sha, scope, f"{shard.key}.parquet") if part)


def read_embeddings(store: Store, name: str, columns: Sequence[str], *, numbered: bool = False) -> pa.Table:
    """Columns of an embedding file, and `row` if they are to be numbered.

    Raises:
        DamagedError: it is not what was written.
    """
    with open_table(store, name) as parquet:
        check_schema(name, parquet.schema_arrow)
        some = "row" in parquet.schema_arrow.names
        table = parquet.read([*columns, *(["row"] if numbered and some else [])])
    if numbered and not some:
        table = table.append_column("row", pa.array(np.arange(len(table))))
    return table


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
    if schema != embedding_schema(width, some="row" in schema.names):
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
    found = [np.empty((0, 2), np.uint64)]
    for chunk in column.chunks:
        data = chunk.buffers()[1] or b""
        found.append(np.frombuffer(data, "<u8").reshape(-1, 2)[chunk.offset : chunk.offset + len(chunk)])
    return np.concatenate(found)


def halves(content: Sequence[bytes]) -> npt.NDArray[np.uint64]:
    """Content hashes as their two halves [n, 2]."""
    return np.frombuffer(b"".join(content), "<u8").reshape(-1, 2)


def embedding_schema(embed_dim: int, *, some: bool = False) -> pa.Schema:
    """The schema of an embedding file, or of one with some rows alone; D decides its last two columns."""
    vector = pa.list_(pa.float16(), embed_dim)
    return pa.schema(
        [
            *([pa.field("row", pa.int64(), nullable=False)] if some else []),
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
        metadata={"format": json.dumps({"embeddings": 3})},
    )
