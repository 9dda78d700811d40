"""Search: the pairs of a pool that lie nearest to some words, a picture or another pair, by the reference's embeddings.

The embeddings are there anyway, so that a search is one walk through them: exact, in the memory of a few blocks,
and without an index that would have to be made and kept.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from curate.embed.decode import decode_row
from curate.embed.files import check_schema, embedding_name, read_embeddings, vectors
from curate.errors import UserError
from curate.models.encoder import load_encoder
from curate.models.spec import EncoderSpec
from curate.parquet import batches_of, open_table
from curate.pool.images import Dropped, clean_caption
from curate.pool.shards import Pool, Shard, load_pool
from curate.rounds.committed import newest_round
from curate.rounds.trace import find_uid
from curate.storage import Store

Tower = Literal["zimg", "ztxt"]
TOWERS: dict[str, Tower] = {"pictures": "zimg", "captions": "ztxt"}
BLOCK_ROWS = 65_536
NOWHERE = -2.0
"""No cosine."""
THREADS = 4
"""Shards that are read at once: a block of each is held."""


@dataclass(frozen=True, kw_only=True)
class Near:
    """A pair of the pool."""

    cosine: float
    uid: str
    shard: int
    row: int


@dataclass(frozen=True, kw_only=True)
class Searched:
    """A pool that can be searched: that of the newest round."""

    store: Store
    round: int
    pool: Pool
    reference: EncoderSpec

    def embed_words(self, words: str) -> Tensor:
        """Unit embedding [D] of some words, as the reference has it of captions.

        Raises:
            UserError: nothing that a caption might be.
        """
        encoder = load_encoder(self.store, self.reference, torch.device("cpu"))
        try:
            texts = encoder.tokenize([clean_caption(words)])
        except Dropped as dropped:
            raise UserError(f"{words!r}: expected words, found {dropped.reason}; write some") from None
        blank = torch.zeros((1, *encoder.image_size, 3), dtype=torch.uint8)
        return encoder.encode(blank, texts)[1][0]

    def embed_picture(self, data: bytes, name: str) -> Tensor:
        """Unit embedding [D] of a picture; `name` is for messages.

        Raises:
            UserError: it does not decode, or is one that a round would leave out.
        """
        encoder = load_encoder(self.store, self.reference, torch.device("cpu"))
        found = decode_row((data, name.encode()), {encoder.view: encoder.crop})
        if found.status != "ok":
            raise UserError(f"{name}: expected a picture, found {found.status} ({found.error}); name another")
        pixels = torch.from_numpy(np.ascontiguousarray(found.pixels[encoder.view]))
        return encoder.encode(pixels[None], encoder.tokenize([name]))[0][0]

    def embedding_of(self, uid: str, tower: Tower) -> Tensor:
        """Unit embedding [D] of a pair of the pool.

        Raises:
            UserError: no row has this uid, or the first that has it could not be embedded.
        """
        shard, row, status = find_uid(self.store, uid)
        if status != "ok":
            raise UserError(f"uid {uid}: {status}, so that it has no embedding; name another")
        table = read_embeddings(self.store, embedding_name(self.reference.sha, shard), [tower]).slice(row, 1)
        return torch.from_numpy(vectors(table[tower], self.reference.embed_dim)[0]).float()

    def nearest(
        self,
        query: Tensor,
        *,
        tower: Tower,
        k: int,
        progress: Callable[[Iterable[Any], int], Iterable[Any]] = lambda shards, total: shards,
    ) -> list[Near]:
        """The k pairs of the pool with the highest cosine, the highest first, equal ones in the pool's order.

        Args:
            query: float32 [D], of length 1.
            tower: whose vectors it is compared with.
            k: how many; fewer if the pool has fewer.
            progress: as `take_inventory` takes it; counts shards.

        Raises:
            DamagedError: an embedding file is not what was written.
        """
        best: list[Near] = []
        with ThreadPoolExecutor(THREADS) as threads:
            found = threads.map(lambda shard: self._nearest_of(shard, query, tower, k), self.pool.shards)
            for near in progress(found, len(self.pool.shards)):
                best = sorted([*best, *near], key=_nearness)[:k]
        return best

    def _nearest_of(self, shard: Shard, query: Tensor, tower: Tower, k: int) -> list[Near]:
        """Those of one shard."""
        name = embedding_name(self.reference.sha, shard)
        found: list[Near] = []
        first = 0
        with open_table(self.store, name) as parquet:
            check_schema(name, parquet.schema_arrow)
            for batch in batches_of(parquet, BLOCK_ROWS, ["uid", tower]):
                z = torch.from_numpy(vectors(pa.chunked_array([batch[tower]]), self.reference.embed_dim)).float()
                cosines = (z @ query).nan_to_num_(nan=NOWHERE, posinf=NOWHERE)  # rows without a sound vector
                # All that are as near as the k-th: which of equal ones `topk` gives is not said.
                least = cosines.topk(min(k, len(cosines))).values[-1]
                near = torch.nonzero((cosines >= least) & (cosines > NOWHERE)).flatten().tolist()
                found += [
                    Near(cosine=float(cosines[i]), uid=batch["uid"][i].as_py(), shard=shard.index, row=first + i)
                    for i in near
                ]
                first += len(batch)
        return sorted(found, key=_nearness)[:k]


def _nearness(near: Near) -> tuple[float, int, int]:
    return -near.cosine, near.shard, near.row


def open_pool(store: Store) -> Searched:
    """The pool of the newest round.

    Raises:
        UserError: there is no round.
    """
    newest = newest_round(store)
    lineage = newest.lineage
    return Searched(
        store=store,
        round=newest.round,
        pool=load_pool(store, lineage["pool"]["fingerprint"]),
        reference=EncoderSpec(**lineage["reference"]),
    )
