"""What a window costs in quality: super-batches of a few shards against super-batches of the whole pool.

    python -m benchmarks.windows --data FOLDER            about 6 minutes on 2 cores
    python -m benchmarks.windows --data FOLDER --json docs/scale/windows.json

FOLDER holds `openstax-physics-ml`, a physics textbook in three languages; each row's `key` is its place in the book.
The worst case for windows is a pool in the order of the book: shards of 64 rows, each on one topic. The same rows
shuffled are what `curate reshard --shuffle` makes of it. A small reference is trained on the rows, a learner has random
weights, and the product's own functions cut windows of 2 to 32 shards into super-batches of 128, from each of which 16
are drawn.

    topics    total variation distance between a super-batch's topics and the pool's: a topic is a language and a tenth
              of its book; `by chance` is that of as many rows drawn from the whole pool
    score     mean learnability of the drawn rows, each by itself, less that of all rows, in standard deviations
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch

from curate.embed.files import contents, embedding_name, read_embeddings, vectors
from curate.jest import Embeddings, diagonal_losses, jointly_sample_batch
from curate.jobs.cli import silence_open_clip
from curate.jobs.train import train
from curate.models.learners import newest_learner
from curate.models.spec import EncoderSpec
from curate.pipelines.round import run_round
from curate.pool.columns import Columns
from curate.pool.inventory import take_inventory
from curate.pool.shards import Shard
from curate.recipe import Recipe
from curate.seeds import derive_seed
from curate.select.windows import key_order, keyed_rows, windows_of
from curate.storage import Store

SHARD_ROWS, B, SUB_BATCH, EPOCHS = 64, 128, 16, 20
SIZES = (2, 4, 8, 16, 32)
STEPS = 400
MODEL = {
    "embed_dim": 64,
    "init_logit_scale": 2.302585,
    "init_logit_bias": -10,
    "vision_cfg": {"image_size": 64, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 40, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}


def embed(data: Path, base: Path) -> tuple[Embeddings, Embeddings, npt.NDArray[np.uint64], list[str]]:
    """Learner, reference, contents and topics of all rows, in the order of the book."""
    names = ["key", "jpg", "caption", "lang"]
    book = pa.concat_tables([pq.read_table(path, columns=names) for path in sorted(data.glob("*.parquet"))])
    book = book.sort_by([("lang", "ascending"), ("key", "ascending")])
    (base / "pool").mkdir()
    pq.write_table(book, base / "pool" / "book.parquet", row_group_size=256)
    (base / "model.json").write_text(json.dumps(MODEL))
    shared: dict[str, Any] = {
        "pool": {"path": str(base / "pool")},
        "learner": {"model": "model.json"},
        "selection": {"sub_batch_size": SUB_BATCH, "n_chunks": 4, "filter_ratio": 0.875, "criterion": "learnability"},
        "resources": {"device": "cpu", "workers": 2},
    }
    trained = {"root": str(base / "reference"), "train": {"data": "pool", "steps": STEPS, "publish_every": STEPS}}
    batches: dict[str, Any] = {"selection": shared["selection"] | {"sub_batch_size": 128}}
    train(Recipe.model_validate(shared | trained | batches), base=base)
    made = newest_learner(Store(str(base / "reference")))
    assert made is not None
    reference = {"model": f"local-dir:{base / 'reference' / made.encoder.folder}"}
    recipe = Recipe.model_validate(shared | {"root": str(base / "root"), "reference": reference})
    manifest = run_round(recipe, base=base)
    store, (shard,) = Store(recipe.root), take_inventory(recipe.pool).shards
    found = []
    for role in ("learner", "reference"):
        spec = EncoderSpec(**{k: v for k, v in manifest.lineage[role].items() if k != "number"})
        table = read_embeddings(store, embedding_name(spec.sha, shard), ["content", "zimg", "ztxt"])
        zimg, ztxt = (torch.from_numpy(vectors(table[name], spec.embed_dim)).float() for name in ("zimg", "ztxt"))
        found.append(Embeddings(zimg, ztxt, spec.logit_scale, spec.logit_bias))
    languages = np.array(book["lang"].to_pylist())
    rank = np.concatenate([np.arange(n) * 10 // n for n in np.unique(languages, return_counts=True)[1]])
    topics = [f"{language} {tenth}" for language, tenth in zip(languages, rank, strict=True)]
    return found[0], found[1], contents(table["content"]), topics


def super_batches(
    content: npt.NDArray[np.uint64], order: npt.NDArray[np.int64], least_shards: int | None
) -> Iterator[npt.NDArray[np.int64]]:
    """Rows of the super-batches of some epochs, as the product cuts them."""
    columns = Columns(image="jpg", caption="caption", uid=None)
    pieces = [order[i : i + SHARD_ROWS] for i in range(0, len(order) - SHARD_ROWS + 1, SHARD_ROWS)]
    shards = [
        Shard(index=i, name=f"{i}", path=f"{i}", size=1, version="1", rows=SHARD_ROWS, columns=columns)
        for i in range(len(pieces))
    ]
    for epoch in range(EPOCHS):
        windows = windows_of(
            shards,
            [SHARD_ROWS] * len(shards),
            seed=0,
            epoch=epoch,
            window_rows=None if least_shards is None else 1,
            least_shards=least_shards or 1,
        )
        for window in windows:
            rows = np.concatenate([pieces[i] for i in window.shards])
            keyed = keyed_rows(content[rows], 0, rows, seed=0, epoch=epoch)
            rows = keyed["row"][key_order(keyed)]
            yield from (rows[i : i + B] for i in range(0, len(rows) - B + 1, B))


def measure(
    learner: Embeddings, reference: Embeddings, topics: npt.NDArray[np.int64], found: Iterator[npt.NDArray[np.int64]]
) -> dict[str, float]:
    """Mean distance of topics and mean score over some super-batches."""
    share = np.bincount(topics) / len(topics)
    score = (diagonal_losses(learner, "sigmoid") - diagonal_losses(reference, "sigmoid")).numpy()
    distances, scores = [], []
    for number, rows in enumerate(found):
        distances.append(np.abs(np.bincount(topics[rows], minlength=len(share)) / len(rows) - share).sum() / 2)
        own, ref = (Embeddings(e.zimg[rows], e.ztxt[rows], e.logit_scale, e.logit_bias) for e in (learner, reference))
        drawn = jointly_sample_batch(
            own,
            ref,
            sub_batch_size=SUB_BATCH,
            n_chunks=4,
            generator=torch.Generator().manual_seed(derive_seed(0, "draw", number)),
        )
        scores.append(score[rows[drawn.positions.numpy()]].mean())
    return {
        "super_batches": len(distances),
        "topics": round(float(np.mean(distances)), 4),
        "score": round(float((np.mean(scores) - score.mean()) / score.std()), 4),
        "score_error": round(float(np.std(scores) / score.std() / np.sqrt(len(scores))), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of openstax-physics-ml")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    silence_open_clip()
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    with tempfile.TemporaryDirectory() as scratch:
        learner, reference, content, names = embed(arguments.data, Path(scratch))
    topics = np.unique(names, return_inverse=True)[1]
    book, rng = np.arange(len(topics)), np.random.default_rng(0)
    found: list[dict[str, Any]] = []
    by_chance = (rng.choice(len(topics), B, replace=False) for _ in range(500))
    found.append({"pool": "by chance", "shards": None} | measure(learner, reference, topics, by_chance))
    for pool, order in (("in the order of the book", book), ("shuffled", rng.permutation(book))):
        for shards in (*SIZES, None):
            one = {"pool": pool, "shards": shards}
            found.append(one | measure(learner, reference, topics, super_batches(content, order, shards)))
    for one in found:
        print("  ".join(f"{name} {value}" for name, value in one.items()))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
