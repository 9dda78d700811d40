"""Where a round's learner stands beside the reference, on the fixed sample: see curate/select/standing.py."""

from dataclasses import dataclass, replace

import numpy as np

from curate.embed.files import contents, embedding_name, read_embeddings
from curate.jest import Embeddings
from curate.sealed import seal, unseal
from curate.select.draw import Candidates, Scale, embeddings_of, measure_standing
from curate.select.standing import Standing
from curate.select.windows import Rows, keyed_rows
from pipelines.cluster import device
from pipelines.embed import embed_some
from pipelines.records import Round, Site
from pipelines.select import load_vectors
from pipelines.wanted import fixed_sample


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """The fixed sample: each content once, with finite vectors by both models."""

    rows: Rows
    learner: Embeddings
    reference: Embeddings


def decide(site: Site, round_: Round) -> Round:
    """The round, and what it chooses by where its recipe leaves that to the learner's standing."""
    plan, recipe = round_.plan, round_.recipe
    if recipe.selection.criterion != "auto" or plan.learner is None:
        return round_
    name = f"{round_.steps}/standing.json"
    # Kept, so that one who finishes the round on another device decides the same, whatever its last bits are.
    if not site.store.exists(name):
        sample = fixed_sample(round_.pool, recipe.seed, plan.reference)
        embed_some(site.store, round_.pool, plan.learner, [sample], recipe.embed, recipe.resources, site.devices)
        found = load_sample(site, round_)
        site.store.put_bytes(name, seal(measure_standing(found.learner, found.reference).to_json()))
    return replace(round_, standing=Standing.from_json(unseal(site.store.read_bytes(name), name)))


def load_sample(site: Site, round_: Round) -> Sample:
    """The fixed sample; both models have embedded it."""
    learner, reference = round_.plan.learner, round_.plan.reference
    assert learner is not None
    sample = fixed_sample(round_.pool, round_.recipe.seed, reference)
    scope = "" if round_.in_one_pass else sample.scope
    found = []
    for index in sample.shards:
        shard = round_.pool.shards[index]
        at = sample.rows(site.store, shard)
        table = read_embeddings(site.store, embedding_name(reference.sha, shard), ["content"])
        rows = keyed_rows(contents(table["content"])[at], index, at, seed=0, epoch=0)
        found.append(load_vectors(site.store, shard, rows, reference, learner, scope))
    loaded = Candidates.concatenate(found)
    sound = loaded.take(loaded.finite_rows())
    _, first = np.unique(sound.rows["content_low"], return_index=True)
    sound = sound.take(first)
    assert sound.learner is not None
    own, fixed = (
        embeddings_of(vectors, Scale(logit_scale=spec.logit_scale, logit_bias=spec.logit_bias), device())
        for vectors, spec in ((sound.learner, learner), (sound.reference, reference))
    )
    return Sample(rows=sound.rows, learner=own, reference=fixed)
