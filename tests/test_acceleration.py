"""The benchmark's loop in one process is the product's loop, and its arithmetic is right."""

import json
import math
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from benchmarks.acceleration.loop import ArmSection, Loop, Reference, embed
from benchmarks.acceleration.sets import WANTED, SetSection, load_pairs, make_set
from curate.encoder import Encoder, create_model, load_encoder
from curate.learner import read_learner
from curate.manifest import read_manifest
from curate.reader import CuratedReader
from curate.recipe import EncoderSection, Recipe
from curate.select import Scale
from curate.spec import EncoderSpec
from curate.storage import Store
from jobs.train import train
from pipelines.round import run_round
from tests.helpers import CPU, write_tiny

torch.set_num_threads(1)
ROUNDS, SUPER_BATCHES, b = 3, 6, 8


@pytest.mark.usefixtures("ray_local")
@pytest.mark.timeout(240)
def test_the_loop_in_one_process_trains_on_the_batches_that_the_product_chooses(tmp_path: Path):
    """Same rows in the same order and the same losses, while both learners learn from what they chose."""
    make_set(SetSection(source="drawn", rows=240, swapped_share=0.3, held_out_rows=8), tmp_path / "set", seed=3, data=None)
    write_tiny(tmp_path, "reference.json")
    write_tiny(tmp_path, "learner.json", embed_dim=24)
    recipe = Recipe.model_validate(
        {
            "root": str(tmp_path / "root"),
            "seed": 5,
            "pool": {"path": str(tmp_path / "set" / "pool"), "uid": "key"},
            "reference": {"model": "reference.json"},
            "learner": {"model": "learner.json"},
            # All candidates are walked in each round, so that both embed the same rows in the same forward passes.
            "selection": {"sub_batch_size": b, "n_chunks": 4, "super_batches": SUPER_BATCHES},
            "train": {"learning_rate": 3e-3, "warmup_steps": 2},
            "resources": {"workers": 1},
        }
    )
    losses = []
    for _ in range(ROUNDS):
        run_round(recipe, base=tmp_path)
        losses += train(recipe, base=tmp_path).losses
    chosen = [[int(uid) for uid in batch.uids] for batch in CuratedReader(recipe.root)]

    found = read_manifest(Store(recipe.root), 0)
    assert found is not None
    reference = load_encoder(Store(recipe.root), EncoderSpec(**found[0].lineage["reference"]), CPU)
    pool = load_pairs(tmp_path / "set" / "pool", reference)
    model, _, tokenizer = create_model(recipe.learner, role="learner", base=tmp_path, seed=recipe.seed)
    loop = Loop(
        pool,
        model,
        tokenizer,
        read_learner(Store(recipe.root), 0).encoder,
        Reference(
            vectors=embed(reference, pool, np.arange(len(pool))),
            scale=Scale(logit_scale=reference.spec.logit_scale, logit_bias=reference.spec.logit_bias),
        ),
        ArmSection(selection=recipe.selection, round_steps=SUPER_BATCHES),
        recipe.train,
        rows=np.arange(len(pool)),
        seed=recipe.seed,
        device=CPU,
    )
    again, again_losses = [], []
    for _, rows in zip(range(ROUNDS * SUPER_BATCHES), loop.batches(), strict=False):
        again.append(rows.tolist())
        again_losses.append(loop.train(rows))
    assert again == chosen
    assert again_losses == losses
    assert loop.account.learner_scored == loop.account.candidates == ROUNDS * 240
