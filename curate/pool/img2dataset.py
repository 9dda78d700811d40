"""img2dataset keeps the rows that it could not download, without an image: what it says of them."""

from collections.abc import Sequence

import pyarrow as pa

from curate.messages import one_line
from curate.pool.column_types import is_caption
from curate.pool.shards import caption_bytes

DOWNLOAD_FAILED = "download_failed"
OUTCOME_COLUMNS = ("status", "error_message")
"""What became of each row, and why."""


def download_errors(batch: pa.RecordBatch, images: Sequence[bytes | None]) -> list[str | None]:
    """What kept the image of each row from being downloaded, by img2dataset's `OUTCOME_COLUMNS`; None where nothing.

    A row that has an image was downloaded, whatever columns of these names say: they may mean something else.
    """
    if not all(name in batch.schema.names and is_caption(batch.schema.field(name).type) for name in OUTCOME_COLUMNS):
        return [None] * len(images)
    said = (caption_bytes(batch.column(name)).to_pylist() for name in OUTCOME_COLUMNS)
    return [
        one_line((error or status).decode(errors="replace"))
        if not image and status not in (None, b"", b"success")
        else None
        for image, status, error in zip(images, *said, strict=True)
    ]
