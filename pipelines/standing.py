"""Where a round's learner stands beside the reference, on the fixed sample: see curate/select/standing.py."""

import contextlib
from dataclasses import dataclass, replace

import numpy as np

from curate.embed.files import contents, embedding_name, read_embeddings
from curate.errors import CommitConflictError, UserError
from curate.jest import Embeddings
from curate.pipelines.cluster import device
from curate.pipelines.embed import embed_some
from curate.pipelines.records import Round, Site
from curate.pipelines.wanted import fixed_sample
from curate.sealed import seal, unseal
from curate.select.draw import Candidates, Scale, embeddings_of, measure_standing
from curate.select.load import load_vectors
from curate.select.standing import Standing
from curate.select.windows import Rows, keyed_rows


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """The fixed sample: each content once, with finite vectors by both models."""

    rows: Rows
    learner: Embeddings
    reference: Embeddings
    unsound: int
    """Rows of the sample without."""


def decide(site: Site, round_: Round) -> Round:
    """The round, and what it chooses by where its recipe leaves that to the learner's standing.

    Raises:
        UserError: the learner makes no sound vector of any pair.
        DamagedError: an embedding file is not what was written.
        InputChangedError: a shard changed since the reference read it.
    """
    plan, recipe = round_.plan, round_.recipe
    if not recipe.selection.is_open or plan.learner is None:
        return round_
    # Whether or not it is decided: the round's quality is measured on the sample as well.
    sample = fixed_sample(round_.pool, recipe.seed, plan.reference)
    embed_some(site.store, round_.pool, plan.learner, [sample], recipe.embed, recipe.resources, site.devices)
    name = f"{round_.steps}/standing.json"
    if not site.store.exists(name):
        found = load_sample(site, round_)
        if found.unsound and not len(found.rows):
            raise UserError(
                f"round {round_.number}: expected finite embeddings of {found.unsound} sampled pairs, found none; look "
                "at the learner's weights, and publish a sound one under the next number"
            )
        measured = measure_standing(found.learner, found.reference)
        # Published, so that whoever finishes the round decides the same, whatever another device makes of last bits.
        with contextlib.suppress(CommitConflictError):
            site.store.put_if_absent(name, seal(measured.to_json()))
    return replace(round_, standing=Standing.from_json(unseal(site.store.read_bytes(name), name)))


def load_sample(site: Site, round_: Round) -> Sample:
    """The fixed sample; both models have embedded it.

    Raises:
        DamagedError: an embedding file is not what was written.
        InputChangedError: the learner saw another pair than the reference.
    """
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
    unsound = len(loaded.rows) - len(sound.rows)
    _, first = np.unique(sound.rows["content_low"], return_index=True)
    sound = sound.take(first)
    assert sound.learner is not None
    own, fixed = (
        embeddings_of(vectors, Scale(logit_scale=spec.logit_scale, logit_bias=spec.logit_bias), device())
        for vectors, spec in ((sound.learner, learner), (sound.reference, reference))
    )
    return Sample(rows=sound.rows, learner=own, reference=fixed, unsound=unsound)
