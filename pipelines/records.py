"""What the steps of a round are given: what was decided, where in the pool it is, and what there is to do it with."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from curate.dedup.files import Dedup
from curate.models.spec import EncoderSpec
from curate.pipelines.cluster import Devices
from curate.pool.shards import Pool
from curate.recipe import Recipe, SelectionSection
from curate.rounds.attempts import Stopwatch
from curate.rounds.manifest import CuratedFile, Manifest, round_folder, steps_folder
from curate.rounds.plan import Plan
from curate.select.draw import needs_learner
from curate.select.files import SubBatchStats
from curate.select.index import DUPLICATE_EXACT, Index
from curate.select.standing import Standing, as_decided
from curate.select.windows import EpochRange, Window
from curate.storage import Store
from curate.tally import Tally

NOWHERE = EpochRange(epoch=0, start=0, super_batches=0)


@dataclass(frozen=True, kw_only=True)
class Site:
    """What exists while a round runs."""

    store: Store
    devices: Devices
    watch: Stopwatch = field(default_factory=Stopwatch)
    """Of this attempt."""


@dataclass(frozen=True, kw_only=True)
class Round:
    """What a round was begun with."""

    number: int
    recipe: Recipe
    plan: Plan
    pool: Pool
    parent: tuple[Manifest, str] | None
    """The round before, and the sha256 of its manifest."""
    standing: Standing | None = None
    """Of its learner, where selection goes by it."""

    @property
    def folder(self) -> str:
        """Within the root."""
        return round_folder(self.number)

    @property
    def steps(self) -> str:
        """Folder of what its steps leave for each other."""
        return steps_folder(self.number, self.plan.digest)

    @property
    def selection(self) -> SelectionSection:
        """How sub-batches are chosen, once that is decided."""
        section = self.recipe.selection
        return section if self.standing is None else section.model_copy(update=as_decided(self.standing.decided))

    @property
    def scorer(self) -> EncoderSpec | None:
        """The learner, where selection looks at it."""
        return self.plan.learner if needs_learner(self.selection) else None

    @property
    def in_one_pass(self) -> bool:
        """Whether one pass for both models is cheaper than a second one over this round's candidates."""
        return one_pass_pays(self.recipe, self.pool.rows)


def one_pass_pays(recipe: Recipe, rows: int) -> bool:
    """Whether learner and reference had better embed a pool of so many rows in one pass."""
    if recipe.dedup is not None or recipe.selection.is_open:
        return False  # what the learner is asked for is known after the reference has seen the pool
    wanted = recipe.selection.super_batches
    return wanted is None or 2 * wanted * recipe.selection.super_batch_size >= rows


@dataclass(frozen=True, kw_only=True)
class Placed:
    """Where in the pool a round is."""

    index: Index
    dedup: Dedup | None
    windows: tuple[Window, ...] = ()
    """Of the epoch."""
    taken: EpochRange = NOWHERE
    through: Sequence[Any] = ()
    """What the windows depend on: a round that differs in it from its parent begins a new epoch."""

    @property
    def embedded(self) -> Tally:
        """Rows of the pool by what became of them when they were embedded."""
        return Tally.of("embed", self.index.statuses.items())

    @property
    def deduplicated(self) -> Tally:
        """And of those, by what became of them as duplicates."""
        dropped = Counter(self.dedup.dropped if self.dedup else {})
        dropped[DUPLICATE_EXACT] += sum(self.index.duplicates)
        return Tally(step="dedup", rows_in=self.embedded.kept, kept=sum(self.index.candidates), dropped=dropped)


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """What a round chose."""

    stats: tuple[SubBatchStats, ...]
    files: tuple[CuratedFile, ...]
