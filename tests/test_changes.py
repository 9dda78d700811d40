"""What changed in a recipe since the last round: every field that decides rounds has a line, and a meaning."""

from typing import Any

from curate.jobs.changes import changes_since
from curate.recipe import Recipe
from curate.recipe_file import flat
from tests.test_manifest import manifest

FIELDS: dict[str, Any] = {
    "root": "root",
    "pool": {"path": "pool"},
    "reference": {"model": "ViT-B-32", "pretrained": "a"},
    "learner": {"model": "ViT-B-32"},
    "selection": {"sub_batch_size": 32},
}


def lines(**changes: Any) -> list[str]:
    before = Recipe.model_validate(FIELDS)
    now = Recipe.model_validate({name: FIELDS.get(name, {}) for name in FIELDS} | changes)
    made = manifest(None, number=3)
    made.lineage["recipe"] = before.of_round()
    return list(changes_since(made, now))


def test_nothing_that_rounds_do_not_depend_on_is_told() -> None:
    assert lines() == []
    assert lines(root="other", schedule={"rounds": 3}, train={"steps": 5}, resources={"workers": 2}) == []


def test_what_changed_and_what_that_means() -> None:
    assert lines(selection={"sub_batch_size": 32, "filter_ratio": 0.8}) == [
        "changed since round 3: selection.filter_ratio 0.9 → 0.8: a new epoch begins"
    ]
    (line,) = lines(reference={"model": "ViT-B-32", "pretrained": "b"})
    assert line.endswith('reference.pretrained "a" → "b": the reference embeds the pool anew, and a new epoch begins')
    (line,) = lines(selection={"sub_batch_size": 64})
    assert "batches of one size wants a root for each" in line
    found = lines(dedup={"threshold": 0.9})
    assert any(line.startswith("changed since round 3: dedup.threshold null → 0.9: near-dup") for line in found)


def test_every_field_that_decides_rounds_has_a_meaning() -> None:
    before = Recipe.model_validate(FIELDS | {"dedup": {"threshold": 0.9}})
    made = manifest(None, number=0)
    made.lineage["recipe"] = {}
    found = list(changes_since(made, before))
    known = {name for name, value in flat(before.of_round()) if value is not None}
    assert {line.split()[4] for line in found} == known
