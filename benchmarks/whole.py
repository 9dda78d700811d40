"""The embedding step as a whole, from an empty process to the last file, beside what one would write by hand.

    python -m benchmarks.whole                                   # ours, a hand-written job, a bare loop; 20 minutes
    python -m benchmarks.whole --only ours,hand --rows 8000 --pairs 5
    uv pip install --target daft --no-deps daft==0.7.26
    python -m benchmarks.whole --only ours,daft --daft daft

Each side embeds the same drawn pictures with the same weights on the same cores, with an actor or process on each, in
a fresh process; sides take turns. `whole` is the time of that process; `start` that of the same over two rows a core,
which is imports, Ray and the model; `work` is the difference. CPU seconds are those of all its processes, Ray's own
included: they depend less on who else uses the machine.
"""

import argparse
import contextlib
import ctypes
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import psutil

BATCH = 256
SAMPLE_S = 0.5
PR_SET_CHILD_SUBREAPER = 36


# --- the sides -------------------------------------------------------------------------------------------------------


def ours(root: Path, pool: Path, actors: int) -> None:
    """The step of a round."""
    from curate.models.spec import EncoderSpec
    from curate.pipelines.cluster import CPUS, connect
    from curate.pipelines.embed import embed_pool
    from curate.pool.inventory import take_inventory
    from curate.recipe import EmbedSection, PoolSection, ResourcesSection
    from curate.storage import Store

    connect("local")
    spec = EncoderSpec(**json.loads((root / "spec.json").read_text()))
    resources = ResourcesSection(device="cpu", workers=actors)
    shards = take_inventory(PoolSection(path=str(pool), uid="key"))
    embed_pool(Store(str(root)), shards, [spec], EmbedSection(), resources, CPUS)


class ByHand:
    """open_clip as its README has it: pictures through its transform, captions through its tokenizer."""

    def __init__(self, folder: str) -> None:
        import open_clip
        import torch

        torch.set_num_threads(1)
        self.model, _, self.transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
        self.model.eval()
        self.tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")

    def embed(self, images: list[bytes], captions: list[str]) -> tuple[Any, Any]:
        """Pictures and captions, float16 [n, D] each."""
        import numpy as np
        import torch
        from PIL import Image

        with torch.inference_mode():
            x = torch.stack([self.transform(Image.open(io.BytesIO(data)).convert("RGB")) for data in images])
            zimg = self.model.encode_image(x, normalize=True)
            ztxt = self.model.encode_text(self.tokenizer(captions), normalize=True)
        return zimg.numpy().astype(np.float16), ztxt.numpy().astype(np.float16)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """What Ray Data calls."""
        zimg, ztxt = self.embed(list(batch["jpg"]), list(batch["caption"]))
        return {"key": batch["key"], "zimg": zimg, "ztxt": ztxt}


class Fused(ByHand):
    """A stage as NeMo Curator fuses them: a task is a file, and one actor reads, decodes, embeds, filters, writes."""

    def __init__(self, folder: str, out: str) -> None:
        super().__init__(folder)
        self.out = Path(out)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """What Ray Data calls."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        for path in batch["item"]:
            kept = []
            for rows in pq.ParquetFile(path).iter_batches(BATCH, columns=["key", "jpg", "caption"]):
                zimg, ztxt = self.embed(rows["jpg"].to_pylist(), rows["caption"].to_pylist())
                near = (zimg * ztxt).sum(axis=1) > -1
                vectors = [pa.array(list(z[near])) for z in (zimg, ztxt)]
                kept.append(pa.table([rows["key"].filter(pa.array(near)), *vectors], ["key", "zimg", "ztxt"]))
            pq.write_table(pa.concat_tables(kept), self.out / Path(path).name)
        return {"item": batch["item"]}


def _ray(actors: int) -> None:
    import ray
    import ray.data

    ray.init(address="local", num_cpus=actors + 2, include_dashboard=False, log_to_driver=False)
    context = ray.data.DataContext.get_current()
    context.use_datasource_v2 = False  # which takes several times as long on a small machine
    context.enable_progress_bars = False


def hand(root: Path, pool: Path, actors: int) -> None:
    """What a user of Ray Data would write."""
    _ray(actors)
    import ray.data

    rows = ray.data.read_parquet(
        str(pool), columns=["key", "jpg", "caption"], override_num_blocks=len(os.listdir(pool))
    )
    rows.map_batches(
        ByHand, fn_constructor_args=(_folder(root),), batch_size=BATCH, num_cpus=0.9, concurrency=actors
    ).write_parquet(str(root / "out"))


def fused(root: Path, pool: Path, actors: int) -> None:
    """The same work as one stage over files."""
    _ray(actors)
    import ray.data

    (root / "out").mkdir()
    files = sorted(str(path) for path in pool.iterdir())
    ray.data.from_items(files, override_num_blocks=len(files)).map_batches(
        Fused, fn_constructor_args=(_folder(root), str(root / "out")), batch_size=1, num_cpus=0.9, concurrency=actors
    ).materialize()


def daft(root: Path, pool: Path, actors: int) -> None:
    """The same class as a function of Daft's, in processes of its own.

    Pictures as its own decoder makes them (0.7.26) were not given to other processes, and one does less than two.
    """
    import daft as df  # type: ignore[import-not-found, unused-ignore]

    vector = df.DataType.list(df.DataType.float32())

    class Embed(ByHand):
        def both(self, images: Any, captions: Any) -> Any:
            found = self.embed(images.to_pylist(), captions.to_pylist())
            return [{"zimg": one, "ztxt": other} for one, other in zip(*(z.tolist() for z in found), strict=True)]

    both = df.method.batch(return_dtype=df.DataType.struct({"zimg": vector, "ztxt": vector}), batch_size=BATCH)
    Embed.both = both(Embed.both)  # type: ignore[method-assign]
    embed = df.cls(max_concurrency=actors, use_process=True)(Embed)(_folder(root))
    rows = df.read_parquet(f"{pool}/*.parquet")
    z = rows.select("key", embed.both(df.col("jpg"), df.col("caption")).alias("z"))
    z.write_parquet(str(root / "out"))


def bare(root: Path, pool: Path, actors: int) -> None:
    """Our own decoding and our own encoder in a loop, a process for each share of the files, and nothing else."""
    files = sorted(str(path) for path in pool.iterdir())
    command = [sys.executable, "-m", "benchmarks.whole", "--loop", str(root)]
    loops = [subprocess.Popen([*command, *files[number::actors]]) for number in range(actors)]
    if any(loop.wait() for loop in loops):
        raise SystemExit("a loop failed")


def bare_loop(root: Path, files: list[str]) -> None:
    """One process of `bare`."""
    import numpy as np
    import pyarrow.parquet as pq
    import torch

    from curate.embed.decode import decode_row
    from curate.models.encoder import load_encoder
    from curate.models.spec import EncoderSpec
    from curate.storage import Store

    torch.set_num_threads(1)
    spec = EncoderSpec(**json.loads((root / "spec.json").read_text()))
    encoder = load_encoder(Store(str(root)), spec, torch.device("cpu"))
    for path in files:
        for rows in pq.ParquetFile(path).iter_batches(BATCH, columns=["jpg", "caption"]):
            pairs = zip(rows["jpg"].to_pylist(), rows["caption"].cast("binary").to_pylist(), strict=True)
            found = [decode_row(pair, {encoder.view: encoder.crop}) for pair in pairs]
            pixels = torch.from_numpy(np.stack([one.pixels[encoder.view] for one in found]))
            encoder.encode(pixels, encoder.tokenize([one.caption for one in found]))


SIDES: dict[str, Callable[[Path, Path, int], None]] = {side.__name__: side for side in (ours, hand, fused, daft, bare)}


def _folder(root: Path) -> str:
    return str(root / "models" / json.loads((root / "spec.json").read_text())["model"])


# --- the clock -------------------------------------------------------------------------------------------------------


def make_site(scratch: Path, rows: int, shards: int, actors: int) -> None:
    """Pictures, a few of them apart, and a model."""
    from benchmarks.embed import TINY
    from curate.jobs.drawn_pool import draw_pool
    from curate.models.encoder import store_encoder
    from curate.recipe import EncoderSection
    from curate.storage import Store

    draw_pool(scratch / "whole", rows=rows, shards=shards, seed=0, image_size=256)
    draw_pool(scratch / "start", rows=2 * actors, shards=actors, seed=0, image_size=256)
    (scratch / "tiny.json").write_text(json.dumps(TINY))
    store = Store(str(scratch / "root"))
    spec = store_encoder(store, EncoderSection(model="tiny.json"), role="reference", base=scratch, seed=0)
    (scratch / "root/spec.json").write_text(json.dumps(asdict(replace(spec, exact_pixels=False))))


def clock(side: str, root: Path, pool: Path, actors: int) -> None:
    """Run a side in a process of its own; prints its seconds, and the CPU seconds of all that it started."""
    # Daemons that outlive their parent become children of this process, so that they are seen.
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    spent: dict[tuple[int, float], float] = {}
    began = time.perf_counter()
    command = [sys.executable, "-m", "benchmarks.whole", "--side", side, str(root), str(pool), str(actors)]
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said)
        while process.poll() is None:
            note_times(spent)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(SAMPLE_S)
        took = time.perf_counter() - began
        said.seek(0)
        if process.returncode:
            raise SystemExit(f"{side}: {said.read()[-2000:]}")
    while note_times(spent):
        time.sleep(SAMPLE_S)
    print(json.dumps({"wall": took, "cpu": sum(spent.values())}))


def note_times(spent: dict[tuple[int, float], float]) -> int:
    """Take down the CPU time of each process below this one, for when it is gone; returns how many live."""
    alive = 0
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            spent[process.pid, process.create_time()] = sum(process.cpu_times()[:2])
            alive += process.status() != psutil.STATUS_ZOMBIE
    return alive


def measure(side: str, scratch: Path, pool: str, actors: int, env: dict[str, str]) -> dict[str, float]:
    """Wall and CPU seconds of a side over a pool, in a root that holds a model and nothing else."""
    root = scratch / "run"
    shutil.copytree(scratch / "root", root)
    try:
        what = ["--clock", side, str(root), str(scratch / pool), str(actors)]
        command = [sys.executable, "-m", "benchmarks.whole", *what]
        done = subprocess.run(command, env=os.environ | env, stdout=subprocess.PIPE, text=True, check=True)
        found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        return found
    finally:
        shutil.rmtree(root)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--shards", type=int, default=40)
    parser.add_argument("--pairs", type=int, default=3, help="how often the sides take turns")
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--only", default="ours,hand,bare", help=f"some of {','.join(SIDES)}")
    parser.add_argument("--daft", metavar="FOLDER", help="where Daft is installed")
    for hidden in ("--side", "--clock", "--loop"):
        parser.add_argument(hidden, nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.loop:
        bare_loop(Path(args.loop[0]), args.loop[1:])
    elif asked := args.side or args.clock:
        side, root, pool, actors = asked
        call = clock if args.clock else lambda side, *rest: SIDES[side](*rest)
        call(side, Path(root), Path(pool), int(actors))
    else:
        compare(args)


def compare(args: argparse.Namespace) -> None:
    """Let the sides take turns, and print what each took, and which share of it the first one did."""
    sides = args.only.split(",")
    env = {"OMP_NUM_THREADS": "1", "DO_NOT_TRACK": "1"}
    if args.daft:
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [os.path.abspath(args.daft), os.environ.get("PYTHONPATH")]))
    found: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        make_site(scratch, args.rows, args.shards, args.actors)
        for number in range(args.pairs):
            for side in sides:
                one: dict[str, float] = {}
                for pool in ("start", "whole"):
                    one |= {f"{pool} {kind}": s for kind, s in measure(side, scratch, pool, args.actors, env).items()}
                for kind in ("wall", "cpu"):
                    one[f"work {kind}"] = one[f"whole {kind}"] - one[f"start {kind}"]
                found[side].append(one)
                print(number, side, " ".join(f"{name} {s:.1f}" for name, s in one.items()), file=sys.stderr, flush=True)
    names = [f"{part} {kind}" for kind in ("wall", "cpu") for part in ("whole", "start", "work")]
    print(f"{args.rows} pictures of 256 px, {args.actors} actors; medians of {args.pairs}, s; ratios pair by pair")
    print("|  |", " | ".join(f"{name} | {sides[0]} / it" for name in names), "|")
    print("|---" * (2 * len(names) + 1) + "|")
    for side in sides:
        cells = []
        for name in names:
            ratio = median(one[name] / other[name] for one, other in zip(found[sides[0]], found[side], strict=True))
            cells += [f"{median(one[name] for one in found[side]):.1f}", f"{ratio:.2f}"]
        print("|", side, "|", " | ".join(cells), "|")


if __name__ == "__main__":
    main()
