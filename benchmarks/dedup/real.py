"""Near-duplicates among real pictures: a textbook in three languages, and emoji in four drawing styles.

    python -m benchmarks.dedup.real DATA OUT           about 45 minutes on 2 cores, nearly all of it training

DATA holds the sets `openstax-physics-ml`, `openstax-dev` and `emoji-en` (docs/dedup.md says what they are). No model
is downloaded: for each set `curate train` makes a reference of 1.7 million weights beside its vocabulary's, on the
set's own pairs, for 1,500 steps of 128. OUT receives the models, roots, sheets of groups, figures.json and emoji.png;
what is there is not made again.

Of the textbook: whether pictures that are one file in several languages are all found, and which share of the
near-duplicates are one figure with other labels (`concept` tells). Of the emoji: at which threshold the four styles of
a concept meet, the skin tones of a concept in one style, and concepts that differ.
"""

import argparse
import json
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from curate.dedup.files import read_dedup, read_dropped
from curate.dedup.neighbours import unit_rows
from curate.embed.files import embedding_name, read_embeddings, vectors
from curate.pool.shards import load_pool
from curate.storage import Store

mpl.use("agg")
from matplotlib import pyplot as plt

BOOK, EMOJI = "openstax-physics-ml", "emoji-en"
TRAINED_ON = {BOOK: [BOOK, "openstax-dev"], EMOJI: [EMOJI]}
MODEL = {
    "embed_dim": 256,
    "init_logit_scale": 2.302585,
    "init_logit_bias": -10,
    "vision_cfg": {"image_size": 64, "layers": 4, "width": 128, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 28, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 2},
}
STEPS = 1500
THRESHOLDS = (0.9, 0.95, 0.98, 0.99, 0.995, 0.998)
SHEET = 0.995
SKIN_TONES = {f"1F3F{digit}" for digit in "BCDEF"}

RECIPE = """
root = "{root}"
[pool]
path = {paths}
uid = "key"
[reference]
model = "{model}"
[learner]
model = "{model}"
[selection]
sub_batch_size = 128
[train]
data = "pool"
steps = {steps}
warmup_steps = 50
publish_every = {steps}
[dedup]
threshold = {threshold}
"""

Floats = npt.NDArray[np.float32]


def curate(out: Path, name: str, verb: list[str], **fields: Any) -> str:
    """Run a verb of the command line on a recipe of its own."""
    recipe = out / f"{name}.toml"
    fields = {"steps": STEPS, "threshold": 0.95} | fields
    recipe.write_text(RECIPE.format(root=out / "roots" / name, **fields))
    command = [sys.executable, "-m", "curate.jobs.cli", verb[0], str(recipe), *verb[1:]]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def reference(data: Path, out: Path, name: str) -> str:
    """Train the set's reference if it is not there; returns what a recipe calls it."""
    model = out / f"{name}-model"
    (out / "small.json").write_text(json.dumps(MODEL))
    if not model.exists():
        paths = json.dumps([str(data / part) for part in TRAINED_ON[name]])
        curate(out, f"train-{name}", ["train", "--save-to", str(model)], paths=paths, model="small.json")
    return f"local-dir:{model}"


def embedded(
    data: Path, out: Path, pool: str, model: str, name: str
) -> tuple[dict[str, list[Any]], Floats, list[bytes]]:
    """Columns of a set, its images as a model embeds them, and hashes of the files."""
    paths = json.dumps([str(data / pool)])
    found = json.loads(curate(out, name, ["dedup", "--json"], paths=paths, model=model))
    store = Store(str(out / "roots" / name))
    inventory = load_pool(store, found["folder"].rpartition("/")[2])
    (sha,) = (name.rpartition("/")[2] for name in store.list("embeddings"))
    tables = [
        read_embeddings(store, embedding_name(sha, shard), ["status", "picture", "zimg"]) for shard in inventory.shards
    ]
    table = pa.concat_tables(tables)
    assert set(table["status"].to_pylist()) == {"ok"}
    rows = pa.concat_tables([pq.read_table(shard.path) for shard in inventory.shards]).drop_columns(["jpg"]).to_pydict()
    width = table["zimg"].type.list_size
    return rows, unit_rows(vectors(table["zimg"], width)), table["picture"].to_pylist()


def book(data: Path, out: Path) -> dict[str, Any]:
    model = reference(data, out, BOOK)
    rows, z, pictures = embedded(data, out, BOOK, model, BOOK)
    concept = np.array(rows["concept"])
    cosine = np.triu(z @ z.T, 1)
    _, picture = np.unique(np.array(pictures), return_inverse=True)
    other = picture[:, None] != picture[None]
    same = concept[:, None] == concept[None]
    pairs = {}
    for threshold in THRESHOLDS:
        near = other & (cosine >= threshold)
        pairs[threshold] = {"one_figure": int((near & same).sum()), "other_figures": int((near & ~same).sum())}

    paths = json.dumps([str(data / BOOK)])
    sheet = ["dedup", "--json", "--sheet", str(out / "book.html"), "--groups", "50"]
    found = json.loads(curate(out, BOOK, sheet, paths=paths, model=model, threshold=SHEET))
    store = Store(str(out / "roots" / BOOK))
    inventory = load_pool(store, found["folder"].rpartition("/")[2])
    dedup = read_dedup(store, found["folder"])
    assert dedup is not None
    starts = np.cumsum([0, *(shard.rows for shard in inventory.shards)])
    dropped = pa.concat_tables([read_dropped(store, dedup.folder, shard) for shard in inventory.shards]).to_pydict()
    left = np.ones(len(concept), bool)
    left[starts[dropped["shard"]] + np.array(dropped["row"])] = False
    representative = starts[dropped["representative_shard"]] + np.array(dropped["representative_row"])
    groups: dict[int, set[str]] = {}
    for row, head, why in zip(np.flatnonzero(~left), representative, dropped["reason"], strict=True):
        if why == "near_duplicate":
            groups.setdefault(int(head), {concept[head]}).add(concept[row])
    files = np.bincount(picture)
    return {
        "rows": len(concept),
        "files_several_times": int((files > 1).sum()),
        "their_rows": int(files[files > 1].sum()),
        "copies": int((files - 1).sum()),
        "found_as_copies": dedup.dropped.get("duplicate_exact", 0) + dedup.dropped.get("duplicate_image", 0),
        "files_left_several_times": int((np.bincount(picture[left]) > 1).sum()),
        "pairs_of_other_files": int((same & other).sum() // 2),
        "pairs": pairs,
        "sheet": {
            "threshold": SHEET,
            "dropped": dict(dedup.dropped),
            "groups": len(groups),
            "of_one_figure": sum(len(some) == 1 for some in groups.values()),
        },
    }


def emoji(data: Path, out: Path) -> dict[str, Any]:
    models = {
        "trained on these emoji": reference(data, out, EMOJI),
        "trained on a physics book": reference(data, out, BOOK),
        "random weights": "small.json",
    }
    thresholds = np.round(np.arange(0.5, 1.0001, 0.005), 3)
    curves: dict[str, dict[str, list[float]]] = {}
    for label, model in models.items():
        name = f"emoji-{label.replace(' ', '-')}"
        rows, z, _ = embedded(data, out, EMOJI, model, name)
        curves[label] = {key: value.tolist() for key, value in emoji_curves(rows, z, thresholds).items()}
    plot(thresholds, curves, out / "emoji.png")
    return {"thresholds": thresholds.tolist(), "curves": curves}


def emoji_curves(rows: dict[str, list[Any]], z: Floats, thresholds: npt.NDArray[np.float64]) -> dict[str, Any]:
    """Shares, by threshold: of concepts, of pairs of skin tones, of rows."""
    concepts, vendors = np.array(rows["concept"]), np.array(rows["vendor"])
    base = np.array(["-".join(part for part in c.split("-") if part not in SKIN_TONES) for c in concepts.tolist()])
    styles, tones = [], []
    for concept in np.unique(concepts):
        four = np.flatnonzero(concepts == concept)
        if len(four) == 4:
            styles.append(weakest_link(z[four] @ z[four].T))
    for one in np.unique(base):
        for vendor in np.unique(vendors):
            drawn = np.flatnonzero((base == one) & (vendors == vendor))
            tones += [float(z[i] @ z[j]) for i, j in combinations(drawn.tolist(), 2)]
    cosine = z @ z.T
    cosine[base[:, None] == base[None]] = -1
    found = {"styles": np.array(styles), "skin tones": np.array(tones), "other concepts": cosine.max(axis=1)}
    return {key: (value[:, None] >= thresholds).mean(axis=0).round(4) for key, value in found.items()}


def weakest_link(cosine: Floats) -> float:
    """The highest threshold at which all rows are one component: the weakest edge of a maximum spanning tree."""
    inside, weakest = {0}, 1.0
    while len(inside) < len(cosine):
        reach = {j: max(float(cosine[i, j]) for i in inside) for j in range(len(cosine)) if j not in inside}
        nearest = max(reach, key=lambda j: reach[j])
        weakest = min(weakest, reach[nearest])
        inside.add(nearest)
    return weakest


def plot(thresholds: npt.NDArray[np.float64], curves: dict[str, dict[str, list[float]]], path: Path) -> None:
    meaning = {
        "styles": "concepts whose four styles are one group",
        "skin tones": "pairs of skin tones of one concept and style",
        "other concepts": "rows near another concept",
    }
    figure, axes = plt.subplots(1, len(curves), figsize=(12, 3.8), sharey=True)
    for axis, (label, lines) in zip(axes, curves.items(), strict=True):
        for key, shares in lines.items():
            axis.plot(thresholds, shares, label=meaning[key])
        axis.set(title=f"reference: {label}", xlabel="threshold (cosine)", xlim=(0.5, 1), ylim=(0, 1))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("share")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="lower center", ncol=len(meaning))
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of the sets")
    parser.add_argument("out", type=Path, help="folder for models, roots and figures")
    arguments = parser.parse_args()
    data, out = arguments.data.resolve(), arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    found = {"book": book(data, out), "emoji": emoji(data, out)}
    (out / "figures.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found["book"], indent=1))


if __name__ == "__main__":
    main()
