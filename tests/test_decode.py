"""Rows that crash a decoder or hold it up: found, named and passed over."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curate.embed.decode import DECODE_TIMEOUT, WORKER_CRASH, Apart, Decoded, Watched
from curate.jobs.drawn_pool import draw_pool
from curate.rounds.manifest import read_manifest
from curate.rounds.trace import explain_uid
from curate.storage import Store
from tests.broken_crop import crop, row
from tests.helpers import write_tiny

CRASH, HANG = b"a row that kills", b"a row that hangs"


def statuses(found: list[Decoded]) -> list[str]:
    return [decoded.status for decoded in found]


def test_the_rows_that_kill_or_hold_up_are_named_and_no_others() -> None:
    apart = Apart({"view": crop}, deadline_s=3)
    sound = [row(0), (b"", b"x"), (row(1)[0], b" "), row(2)]
    here, there = list(Watched({"view": crop})(sound)), apart(sound)
    assert statuses(here) == statuses(there) == ["ok", "image_empty", "caption_empty", "ok"]
    for one, other in zip(here, there, strict=True):
        assert (one.caption, one.size, one.error) == (other.caption, other.size, other.error)
        assert all(np.array_equal(one.pixels[view], other.pixels[view]) for view in one.pixels)

    found = apart([row(0), row(1, (99, 32)), row(2), row(3, (98, 32)), row(4)])
    assert statuses(found) == ["ok", WORKER_CRASH, "ok", DECODE_TIMEOUT, "ok"]
    assert found[1].error == "a decoder ended with exit status -6"
    assert found[3].error == "a decoder was still at it after 3 s"
    assert statuses(apart([row(5)])) == ["ok"]
    apart.close()


WATCHED = """
from curate.embed.decode import Watched
from tests.broken_crop import crop, row
watched = Watched({"view": crop}, deadline_s=1)
list(watched([row(0)]))
import time
time.sleep(2)  # nothing is under way: nothing ends this process
print("alive", flush=True)
list(watched([row(1), row(2, (98, 32))]))
"""


def test_a_process_in_which_a_row_hangs_ends() -> None:
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", WATCHED], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1, done.stderr
    assert (done.stdout, done.stderr) == ("alive\n", "")
    assert time.monotonic() - began < 100


# --- a round with both -----------------------------------------------------------------------------------------------

SITE = f"""
import os, time
import curate.pool.images
decode_image, decode_pixels = curate.pool.images.decode_image, curate.pool.images.decode_pixels
def decode(real, data, how):
    if {CRASH!r} in (data or b""):
        os.abort()
    while {HANG!r} in (data or b""):
        time.sleep(1)
    return real(data, **how)
curate.pool.images.decode_image = lambda data, **how: decode(decode_image, data, how)
curate.pool.images.decode_pixels = lambda data, **how: decode(decode_pixels, data, how)
"""
RECIPE = """
root = "root"
[pool]
path = "pool"
uid = "key"
[reference]
model = "tiny.json"
[learner]
model = "tiny.json"
[selection]
sub_batch_size = 16
n_chunks = 4
filter_ratio = 0.75
"""


@pytest.mark.exhaustive
@pytest.mark.timeout(600)
def test_a_round_goes_on_without_them(tmp_path: Path) -> None:
    """Every process decodes as if libjpeg had a defect that two pictures of the pool lay bare."""
    write_tiny(tmp_path)
    draw_pool(tmp_path / "pool", rows=300, shards=3, seed=0, image_size=32)
    for shard, number, mark in ((0, 17, CRASH), (2, 40, HANG)):
        path = sorted((tmp_path / "pool").iterdir())[shard]
        table = pq.read_table(path)
        images = table["jpg"].to_pylist()
        images[number] += mark
        column = table.schema.get_field_index("jpg")
        pq.write_table(table.set_column(column, "jpg", pa.array(images, table.schema.field("jpg").type)), path)
    (tmp_path / "recipe.toml").write_text(RECIPE)
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(SITE)

    def run(root: str, **env: str) -> tuple[float, str]:
        began = time.monotonic()
        command = [sys.executable, "-m", "curate.jobs.cli", "round", "recipe.toml", "--set", f"root={root}"]
        done = subprocess.run(
            command, cwd=tmp_path, env=os.environ | env, capture_output=True, text=True, timeout=400, check=False
        )
        assert done.returncode == 0, done.stderr
        assert not re.search(r"Traceback|ray::|\.cc:", done.stdout + done.stderr)
        return time.monotonic() - began, done.stdout

    undisturbed, _ = run("sound")
    disturbed, said = run("root", PYTHONPATH=str(tmp_path / "site"))
    print(f"undisturbed {undisturbed:.0f} s, with a row that kills and one that hangs {disturbed:.0f} s")
    assert disturbed < undisturbed + 120
    assert WORKER_CRASH in said
    assert DECODE_TIMEOUT in said
    store = Store(str(tmp_path / "root"))
    found = read_manifest(store, 0)
    assert found is not None
    dropped = found[0].tallies[0].dropped
    assert (dropped[WORKER_CRASH], dropped[DECODE_TIMEOUT]) == (1, 1)
    assert sum(dropped.values()) == 2
    keys = [pq.read_table(path)["key"].to_pylist() for path in sorted((tmp_path / "pool").iterdir())]
    for uid, status in ((keys[0][17], WORKER_CRASH), (keys[2][40], DECODE_TIMEOUT)):
        (story,) = explain_uid(store, uid)
        assert story["status"] == status
        assert "a decoder" in story["error"]
