"""A committed round as whoever asks about its rows needs it: pool, index, windows, and which row is whose candidate."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from curate.errors import UserError
from curate.models.spec import EncoderSpec
from curate.pool.shards import Pool, load_pool
from curate.rounds.manifest import Manifest, last_round, read_manifest, steps_folder
from curate.rounds.quality import selection_of
from curate.select.index import Index, read_index
from curate.select.windows import (
    EARLIER_ROUND,
    LATER_ROUND,
    WINDOW_END,
    EpochRange,
    Stretch,
    Window,
    cut_name,
    read_cut,
    row_keys,
    stretches,
    super_batch_of,
    window_scope,
    windows_of,
)
from curate.storage import Store


@dataclass(frozen=True, kw_only=True)
class Cut:
    """What a round took of the window that a shard lies in."""

    first: int
    """Number, within the round, of its first sub-batch."""
    boundaries: tuple[int, ...]
    """Keys at which its super-batches begin, and at which the last one ends."""
    seed: int
    epoch: int
    scope: str
    """Of the files of a learner that was asked for these candidates alone."""

    def sub_batches(self, content: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
        """Number [n], within the round, of the sub-batch for which each content [n, 2] was a candidate; -1 if none."""
        found = super_batch_of(row_keys(content, seed=self.seed, epoch=self.epoch), self.boundaries)
        return np.where(found < 0, found, found + self.first)


@dataclass(frozen=True, kw_only=True)
class Committed:
    """A committed round."""

    store: Store
    manifest: Manifest
    pool: Pool
    index: Index
    reference: EncoderSpec
    learner: EncoderSpec | None
    """None if no round of such a recipe looks at it."""
    selection: Mapping[str, Any]
    """Section of the recipe."""
    steps: str
    windows: tuple[Window, ...]
    taken: EpochRange
    seed: int
    super_batch_size: int
    evaluation: tuple[str, ...]

    @cached_property
    def _stretches(self) -> list[Stretch]:
        return stretches(self.windows, self.taken, self.super_batch_size)

    @cached_property
    def _cuts(self) -> dict[int, Cut]:
        """Of the windows that were asked for, by the number of their first sub-batch: each is read once."""
        return {}

    @property
    def shards(self) -> list[int]:
        """Indices of the shards that its candidates lie in."""
        return sorted(index for stretch in self._stretches for index in stretch.window.shards)

    def cut_of(self, shard: int) -> Cut | None:
        """What the round took of the window that a shard lies in; None if nothing.

        Raises:
            UserError: the record of the window is gone.
        """
        for stretch in self._stretches:
            if shard not in stretch.window.shards:
                continue
            if stretch.first in self._cuts:
                return self._cuts[stretch.first]
            name, cut = self._cut(stretch.window)
            if cut is None:
                raise UserError(f"{name}: expected where a window of the round is cut, found nothing; restore the file")
            inside = cut[stretch.start : stretch.start + stretch.super_batches + 1]
            epoch = self.taken.epoch
            scope = window_scope(self.index.folder, seed=self.seed, epoch=epoch, low=inside[0], high=inside[-1])
            found = Cut(first=stretch.first, boundaries=inside, seed=self.seed, epoch=epoch, scope=scope)
            return self._cuts.setdefault(stretch.first, found)
        return None

    def turn_of(self, shard: int, content: npt.NDArray[np.uint64]) -> str:
        """Why a candidate [1, 2] of a shard is not this round's: the reason in the round's tally.

        Of a window that no round has come to yet nobody knows which candidates will be left at its end.
        """
        begin = 0
        for window in self.windows:
            held = window.candidates // self.super_batch_size
            if shard in window.shards:
                break
            begin += held
        _, cut = self._cut(window)
        inside = 0
        if cut is not None:
            inside = int(super_batch_of(row_keys(content, seed=self.seed, epoch=self.taken.epoch), cut)[0])
        if inside < 0:
            return WINDOW_END
        return EARLIER_ROUND if begin + inside < self.taken.start else LATER_ROUND

    def _cut(self, window: Window) -> tuple[str, tuple[int, ...] | None]:
        """The record of where a window is cut: its name, and what it holds if it is there."""
        shards = [self.pool.shards[i] for i in window.shards]
        name = cut_name(
            self.index.folder,
            shards,
            seed=self.seed,
            epoch=self.taken.epoch,
            super_batch_size=self.super_batch_size,
        )
        return name, read_cut(self.store, name)


def newest_round(store: Store) -> Manifest:
    """The manifest of the newest round alone, however many there are.

    Raises:
        UserError: there is none.
    """
    newest = read_manifest(store, last_round(store))
    if newest is None:
        raise UserError(f"{store.url}: expected a committed round, found none; run curate round first")
    return newest[0]


def open_rounds(store: Store, manifests: Sequence[Manifest]) -> list[Committed]:
    """Some rounds; what several of them share is read once.

    Raises:
        UserError: the index of one is gone.
    """
    pool_of = functools.cache(lambda fingerprint: load_pool(store, fingerprint))
    index_of = functools.cache(lambda folder: read_index(store, folder))
    found = []
    for manifest in manifests:
        lineage = manifest.lineage
        pool, index = pool_of(lineage["pool"]["fingerprint"]), index_of(lineage["index"])
        if index is None:
            raise UserError(
                f"{lineage['index']}/index.json: expected the index of round {manifest.round}, found none; restore it"
            )
        _, seed, super_batch_size, window_rows = lineage["windows"]["through"]
        taken = EpochRange(**lineage["windows"]["taken"])
        found.append(
            Committed(
                store=store,
                manifest=manifest,
                pool=pool,
                index=index,
                reference=EncoderSpec(**lineage["reference"]),
                learner=_spec(lineage["learner"]),
                selection=selection_of(manifest),
                steps=steps_folder(manifest.round, lineage["plan"]),
                windows=tuple(
                    windows_of(pool.shards, index.candidates, seed=seed, epoch=taken.epoch, window_rows=window_rows)
                ),
                taken=taken,
                seed=seed,
                super_batch_size=super_batch_size,
                evaluation=tuple((lineage["dedup"] or {"evaluation": ()})["evaluation"]),
            )
        )
    return found


def _spec(learner: Mapping[str, Any] | None) -> EncoderSpec | None:
    return EncoderSpec(**{name: value for name, value in learner.items() if name != "number"}) if learner else None
