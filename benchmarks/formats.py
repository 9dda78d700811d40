"""Reading pools of every format, beside the readers of those who made the formats, in one run.

    python -m benchmarks.formats [--rows 6000] [--repeats 5] [--json FILE]

One process, files in the page cache: image bytes and captions of all rows, none decoded. Ratios are of rows per second
to the other reader's, the median over repeats that take turns.
"""

import argparse
import io
import json
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import webdataset
from PIL import Image

from curate.formats.tar import make_index
from curate.pool.inventory import take_inventory
from curate.pool.shards import caption_bytes, image_bytes, read_batches
from curate.recipe import PoolSection

SIDE = 256
DISTINCT = 64
"""Pictures that are made; rows repeat them, for their bytes are not looked at."""


def make_pools(folder: Path, rows: int) -> int:
    """The same pairs as Parquet, as a tar and as `datasets` saves them; bytes of all pictures."""
    random = np.random.default_rng(0)
    pictures = []
    for _ in range(DISTINCT):
        small = Image.fromarray(random.integers(0, 256, (16, 16, 3), np.uint8)).resize((SIDE, SIDE))
        out = io.BytesIO()
        small.save(out, "JPEG", quality=90)
        pictures.append(out.getvalue())
    images = [pictures[row % DISTINCT] for row in range(rows)]
    captions = [f"a picture of thing {row} beside thing {row // 7}" for row in range(rows)]
    for name in ("parquet", "tar"):
        (folder / name).mkdir()
    pq.write_table(pa.table({"jpg": images, "caption": captions}), folder / "parquet/0.parquet", row_group_size=256)
    with tarfile.open(folder / "tar/0.tar", "w") as tar:
        for row, (image, caption) in enumerate(zip(images, captions, strict=True)):
            for suffix, data in (("jpg", image), ("txt", caption.encode())):
                member = tarfile.TarInfo(f"{row:08d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    features = datasets.Features({"image": datasets.Image(decode=False), "caption": datasets.Value("string")})
    saved = {"image": [{"bytes": image, "path": None} for image in images], "caption": captions}
    datasets.Dataset.from_dict(saved, features=features).save_to_disk(str(folder / "arrow"))
    return sum(map(len, images))


def ours(folder: Path) -> int:
    """Bytes read by the pool's reader."""
    pool = take_inventory(PoolSection(path=str(folder)), indices=str(folder.parent / "indices"))
    columns, total = pool.columns, 0
    for shard in pool.shards:
        for batch in read_batches(shard, [columns.image, columns.caption], batch_rows=1024):
            total += sum(map(len, image_bytes(batch.column(columns.image)).to_pylist()))
            total += sum(map(len, caption_bytes(batch.column(columns.caption)).to_pylist()))
    return total


def by_webdataset(folder: Path) -> int:
    """Bytes read by webdataset."""
    found = webdataset.WebDataset(str(folder / "0.tar"), shardshuffle=False)
    return sum(len(sample["jpg"]) + len(sample["txt"]) for sample in found)


def by_datasets(folder: Path) -> int:
    """Bytes read by `datasets`, a thousand rows at a time; Parquet as a stream, or it would become Arrow first."""
    if folder.name == "arrow":
        found = datasets.load_from_disk(str(folder))
    else:
        files = str(folder / "0.parquet")
        found = datasets.load_dataset("parquet", data_files=files, streaming=True, split="train")
    image = "image" if folder.name == "arrow" else "jpg"
    total = 0
    for batch in found.iter(1024):
        total += sum(len(one["bytes"] if isinstance(one, dict) else one) for one in batch[image])
        total += sum(len(caption.encode()) for caption in batch["caption"])
    return total


def main() -> None:
    """Make pools, read them in turn, print rows per second and ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=6000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        size = make_pools(folder, asked.rows)
        begun = time.perf_counter()
        make_index(str(folder / "tar/0.tar"))
        index_s = time.perf_counter() - begun
        sides: dict[str, dict[str, Callable[[], int]]] = {
            "tar": {"ours": lambda: ours(folder / "tar"), "webdataset": lambda: by_webdataset(folder / "tar")},
            "parquet": {
                "ours": lambda: ours(folder / "parquet"),
                "datasets": lambda: by_datasets(folder / "parquet"),
            },
            "arrow": {
                "ours": lambda: ours(folder / "arrow"),
                "datasets": lambda: by_datasets(folder / "arrow"),
            },
        }
        figures = {}
        print(f"{asked.rows:,} rows, {size / 2**20:.0f} MiB of pictures; a tar's index, once: {index_s:.2f} s")
        print(f"{'format':>8} {'ours, rows/s':>14} {'theirs, rows/s':>18} {'ratio':>6}")
        for form, readers in sides.items():
            seconds: dict[str, list[float]] = {name: [] for name in readers}
            totals = {name: read() for name, read in readers.items()}  # and into the page cache
            assert len(set(totals.values())) == 1, totals
            for _ in range(asked.repeats):
                for name, read in readers.items():
                    begun = time.perf_counter()
                    read()
                    seconds[name].append(time.perf_counter() - begun)
            mine, theirs = (statistics.median(seconds[name]) for name in readers)
            other = next(name for name in readers if name != "ours")
            figures[form] = {"ours": asked.rows / mine, other: asked.rows / theirs, "ratio": theirs / mine}
            print(f"{form:>8} {asked.rows / mine:14,.0f} {other:>10} {asked.rows / theirs:7,.0f} {theirs / mine:6.2f}")
        if asked.json:
            asked.json.write_text(json.dumps({"rows": asked.rows, "index_s": index_s, "formats": figures}, indent=1))


if __name__ == "__main__":
    main()
