"""Why joint selection of crowded, clean pairs is no better: what its batches are like.

    python -m benchmarks.acceleration.crowding OUT        # of a study that has run its crowded plan; half a minute

For each method the learnability of sub-batches (loss of the learner minus that of the reference), the reference's loss,
and how many of a batch's 8,128 pairs of captions name the same things, in whatever words.
"""

import argparse
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from benchmarks.acceleration.config import load_study
from benchmarks.acceleration.loop import embed
from benchmarks.acceleration.study import HERE, Job, load_parts, load_reference, make_model, spec_of
from curate.jest import jointly_sample_batch, sub_batch_loss
from curate.models.encoder import Encoder
from curate.select.draw import Scale, embeddings_of

THING = re.compile(r"a ((?:small|large) \w+ \w+)")
METHODS: dict[str, dict[str, Any]] = {
    "uniform": {"method": "uniform"},
    "independent": {"method": "independent"},
    "joint": {},
    "joint, one by one": {"n_chunks": 128},
}
b, DRAWS = 128, 4


@dataclass(frozen=True)
class Drawn:
    """Of one sub-batch."""

    learnability: float
    reference_loss: float
    same: int


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="--out of the study")
    out = parser.parse_args().out
    torch.set_num_threads(1)
    study = load_study(HERE / "study.toml")
    plan = next(plan for plan in study.plans if plan.set == "crowded")
    arm, seed = "joint learnability, f 0.8", plan.seeds[0]
    job = Job(study=study, plan=plan, arm=arm, seed=seed, out=out, data=None, device="cpu")
    assert job.warm_path is not None, "the crowded plan begins with warm learners"
    model, config, tokenizer = make_model(job, 0)
    model.load_state_dict(torch.load(job.warm_path))
    learner = Encoder(spec_of(model, config), model, tokenizer, torch.device("cpu"))
    pool = load_parts(job)["pool"]
    reference = load_reference(job)
    shards = sorted((job.set_folder / "pool").glob("*.parquet"))
    captions = [text for path in shards for text in pq.read_table(path, columns=["caption"])["caption"].to_pylist()]
    said = [tuple(sorted(THING.findall(caption))) for caption in captions]
    own_scale = Scale(logit_scale=learner.spec.logit_scale, logit_bias=learner.spec.logit_bias)
    zimg, ztxt = reference.vectors
    print("| f | method | learnability | reference's loss | say the same |\n|---|---|---|---|---|")
    for B in (5 * b, 10 * b):
        found: dict[str, list[Drawn]] = {name: [] for name in METHODS}
        for draw in range(DRAWS):
            rows = np.sort(np.random.default_rng(draw).permutation(len(pool))[:B])
            own = embeddings_of(embed(learner, pool, rows), own_scale, learner.device)
            ref = embeddings_of((zimg[rows], ztxt[rows]), reference.scale, learner.device)
            for name, how in METHODS.items():
                generator = torch.Generator().manual_seed(draw)
                chosen = jointly_sample_batch(own, ref, sub_batch_size=b, generator=generator, **how).positions
                loss = sub_batch_loss(ref, chosen, loss="sigmoid")
                counts = Counter(said[row] for row in rows[chosen.numpy()])
                same = sum(n * (n - 1) // 2 for n in counts.values())
                found[name].append(Drawn(sub_batch_loss(own, chosen, loss="sigmoid") - loss, loss, same))
        for name, drawn in found.items():
            learnability, loss, same = np.mean([(d.learnability, d.reference_loss, d.same) for d in drawn], axis=0)
            print(f"| {1 - b / B:.1f} | {name} | {learnability:.2f} | {loss:.2f} | {same:.0f} |")


if __name__ == "__main__":
    main()
