"""The plan of a round: what it was begun with, pinned so that whoever finishes it does the same."""

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from curate.criteria import Decided
from curate.errors import DamagedError, UserError
from curate.messages import gathered
from curate.models.learners import newest_learner
from curate.models.spec import EncoderSpec
from curate.pool.inventory import take_inventory
from curate.pool.shards import Pool, load_pool
from curate.recipe import DeviceType, PoolSection, Recipe, SelectionSection
from curate.rounds.manifest import last_round, read_manifest, round_folder
from curate.sealed import seal, unseal
from curate.select.draw import needs_learner
from curate.select.standing import as_decided
from curate.storage import Store

OF_WEIGHTS = ("local-dir:", "hf-hub:")
"""How models begin that have weights of their own; others have random ones, unless `pretrained` names some."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that a round depends on and that may change under it while it runs."""

    recipe: dict[str, Any]
    """As `Recipe.of_round` gives it."""
    recipe_fingerprint: str
    pool: str
    """Fingerprint; the inventory is `pools/<fingerprint>.json`."""
    reference: EncoderSpec
    learner: EncoderSpec | None
    """None if no round of such a recipe looks at it."""
    learner_number: int | None
    """Of the newest learner; None if there is none, as there need not be where selection does not look at it."""
    evaluation: tuple[str, ...] = ()
    """Fingerprints of the sets whose images must not be trained on; these inventories are in `pools/`, too."""

    def to_bytes(self) -> bytes:
        """JSON for the root."""
        record = asdict(self) | {"reference": self.reference.to_json()}
        if self.learner is not None:
            record["learner"] = self.learner.to_json()
        if not self.evaluation:
            del record["evaluation"]  # plans of rounds that were begun before there were any
        return seal(record)

    @property
    def digest(self) -> str:
        """Names the steps that were taken by this plan, so that no other plan mistakes them for its own."""
        return hashlib.sha256(self.to_bytes()).hexdigest()[:12]

    @classmethod
    def from_bytes(cls, data: bytes, name: str) -> "Plan":
        """The inverse of `to_bytes`; `name` is for messages."""
        record = unseal(data, name)
        reference, learner = record.pop("reference"), record.pop("learner")
        return cls(
            reference=EncoderSpec(**reference),
            learner=EncoderSpec(**learner) if learner else None,
            evaluation=tuple(record.pop("evaluation", ())),
            **record,
        )


def plan_name(number: int) -> str:
    """Name of a round's plan within the root: a round that has one was begun."""
    return f"{round_folder(number)}/plan.json"


def pin_plan(
    store: Store,
    recipe: Recipe,
    *,
    base: Path,
    number: int,
    device_type: DeviceType = "cpu",
    progress: Callable[[Iterable[Any], int], Iterable[Any]] | None = None,
) -> Plan:
    """The plan that a round was begun with, else one made now from recipe, pool and newest learner.

    Args:
        store: the root.
        recipe: the whole recipe.
        base: the recipe's folder.
        number: of the round.
        device_type: what models run on, which decides what `precision = "auto"` means.
        progress: as `take_inventory` takes it.

    Raises:
        UserError: mistakes in pool or models, all together; or another recipe than the round was begun with.
        CommitConflictError: somebody else is beginning this round differently.
    """
    name = plan_name(number)
    if not store.exists(name):
        store.put_if_absent(name, _make(store, recipe, base, device_type, progress).to_bytes())
    plan = Plan.from_bytes(store.read_bytes(name), name)
    if plan.recipe_fingerprint != recipe.fingerprint():
        changed = "; ".join(_differences(plan.recipe, recipe.of_round())) or "that of another version"
        raise UserError(
            f"{name}: this round was begun with another recipe ({changed}); finish it with that one, or delete "
            f"{round_folder(number)} to begin it anew"
        )
    return plan


def _make(
    store: Store,
    recipe: Recipe,
    base: Path,
    device_type: DeviceType,
    progress: Callable[[Iterable[Any], int], Iterable[Any]] | None,
) -> Plan:
    # Only who begins a round makes models; importing open_clip takes several seconds.
    from curate.models.publish import first_learner  # noqa: PLC0415

    known = known_inventory(store)
    mistakes: list[str] = []
    pool = reference = learner = None
    evaluation: list[Pool] = []
    with gathered(mistakes):
        pool = take_inventory(recipe.pool, progress=progress, known=known, indices=indices_of(store))
    with gathered(mistakes):
        evaluation = evaluation_sets(recipe, indices=indices_of(store))
    with gathered(mistakes):
        reference = store_reference(store, recipe, base=base, device_type=device_type)
    if mistakes or pool is None or reference is None:
        raise UserError(*mistakes, *_learner_mistakes(recipe, base))
    # Last, because it publishes: learner 0 must not outlive a recipe that is about to be mended.
    if needs_learner(recipe.selection):
        learner = first_learner(store, recipe.learner, base=base, seed=recipe.seed, device_type=device_type)
    newest = learner or newest_learner(store)
    for seen in (pool, *evaluation):
        if seen != known:  # which lies there already
            store.put_bytes(f"pools/{seen.fingerprint}.json", seen.to_bytes())
    return Plan(
        recipe=recipe.of_round(),
        recipe_fingerprint=recipe.fingerprint(),
        pool=pool.fingerprint,
        reference=reference,
        learner=learner_as_scored(learner.encoder, recipe) if learner else None,
        learner_number=newest.number if newest else None,
        evaluation=tuple(seen.fingerprint for seen in evaluation),
    )


def foreseen_selection(store: Store, recipe: Recipe) -> SelectionSection:
    """How the next round will choose: where that is left to the learner's standing, as the last round did.

    Before there is one, by easy-reference with a learner of random weights, else by learnability, which costs most.
    """
    section, learner = recipe.selection, recipe.learner
    if not section.is_open:
        return section
    parent, newest = read_manifest(store, last_round(store)), newest_learner(store)
    decided: Decided = "learnability"
    if parent is not None and (standing := parent[0].quality.get("standing")):
        decided = standing["decided"]
    elif not ((newest and newest.step) or learner.pretrained or learner.model.startswith(OF_WEIGHTS)):
        decided = "easy_reference"
    return section.model_copy(update=as_decided(decided))


def known_inventory(store: Store) -> Pool | None:
    """The inventory of the newest round, if it can be read: footers that it tells of need not be read again."""
    newest = read_manifest(store, last_round(store))
    with contextlib.suppress(FileNotFoundError, DamagedError):
        return load_pool(store, newest[0].lineage["pool"]["fingerprint"]) if newest else None
    return None


def store_reference(store: Store, recipe: Recipe, *, base: Path, device_type: DeviceType) -> EncoderSpec:
    """Store the recipe's reference in the root; named as `reference_as_scored` has it.

    Args:
        store: the root.
        recipe: the whole recipe.
        base: its folder.
        device_type: what it runs on.

    Raises:
        UserError: the recipe names none; or as `store_encoder`.
    """
    from curate.models.encoder import store_encoder  # noqa: PLC0415

    section = recipe.reference
    if section is None:
        raise UserError("reference: must be given for a round; add [reference] with model and pretrained")
    spec = store_encoder(store, section, role="reference", base=base, seed=recipe.seed, device_type=device_type)
    return reference_as_scored(store, spec, recipe)


def reference_as_scored(store: Store, spec: EncoderSpec, recipe: Recipe) -> EncoderSpec:
    """The recipe's reference on the recipe's pixels, in the precision that it names.

    With `precision = "auto"` it stays at that of the newest round, or a cluster that once has no GPU would have the
    whole pool embedded again in another one.
    """
    spec = replace(spec, exact_pixels=recipe.embed.exact_pixels)
    newest = read_manifest(store, last_round(store))
    if newest is None or recipe.reference is None or recipe.reference.precision != "auto":
        return spec
    before = EncoderSpec(**newest[0].lineage["reference"])
    return replace(spec, precision=before.precision) if before.model == spec.model else spec


def learner_as_scored(learner: EncoderSpec, recipe: Recipe) -> EncoderSpec:
    """The learner on the recipe's pixels, at the size and in the precision that it names.

    Without these it is scored at its own size, and in the precision which it was published with.
    """
    learner = replace(learner, exact_pixels=recipe.embed.exact_pixels, image_size=recipe.learner.scoring_resolution)
    precision = recipe.learner.precision
    return learner if precision == "auto" else replace(learner, precision=precision)


def indices_of(store: Store) -> str:
    """Where a root keeps the indices of tars, for all machines."""
    return f"{store.url}/indices"


def evaluation_sets(recipe: Recipe, *, indices: str | None = None) -> list[Pool]:
    """Inventories of the sets that the recipe keeps out of the pool; `indices` as `take_inventory` has it.

    Raises:
        UserError: mistakes in any of them, all together.
    """
    found: list[Pool] = []
    mistakes: list[str] = []
    for held_out in recipe.dedup.evaluation if recipe.dedup else ():
        with gathered(mistakes):
            section = PoolSection(**held_out.model_dump())
            found.append(take_inventory(section, section_name="dedup.evaluation", indices=indices))
    if mistakes:
        raise UserError(*mistakes)
    return found


def _learner_mistakes(recipe: Recipe, base: Path) -> Sequence[str]:
    """What is wrong with the recipe's learner, without publishing it."""
    from curate.models.create import create_model  # noqa: PLC0415

    try:
        if needs_learner(recipe.selection):
            create_model(recipe.learner, role="learner", base=base, seed=recipe.seed)
    except UserError as error:
        return error.lines
    return ()


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """`field: old → new` for every field that differs."""
    found = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            found += _differences(before, after, f"{prefix}{key}.")
        elif before != after:
            found.append(f"{prefix}{key}: {before!r} → {after!r}")
    return found
